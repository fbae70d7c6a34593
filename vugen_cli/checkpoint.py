"""Checkpoints: one safetensors file a stage, with a JSON card in its header. No pickle is read or written.

The card (`vugen_cli/card.py`) says all that the next stage needs, so that one file is enough to go on.
"""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from vugen_cli.card import FORMAT, AdapterCard, Card, StateCard
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import whole_file
from vugen_cli.key_map import from_format_1, old_name
from vugen_cli.version import __version__

AnyCard = Card | AdapterCard | StateCard
LARGEST_HEADER = 100 * 2**20  # bytes; what the safetensors library itself accepts


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], card: AnyCard) -> None:
    """Write weights and card, whole or not at all.

    Args:
        path: ends in `.safetensors`.
        tensors: name -> tensor on any device; stored contiguous, in their own dtype.
        card: of the file; format and version become this tool's.
    """
    own = card.model_copy(update={"format": FORMAT, "version": __version__})
    save_tensors(path, tensors, {"vugen": own.model_dump_json(exclude_none=True)})


def save_tensors(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: ends in `.safetensors`.
        tensors: as of `save_checkpoint`.
        header: the file's metadata: one key, since the library writes several in any order.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata=header)
        except SafetensorError as error:  # the library wraps a full disk in its own exception
            raise VugenError(f"cannot write {path}: {error}") from error


def read_header(path: str | Path) -> AnyCard:
    """The card of a checkpoint, of an adapter or of a run's state, from the header alone.

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
    except (OSError, ValueError, struct.error, AttributeError, RecursionError) as error:
        raise VugenError(f"{file} is not a readable safetensors file ({error})") from error
    if text is None:
        raise VugenError(f"{file} was not written by vugen: its header has no card")
    try:
        values = json.loads(text)
        if values.get("format", 0) > FORMAT:
            raise VugenError(
                f"{file} is in format {values['format']}, newer than this vugen reads: upgrade vugen-cli"
            )
        stage = str(values.get("stage"))
        kind: type[AnyCard] = StateCard if stage.endswith("-state") else Card
        kind = AdapterCard if stage == "adapter" else kind
        return kind.model_validate(values)
    except (ValueError, AttributeError, TypeError) as error:
        raise VugenError(f"the card of {file} is damaged: {first_line(error)}") from error


def read_card(path: str | Path, stage: str | None = None) -> Card:
    """The card of a trained checkpoint, from the header alone.

    Args:
        path: the file.
        stage: the stage it must come from (`reducer`, `sampler`), or None for either.

    Raises:
        VugenError: as `read_header`, or the file is of another stage.
    """
    card = read_header(path)
    if not isinstance(card, Card):
        wanted = f"a {stage}" if stage else "a reducer or sampler"
        if isinstance(card, AdapterCard):
            raise VugenError(
                f"{path} is an adapter: {wanted} is needed here; draw with it by --adapter {path}"
            )
        raise VugenError(f"{path} is a {card.stage} checkpoint: {wanted} is needed here")
    if stage and card.stage != stage:
        raise VugenError(
            f"{path} is a {card.stage} checkpoint, but a {stage} is needed here: "
            f"make one with `vugen train-{stage}`"
        )
    return card


def load_checkpoint(path: str | Path, stage: str | None = None) -> tuple[dict[str, Tensor], Card]:
    """Weights and card of a trained checkpoint; tensors have the names of today, whatever the format.

    Raises:
        VugenError: as `read_card`, or its weights are cut short.
    """
    card = read_card(path, stage)
    tensors = load_tensors(path)
    return from_format_1(tensors, card.stage) if card.format == 1 else tensors, card


def check_whole(path: str | Path) -> None:
    """See that a safetensors file is as long as its header says, without reading its tensors.

    Raises:
        VugenError: it is cut short.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise VugenError(f"{path} is damaged: {error}") from error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        VugenError: it is cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise VugenError(f"{path} is damaged: {error}") from error
    return tensors


def select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, without it."""
    return {
        name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")
    }


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `select`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def fingerprint(model: nn.Module | dict[str, Tensor], within: str = "") -> str:
    """SHA-256 over every weight's name, shape and value, the same whatever precision it is loaded in.

    Args:
        model: any network, or its state dict.
        within: what one of our own is called in a checkpoint, `autoencoder.` or such: its weights are hashed
            under their names in format 1, so that caches and runs of before still know it.
    """
    return combined_digest(weight_digests(model, within))


def weight_digests(model: nn.Module | dict[str, Tensor], within: str = "") -> dict[str, bytes]:
    """SHA-256 of each weight's name, shape and value, in the order of the names; see `fingerprint`.

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

    state = model.state_dict() if isinstance(model, nn.Module) else model
    weights = sorted((old_name(name, within), weight) for name, weight in state.items())
    with ThreadPoolExecutor() as pool:
        return dict(zip((name for name, _ in weights), pool.map(digest, weights), strict=True))


def combined_digest(digests: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(digests.values())).hexdigest()
