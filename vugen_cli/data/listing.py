"""What a source lists, kept in a file: a hundred million paths must not take the memory of every process."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from vugen_cli.errors import VugenError

_PREFIX = "vugen-listing-"
_NEW = 60  # seconds in which a listing may not be held yet


class Listing:
    """JSON values in a temporary file, read by number; sent to another process, it is the file's name.

    The file goes when the process that made it has no more use of it.

    Args:
        values: taken one by one, never held together.

    Attributes:
        fingerprint: of all values, in their order.
    """

    def __init__(self, values: Iterable[Any]):
        _clear_leftovers()
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        held = os.open(self.folder, os.O_RDONLY)  # until the process ends, however it does
        weakref.finalize(self, _give_up, self.folder, held)
        digest, end = hashlib.sha256(), 0
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX)  # at once, but for another's look at it
            with open(self.folder / "values", "wb") as file, open(self.folder / "ends", "wb") as ends:
                for value in values:
                    line = json.dumps(value).encode() + b"\n"
                    digest.update(line)
                    end += file.write(line)
                    ends.write(end.to_bytes(8, "little"))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise VugenError(
                f"no space is left in {self.folder.parent} for the list of what the source holds: free some, "
                "or set TMPDIR to another folder"
            ) from error
        self.fingerprint = digest.hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "fingerprint": self.fingerprint}

    @cached_property
    def _ends(self) -> np.ndarray:
        path = self.folder / "ends"
        return np.memmap(path, "<i8", "r") if path.stat().st_size else np.empty(0, np.int64)

    @cached_property
    def _file(self) -> IO[bytes]:
        return open(self.folder / "values", "rb")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        start = int(self._ends[index - 1]) if index else 0
        return json.loads(os.pread(self._file.fileno(), int(self._ends[index]) - start, start))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def _give_up(folder: Path, held: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.close(held)


def _clear_leftovers() -> None:
    """Remove listings that no process holds any more: of a hundred million paths one is gigabytes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:  # gone, or of another user
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(handle).st_mtime > _NEW:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, or on a file system that cannot say
            pass
        finally:
            os.close(handle)


def by_first(keys: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Equal keys brought together: the rows, int64, and where each key's begin among them, and the end.

    A key's rows are in their order, and keys in the order of their first rows. Keys are told apart by 64 bits
    of a hash: of a hundred million, two are taken for one with a probability of 3 in 10,000.
    """
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
    hashes = np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)
    rows = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(hashes[rows]) != 0]) if len(rows) else np.empty(0, np.int64)
    lengths = np.diff(np.r_[starts, len(rows)])
    order = np.argsort(rows[starts], kind="stable")
    starts, lengths = starts[order], lengths[order]
    bounds = np.r_[0, np.cumsum(lengths)]
    return rows[np.repeat(starts - bounds[:-1], lengths) + np.arange(len(rows))], bounds
