"""States as a folder that every process writes its own part of, and states read by any number of processes.

`state-0000500/` holds `card.json` and one safetensors file of each share of the weights. A file's header says
where in the whole tensors its pieces begin, under the key of torch.distributed.checkpoint, whose
`HuggingFaceStorageReader` reads such folders too.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor

from vugen_cli.card import FORMAT, StateCard
from vugen_cli.checkpoint import read_header, save_tensors
from vugen_cli.engine.distributed import extent, local
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import write_json
from vugen_cli.key_map import from_format_1
from vugen_cli.processes import PATIENCE, is_first
from vugen_cli.version import __version__

CARD = "card.json"
FAILED = "failed"  # a file that tells the first process that another could not write its part
PARTS = "[0-9]*-of-*.safetensors"
OFFSETS = "DCP_SHARDING_INFO"


class Part:
    """What this process writes of a state: copies in CPU memory, which training does not change.

    Replicas hold the same; the first writes it. What is not shared out the first process writes.

    Args:
        tensors: all of the state, some of them sharded over one mesh.

    Attributes:
        number, of: which of the files it is, from 1; 0: this process has none to write.
        pieces: name -> contiguous tensor.
        begins: name -> where that begins in the whole tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        mesh = next(t.device_mesh for t in tensors.values() if isinstance(t, DTensor))
        *replica, shard = mesh.get_coordinate() or ()
        self.of = mesh.shape[-1]
        self.number = 0 if any(replica) else shard + 1
        self.pieces: dict[str, Tensor] = {}
        self.begins: dict[str, tuple[int, ...]] = {}
        for name, tensor in tensors.items():
            begin, shape = extent(tensor)
            mine = self.number if isinstance(tensor, DTensor) else is_first()
            if mine and 0 not in shape:
                self.begins[name] = begin
                self.pieces[name] = local(tensor.detach()).to(
                    "cpu", copy=True, memory_format=torch.contiguous_format
                )

    def write(self, folder: Path) -> None:
        """Write the file into a hidden folder, the same on all processes; whole or not at all."""
        if not self.number:
            return
        offsets = {name: {"saved_offsets": begin} for name, begin in self.begins.items()}
        path = folder / f"{self.number:05d}-of-{self.of:05d}.safetensors"
        try:
            save_tensors(path, self.pieces, {OFFSETS: json.dumps(offsets, sort_keys=True)})
        except BaseException:
            with contextlib.suppress(OSError):
                (folder / FAILED).touch()
            raise


def publish(folder: Path, path: Path, parts: int, card: StateCard, given_up: threading.Event) -> None:
    """When all parts are in a hidden folder, add the card and give it its name; on the first process.

    Args:
        folder: hidden.
        path: what it becomes; a folder that is there is replaced.
        parts: how many files there will be.
        card: of the state; format and version become this tool's.
        given_up: set when another process is gone, so that its part will not come.

    Raises:
        VugenError: another process could not write its part.
    """
    limit = time.monotonic() + PATIENCE.total_seconds()
    while len(list(folder.glob(PARTS))) < parts:
        if given_up.wait(0.05):
            return
        if (folder / FAILED).exists() or time.monotonic() > limit:
            raise VugenError(f"cannot write {path}: another process did not write its part")
    own = card.model_copy(update={"format": FORMAT, "version": __version__})
    write_json(folder / CARD, own.model_dump(mode="json"))
    discard(path)
    folder.rename(path)


def discard(path: Path) -> None:
    """Remove a state, a file or a folder, at once as far as anyone can see."""
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.old")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)  # what someone still reads on NFS goes at the next start
    else:
        path.unlink(missing_ok=True)


class Stored:
    """A state on disk, a file or a folder of parts, of which each process reads what it needs.

    Attributes:
        path: where it is.
        card: its JSON card.
        shapes: name -> shape of the whole tensor.

    Raises:
        VugenError: it is not whole, or newer than this tool.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path, self.card = path, _card(path)
        # name -> pieces: the file, what it calls the tensor, where the piece begins, its shape
        self._pieces: dict[str, list[tuple[Any, str, list[int], list[int]]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        files = sorted(path.glob(PARTS)) if path.is_dir() else [path]
        if path.is_dir() and (not files or len(files) != int(files[0].stem.rpartition("-")[2])):
            raise VugenError(f"{path} is damaged: it has {len(files)} parts, not as many as their names say")
        try:
            for number in files:
                file: Any = safe_open(number, "pt")
                offsets = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
                for name in file.keys():  # noqa: SIM118 - not a dict
                    shape = file.get_slice(name).get_shape()
                    begin = offsets.get(name, {}).get("saved_offsets", [0] * len(shape))
                    self._pieces.setdefault(name, []).append((file, name, begin, shape))
        except (SafetensorError, OSError, ValueError) as error:
            raise VugenError(f"{path} is damaged: {error}") from error
        if self.card.format == 1:
            self._pieces = from_format_1(self._pieces, self.card.stage)
        for name, pieces in self._pieces.items():
            ends = [[b + n for b, n in zip(begin, shape, strict=True)] for *_, begin, shape in pieces]
            self.shapes[name] = tuple(map(max, zip(*ends, strict=True)))

    @torch.no_grad()
    def fill(self, tensor: Tensor, name: str) -> Tensor:
        """Read this process's part of a tensor into it, from whichever files hold it; returns it."""
        begin, shape = extent(tensor)
        for file, called, first, size in self._pieces[name]:
            # Where the piece and this process's part overlap, in the whole tensor.
            low = [max(a, b) for a, b in zip(begin, first, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, shape, first, size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                there = tuple(slice(a - b, e - b) for a, e, b in zip(low, high, first, strict=True))
                here = tuple(slice(a - b, e - b) for a, e, b in zip(low, high, begin, strict=True))
                piece = file.get_slice(called)[there] if there else file.get_tensor(called)
                local(tensor)[here].copy_(piece)
        return tensor

    def read(self, name: str) -> Tensor:
        """A whole tensor, in CPU memory."""
        file, called, *_ = self._pieces[name][0]
        piece = file.get_slice(called)[:0] if self.shapes[name] else file.get_tensor(called)
        return self.fill(torch.empty(self.shapes[name], dtype=piece.dtype), name)


def _card(path: Path) -> StateCard:
    if not path.is_dir():
        card = read_header(path)
        if not isinstance(card, StateCard):
            raise VugenError(f"{path} is a {card.stage} checkpoint: the state of a run is needed here")
        return card
    try:
        card = StateCard.model_validate_json((path / CARD).read_bytes())
    except (OSError, ValidationError) as error:
        raise VugenError(f"{path} is damaged: {CARD}: {first_line(error)}") from error
    if card.format > FORMAT:
        raise VugenError(f"{path} is in format {card.format}, newer than this vugen reads: upgrade vugen-cli")
    return card
