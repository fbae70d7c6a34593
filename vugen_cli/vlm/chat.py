"""Asking a VLM about images: what it always could, and still can."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vugen_cli.errors import VugenError
from vugen_cli.progress import progress_bar
from vugen_cli.vlm.prompts import rendered

CHAT_BATCH = 64  # images asked about together


@contextmanager
def asking(name: str, question: str) -> Iterator[None]:
    """Within this, what a foreign model raises when it is asked is said in one line.

    Raises:
        VugenError: the model cannot be asked.
    """
    try:
        yield
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise VugenError(f"{name} cannot be asked '{question[:60]}': {reason}") from error


def question_inputs(model: Any, processor: Any, images: Tensor, question: str) -> Any:
    """What the model reads of one question about each of some images.

    Args:
        model: an image-text-to-text model.
        processor: its processor.
        images: uint8 [B, 3, H, W].
        question: put into the chat template, if there is one.

    Raises:
        VugenError: the model's processor could not be loaded whole.
    """
    if not callable(processor):
        raise VugenError(f"{type(model).__name__} cannot be asked: {processor.missing}")
    text = conversation(processor, [None, question])
    inputs = processed(processor, [text] * len(images), [[image] for image in images])
    return inputs.to(model.device, model.dtype)


def processed(processor: Any, texts: Sequence[str], pictures: Sequence[Sequence[Tensor]], **more: Any) -> Any:
    """What a processor makes of conversations and the pictures of each: keyword arguments of the model.

    Args:
        processor: the model's.
        texts: from `conversation`.
        pictures: of each text, uint8 [3, H, W].
        more: what else the processor is told.
    """
    start = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if start and texts[0].startswith(start):  # by the template; many a tokenizer would add another
        more["add_special_tokens"] = False
    # Nested, since some processors tell apart by the nesting.
    return processor(images=list(map(list, pictures)), text=list(texts), return_tensors="pt", **more)


def conversation(processor: Any, parts: Sequence[str | None]) -> str:
    """What a user says, in the model's chat template if there is one.

    Args:
        processor: the model's.
        parts: texts, and None for each picture, in order.
    """
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
        return rendered(processor, content)
    picture = str(getattr(processor, "image_token", "<image>"))
    if getattr(processor, "num_query_tokens", None):  # a Q-Former's: it places the picture itself
        picture = ""
    return "".join(picture if part is None else part for part in parts)


@torch.no_grad()
def ask(
    model: Any, processor: Any, images: Tensor, question: str, tokens: int = 32, task: str | None = None
) -> list[str]:
    """Greedy answers to one question about each image, in batches.

    Args:
        model, processor, images, question: see `question_inputs`.
        tokens: at most this many in an answer.
        task: what a progress bar says; None: no bar.

    Raises:
        VugenError: as `question_inputs`, or the question is too long for the model.
    """
    answers: list[str] = []
    for batch in progress_bar(images.split(CHAT_BATCH), desc=task or "", unit="batch", disable=task is None):
        inputs = question_inputs(model, processor, batch, question)
        length = inputs["input_ids"].shape[1]
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most and length > most:
            raise VugenError(f"a question of {length:,} tokens is too long: the VLM reads {most:,}")
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        answers += processor.batch_decode(out[:, length:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
