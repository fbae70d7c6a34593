"""The frozen vision-language model: images to latents z, prompts to a prefix of keys and values.

Nothing here changes a weight: parameters do not require gradients and every pass runs without autograd.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vugen_cli.errors import VugenError

PROJECTORS = ("multi_modal_projector", "connector", "visual.merger")


@dataclass
class Prefix:
    """What the generation expert reads of a batch of prompts.

    Attributes:
        keys: one tensor [B, kv_heads, T, head_dim] for each layer, rotary positions applied.
        values: likewise.
        mask: bool [B, T], False where a shorter prompt is padded.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt [B]; the first free position."""
        return self.mask.sum(1)

    @staticmethod
    def join(prefixes: "list[Prefix]") -> "Prefix":
        """Several prefixes of the same padded length as one batch."""
        return Prefix(
            [torch.cat(keys) for keys in zip(*(p.keys for p in prefixes), strict=True)],
            [torch.cat(values) for values in zip(*(p.values for p in prefixes), strict=True)],
            torch.cat([p.mask for p in prefixes]),
        )

    def rows(self, index: Tensor) -> "Prefix":
        """The prefixes of some rows, in that order."""
        return Prefix([k[index] for k in self.keys], [v[index] for v in self.values], self.mask[index])


class FrozenVLM:
    """A Hugging Face image-text-to-text model used for its latents and its prompt states.

    Attributes:
        name: as the user gave it; stored in checkpoints.
        model, processor: the transformers objects.
        fingerprint: a hash over the names, shapes and values of the weights.
    """

    def __init__(self, name: str, model: Any, processor: Any):
        self.name, self.model, self.processor = name, model.eval().requires_grad_(False), processor
        self.projector = find_projector(model)
        self.decoder: nn.Module = model.get_decoder()
        self.device: torch.device = next(model.parameters()).device
        self.fingerprint = fingerprint(model)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """z, what the model's own projector reads.

        Args:
            images: uint8 or float in [0, 1], [B, 3, H, W].

        Returns:
            float32 [B, h, w, d].
        """
        if images.dtype != torch.uint8:
            images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        inputs = self.processor.image_processor(images=list(images.to(self.device)), return_tensors="pt")
        with projector_inputs(self.projector) as seen:
            self.model.get_image_features(
                pixel_values=inputs["pixel_values"].to(self.device, self.model.dtype)
            )
        z = seen[0].float()
        side = math.isqrt(z.shape[1])
        if side * side != z.shape[1]:
            raise VugenError(f"{self.name} gives {z.shape[1]} image tokens, which is not a square grid")
        return z.unflatten(1, (side, side))

    def prompt_text(self, prompt: str) -> str:
        """The prompt as the model's chat template puts it."""
        message = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        return self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)

    def prompt_length(self, prompt: str) -> int:
        """Tokens of a prompt in the chat template.

        Raises:
            VugenError: more than the model has positions for.
        """
        length = len(
            self.processor.tokenizer(self.prompt_text(prompt), add_special_tokens=False)["input_ids"]
        )
        longest = getattr(self.decoder.config, "max_position_embeddings", None)
        if longest and length > longest // 2:
            raise VugenError(
                f"a prompt of {length} tokens is too long for {self.name}, which reads {longest // 2} beside "
                f"an image: shorten it ({prompt[:40]}...)"
            )
        return length

    @torch.no_grad()
    def prefix(self, prompts: list[str], length: int | None = None) -> Prefix:
        """Keys and values of some prompts in every layer; the empty prompt is the unconditional one.

        Args:
            prompts: texts, put into the chat template.
            length: pad to this many tokens; default the longest of the prompts.
        """
        from transformers import DynamicCache

        inputs = self.processor.tokenizer(
            [self.prompt_text(p) for p in prompts],
            add_special_tokens=False,
            padding="max_length" if length else True,
            max_length=length,
            return_tensors="pt",
        ).to(self.device)
        mask = inputs["attention_mask"].bool()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache()  # no config: sliding-window layers must keep the whole prompt too
        self.decoder(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return Prefix([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], mask)

    def check(self, card: dict[str, Any], checkpoint: str | Path) -> None:
        """Refuse a checkpoint that was trained on another VLM.

        Raises:
            VugenError: the fingerprints differ; names both models.
        """
        trained = card["vlm"]
        if trained["fingerprint"] != self.fingerprint:
            raise VugenError(
                f"{checkpoint} was trained on the VLM {trained['name']} ({trained['fingerprint'][:12]}), "
                f"but this is {self.name} ({self.fingerprint[:12]}): pass the right one with --vlm"
            )


@contextmanager
def projector_inputs(projector: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what a model's projector is given while the context lasts."""
    seen: list[Tensor] = []
    handle = projector.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def find_projector(model: Any) -> nn.Module:
    """The module between the vision tower and the language model.

    Raises:
        VugenError: the model has none of the known names.
    """
    for name, module in model.named_modules():
        if name.endswith(PROJECTORS):
            return module
    raise VugenError(f"{type(model).__name__} has no vision projector (looked for {', '.join(PROJECTORS)})")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every weight's name, shape and values, as float32 whatever the loading dtype."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def bundle(name: str) -> Path:
    """Where a part of the bundled nano line lies in the installed package: `vlm`, `sampler.safetensors`."""
    return Path(__file__).parent.parent / "bundles" / "nano" / name


def load_vlm(name: str, device: torch.device | str | None = None) -> FrozenVLM:
    """Load a VLM and freeze it.

    Args:
        name: `nano` (bundled), a Hugging Face directory, or a hub id.
        device: where to put it; default the CPU.

    Raises:
        VugenError: there is no such directory, the hub cannot be reached, or it is not a usable VLM.
    """
    path = bundle("vlm") if name == "nano" else Path(name)
    local = path.is_dir()
    if not local and (name == "nano" or name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise VugenError(f"no VLM at {path}: give a Hugging Face directory, a hub id (owner/name) or `nano`")
    if local and not (path / "config.json").is_file():
        raise VugenError(f"{path} has no config.json: it is not a Hugging Face model directory")
    local = local or not reach_hub(name)
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = str(path) if path.is_dir() else name
    try:
        processor = AutoProcessor.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            source, local_files_only=local, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except Exception as error:  # a foreign directory can fail in as many ways as there are model classes
        raise VugenError(
            f"{name} could not be loaded as a vision-language model: {_first_line(error)}"
        ) from error
    return FrozenVLM(name, model.to(device or "cpu"), processor)


def reach_hub(name: str, seconds: float = 5.0) -> bool:
    """Whether the hub answers, for a hub id that is to be loaded.

    Left alone, the hub library retries an unreachable host for minutes.

    Raises:
        VugenError: the hub does not answer and the model was not downloaded before.
    """
    from urllib.request import Request, urlopen

    from huggingface_hub import constants, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=seconds).close()
    except OSError as error:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return False
        raise VugenError(
            f"the VLM {name} is not a local directory and the hub cannot be reached ({_first_line(error)}): "
            "download it elsewhere and pass its directory, or check the network"
        ) from error
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
