"""Adapters: what a short training adds to a sampler's expert, as products of low rank (arXiv 2106.09685).

Trained by `peft` beside the frozen expert; added to its matrices wherever it draws, so that drawing needs no
`peft` and takes no longer: W + weight B A.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vugen_cli.card import AdapterCard
from vugen_cli.checkpoint import (
    fingerprint,
    load_tensors,
    read_header,
    select,
)
from vugen_cli.engine.distributed import blocks
from vugen_cli.errors import VugenError
from vugen_cli.files import is_bundled


def inject(expert: nn.Module, rank: int) -> None:
    """Put an untrained adapter beside the matrices that `carries` names, and freeze all else.

    A subject is learnt without those of the feed-forward layers, which are most of an expert.

    Args:
        expert: changed in place; what it computes is not, yet: B is zero.
        rank: of each product; A is [rank, columns] and B [rows, rank].

    Raises:
        VugenError: `peft` is not installed, or the rank is no smaller than the matrices.
    """
    peft = import_peft()
    inside = {id(part) for block in blocks(expert) for part in block.modules()}
    matrices = {n: m for n, m in expert.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}
    chosen = list(filter(carries, matrices)) or list(matrices)
    smallest = min(min(matrices[name].weight.shape) for name in chosen)
    if rank >= smallest:
        raise VugenError(f"--adapter {rank}: the expert's matrices are of rank {smallest}; give less")
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen), expert)


def import_peft() -> Any:
    """The library that trains adapters.

    Raises:
        VugenError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise VugenError("adapters are trained by peft: pip install 'vugen-cli[adapters]'") from error
    return peft


def carries(name: str) -> bool:
    """Whether a matrix gets an adapter: those of attention layers, whose keys alone have none.

    Args:
        name: in a decoder of transformers, or in our own blocks.
    """
    *within, own = name.split(".")
    in_attention = any(part.endswith(("attn", "attention")) for part in within)
    return own in ("qkv", "prompt_kv", "proj") or (in_attention and own != "k_proj")


def adapter_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an expert's state dict with an adapter in it, that adapter's own, as a file names them."""
    return {n.replace(".default.", "."): tensor for n, tensor in tensors.items() if ".lora_" in n}


def base_name(path: str | Path) -> str:
    """What an adapter's card calls the sampler that it was trained on."""
    return "nano" if is_bundled(path) else str(path)


def with_adapters(tensors: dict[str, Tensor], given: Sequence[str], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a sampler, with adapters added to its expert's matrices.

    Args:
        tensors: of the checkpoint; those that change come out in float32.
        given: adapter files, each with its weight if that is not 1, as `mine.safetensors:0.8`.
        path: of the sampler.

    Raises:
        VugenError: a file is no adapter or damaged, or was trained on another sampler.
    """
    tensors, base = dict(tensors), fingerprint(select(tensors, "expert"), "expert.") if given else ""
    for file, weight in map(parse, given):
        card = read_header(file)
        if not isinstance(card, AdapterCard):
            raise VugenError(f"{file} is a {card.stage} checkpoint: --adapter takes what --adapter trained")
        if card.base.fingerprint != base:
            raise VugenError(
                f"{file} is an adapter of {card.base.name} ({card.base.fingerprint[:12]}), but this sampler "
                f"is {base_name(path)} ({base[:12]}): draw with the one it was trained on"
            )
        parts = load_tensors(file)
        for name, a in parts.items():
            matrix, found, _ = name.rpartition(".lora_A.")
            if not found:
                continue
            try:
                b = parts[f"{matrix}.lora_B.weight"].float()
                tensors[f"{matrix}.weight"] = tensors[f"{matrix}.weight"].float() + weight * (b @ a.float())
            except (KeyError, RuntimeError) as error:
                raise VugenError(f"{file} is damaged: {name} does not fit the expert") from error
    return tensors


def parse(given: str) -> tuple[str, float]:
    """`mine.safetensors:0.8` -> the file and its weight, which is 1 where none is given.

    Raises:
        VugenError: a weight that is not finite.
    """
    file, _, number = given.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        file = ""
    if not file:
        return given, 1.0
    if not math.isfinite(weight):
        raise VugenError(f"--adapter {given}: {number} is no weight")
    return file, weight
