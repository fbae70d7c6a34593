"""The index of a shard: where each sample's members lie in the tar, so that no reader has to list it.

`train-000000.index.npy` beside `train-000000.tar` is int64 [samples, 3 + s, 2]: for each sample its picture
(or latents), `.json`, `.txt` and up to s pictures that it is made from, each as (offset, size) in the tar,
(-1, 0) for one that is missing. `vugen prepare` writes it. Where it is missing it is made, and kept beside
the shard or else in the user's cache.
"""

import contextlib
import tarfile
from pathlib import Path

import numpy as np

from vugen_cli.data.sample import MOST_SOURCES
from vugen_cli.errors import VugenError
from vugen_cli.files import whole_file

MEMBERS = {"png": 0, "jpg": 0, "npy": 0, "json": 1, "txt": 2}  # kind -> column
MEMBERS |= {f"source{n}.{kind}": 3 + n for n in range(MOST_SOURCES) for kind in ("png", "jpg")}


def is_source(name: str) -> bool:
    """Whether a member of a shard is a picture that another of its sample is made from."""
    return MEMBERS.get(name.partition(".")[2], 0) > 2


def index_path(tar: Path) -> Path:
    """Where the index of a shard lies."""
    return tar.with_suffix(".index.npy")


def list_members(tar: Path) -> np.ndarray:
    """Make the index of a shard by reading its headers; of a damaged one, what comes before the damage.

    Raises:
        OSError: the shard cannot be read.
    """
    rows: dict[str, dict[int, tuple[int, int]]] = {}
    with contextlib.suppress(tarfile.TarError), tarfile.open(tar, "r:") as members:
        while (member := members.next()) is not None:
            members.members = []  # type: ignore[attr-defined]  # tarfile would remember every header
            key, _, kind = member.name.partition(".")
            if not member.isfile():
                continue
            places = rows.setdefault(key, {})
            column = MEMBERS.get(kind)
            if column is not None:
                places.setdefault(column, (member.offset_data, member.size))
    columns = range(max([2, *(column for places in rows.values() for column in places)]) + 1)
    listed = [[places.get(column, (-1, 0)) for column in columns] for places in rows.values()]
    return np.array(listed, dtype=np.int64).reshape(-1, len(columns), 2)


def write_index(path: Path, index: np.ndarray) -> None:
    """Keep an index, whole or not at all.

    Raises:
        VugenError: the folder cannot be written.
    """
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, index, allow_pickle=False)


def shard_index(tar: Path, samples: int, spare: Path) -> np.ndarray:
    """The index of a shard, read from its file; made where there is none.

    Not mapped: that would hold a second open file for each shard.

    Args:
        tar: the shard.
        samples: that it holds when it is whole.
        spare: where an index is kept if not beside the shard.

    Raises:
        OSError: the shard cannot be read.
    """
    for path in (index_path(tar), spare):
        with contextlib.suppress(Exception):  # damaged: numpy raises nearly anything
            index: np.ndarray = np.load(path, allow_pickle=False)
            count, columns, pair = index.shape
            if index.dtype == np.int64 and count == samples and columns >= 3 and pair == 2:
                return index
    index = list_members(tar)
    if len(index) == samples:  # the shard is whole: worth keeping
        for path in (index_path(tar), spare):
            with contextlib.suppress(VugenError):
                write_index(path, index)
                break
    return index
