"""Proof that a VLM understands with a sampler loaded exactly as it does without."""

import hashlib
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from vugen_cli.metrics.report import Record
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.vlm.chat import ask, question_inputs
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm

QUESTIONS = ("describe the picture", "what is in the picture?", "where is it?")


class Understanding(Record):
    """What a VLM answers without and with a sampler beside it."""

    metric: str = Field(description="`understanding preserved`")
    vlm: str = Field(description="the VLM, as the sampler's card names it")
    sampler: str = Field(description="the checkpoint")
    preserved: bool = Field(description="whether weights, logits and answers are the same, bit for bit")
    weights_before: str = Field(description="SHA-256 over every weight")
    weights_after: str = Field(description="the same, after the sampler has drawn")
    images: int = Field(description="how many were asked about")
    questions: list[str] = Field(description="what was asked about each")
    logits_compared: int = Field(description="how many numbers")
    logits_that_differ: int = Field(description="0 where understanding is preserved")
    answers: list[list[str]] = Field(description="to each question, of each image")
    answers_after: list[list[str]] = Field(description="the same, after the sampler has drawn")


class UnderstandingReport(Record):
    """What `vugen study understanding` writes."""

    scores: list[Understanding] = Field(description="one object")


def score_understanding(
    sampler: Path,
    images: list[Tensor],
    vlm: str | None = None,
    device: torch.device | str = "cpu",
) -> Understanding:
    """Ask a VLM about images alone, then again beside a sampler that has just drawn; compare bit for bit.

    Args:
        sampler: checkpoint of `vugen train-sampler`.
        images: uint8 [3, H, W] each.
        vlm: where the VLM is now, if not where the sampler's card says.
        device: where to run.

    Returns:
        Hashes of all weights before and after, how many logits were compared and differ, and the answers.

    Raises:
        VugenError: the sampler or its VLM cannot be used, or the VLM cannot be asked.
    """
    loaded = load_sampler(sampler, vlm, device)
    name, recipe = loaded.vlm.name, loaded.vlm.recipe
    del loaded  # the first answers come from a process state in which no sampler is loaded
    alone = load_vlm(name, device, recipe)
    before = weight_hash(alone.model)
    logits, answers = _understand(alone, images)
    del alone

    loaded = load_sampler(sampler, vlm, device)
    for _ in loaded.sample(["a bear in a forest"], steps=2):
        pass
    logits_after, answers_after = _understand(loaded.vlm, images)
    after = weight_hash(loaded.vlm.model)
    pairs = list(zip(logits, logits_after, strict=True))
    differ = sum(int((a != b).sum()) for a, b in pairs)
    return Understanding(
        metric="understanding preserved",
        vlm=name,
        sampler=str(sampler),
        preserved=before == after and differ == 0 and answers == answers_after,
        weights_before=before,
        weights_after=after,
        images=len(images),
        questions=list(QUESTIONS),
        logits_compared=sum(a.numel() for a, _ in pairs),
        logits_that_differ=differ,
        answers=answers,
        answers_after=answers_after,
    )


@torch.no_grad()
def _understand(vlm: FrozenVLM, images: list[Tensor]) -> tuple[list[Tensor], list[list[str]]]:
    """Logits and greedy answers, for each question about each image."""
    logits, answers = [], []
    for question in QUESTIONS:
        for image in images:
            inputs = question_inputs(vlm.model, vlm.processor, image[None], question)
            logits.append(vlm.model(**inputs).logits.float().cpu())
        answers.append([ask(vlm.model, vlm.processor, image[None], question)[0] for image in images])
    return logits, answers


def weight_hash(model: nn.Module) -> str:
    """SHA-256 over the bytes of every weight, in the precision it is in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
