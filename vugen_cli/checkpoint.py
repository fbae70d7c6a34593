"""Checkpoints: one safetensors file a stage, with a JSON card in its header. No pickle is read or written.

The card of a stage says all that the next stage needs: stage, format, recipe, step, the VLM's name and
fingerprint, the latent grid, the data set, and the tool's version.
"""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vugen_cli.errors import VugenError
from vugen_cli.files import whole_file
from vugen_cli.version import __version__

FORMAT = 1
LARGEST_HEADER = 100 * 2**20  # bytes; what the safetensors library itself accepts


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write weights and card, whole or not at all.

    Args:
        path: ends in `.safetensors`.
        tensors: name -> tensor on any device; stored contiguous, in their own dtype.
        card: JSON-able; `format` and `version` are added.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    full = {"format": FORMAT, "version": __version__, **card}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"vugen": json.dumps(full)})
        except SafetensorError as error:  # the library wraps a full disk in its own exception
            raise VugenError(f"cannot write {path}: {error}") from error


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of a checkpoint, from the header alone.

    Raises:
        VugenError: the file is missing, is not a safetensors file of this tool, or is newer than this tool.
    """
    file = Path(path)
    if not file.is_file():
        raise VugenError(f"no checkpoint at {file}")
    try:
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if not 2 <= length <= min(LARGEST_HEADER, file.stat().st_size):
                raise ValueError("its header is not that of a safetensors file")
            header = json.loads(handle.read(length))
        text = header.get("__metadata__", {}).get("vugen")
    except (OSError, ValueError, struct.error, AttributeError) as error:
        raise VugenError(f"{file} is not a readable safetensors file ({error})") from error
    if text is None:
        raise VugenError(f"{file} was not written by vugen: its header has no card")
    card = json.loads(text)
    if card.get("format", 0) > FORMAT:
        raise VugenError(
            f"{file} is in format {card['format']}, newer than this vugen reads: upgrade vugen-cli"
        )
    return card


def check_checkpoint(path: str | Path) -> None:
    """Make sure that a checkpoint is whole, without reading its weights.

    Raises:
        VugenError: as `read_card`, or its weights are cut short.
    """
    from safetensors import SafetensorError, safe_open

    read_card(path)
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise VugenError(f"{path} is damaged: {error}") from error


def load_checkpoint(path: str | Path, stage: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and card of a checkpoint.

    Args:
        path: the file.
        stage: the stage it must come from (`reducer`, `sampler`), or None for any.

    Raises:
        VugenError: as `read_card`, or the file is of another stage, or its weights are cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = read_card(path)
    if stage and card.get("stage") != stage:
        command = {"reducer": "train-reducer", "sampler": "train-sampler"}[stage]
        raise VugenError(
            f"{path} is a {card.get('stage')} checkpoint, but a {stage} is needed here: "
            f"make one with `vugen {command}`"
        )
    try:
        return load_file(path), card
    except (SafetensorError, OSError) as error:
        raise VugenError(f"{path} is damaged: {error}") from error


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    return {
        name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")
    }


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `part`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every weight's name, shape and value, the same whatever precision it is loaded in."""
    return combined_digest(weight_digests(model))


def weight_digests(model: nn.Module) -> dict[str, bytes]:
    """SHA-256 of each weight's name, shape and value, in the order of the names.

    Values are rounded to bfloat16 first; tensors are hashed in parallel threads.
    """

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        data = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        weights = hashlib.sha256(data).digest()  # type: ignore[arg-type]  # typed as a buffer from 3.12 on
        return hashlib.sha256(f"{name} {tuple(item[1].shape)}".encode() + weights).digest()

    weights = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:
        return dict(zip((name for name, _ in weights), pool.map(digest, weights), strict=True))


def combined_digest(digests: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(digests.values())).hexdigest()
