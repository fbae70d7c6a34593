"""Prepared data sets that lie elsewhere: shards are fetched whole, verified, and read from a local cache.

The cache is `shards` in the user's cache folder ($VUGEN_CACHE); a shard's name there is its SHA-256, so that
no two data sets can be confused. It is kept under $VUGEN_CACHE_GB gigabytes, or else leaves a twentieth of
the disk free: what was not read for longest goes first.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.error import HTTPError
from urllib.request import urlopen

from vugen_cli.errors import VugenError
from vugen_cli.files import user_cache, whole_file

if TYPE_CHECKING:
    from vugen_cli.data.manifest import Shard

T = TypeVar("T")

PATIENCE = 10.0  # seconds without an answer or a byte after which a host counts as unreachable
PAUSE = 0.5  # seconds before the second try, about; doubled before each further one
TRIES = 8  # for a shard: a host may be away for a minute
FIRST_TRIES = 3  # for the manifest: an address that is wrong must not take a minute to say so

READ_TRIES = 3  # of a local file that the system will not read: a network file system may be back in a second
READ_PAUSE = 0.25  # seconds before the second of them
LARGEST = 1 << 28  # bytes of a small file: the manifest of a million shards has fewer

# Answers and errors that trying again mends. HTTP: too slow, too early, too many requests.
_PASSING = (408, 425, 429)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def is_remote(path: str | Path) -> bool:
    """Whether a data set is given by URL; a `Path` is never one."""
    return isinstance(path, str) and "://" in path


@contextmanager
def opened(base: str, name: str) -> Iterator[IO[bytes]]:
    """One file of a remote data set as a stream.

    Args:
        base: `http://...`, or anything fsspec opens.
        name: of the file.

    Raises:
        VugenError: fsspec is not installed.
        Exception: it is not there or cannot be had; as many kinds as fsspec has file systems.
    """
    address = f"{base.rstrip('/')}/{name}"
    if base.startswith(("http://", "https://")):
        with urlopen(address, timeout=PATIENCE) as file:
            yield file
        return
    try:
        import fsspec
    except ImportError as error:
        raise VugenError(f"{base} needs fsspec: pip install 'vugen-cli[remote]'") from error
    with fsspec.open(address, "rb") as file:
        yield file


def patiently(what: str, get: Callable[[], T], tries: int) -> T:
    """What `get` returns, called again after a growing, random pause where its error may pass.

    Raises:
        VugenError: `what` cannot be got.
        OSError: the local disk is full or cannot be written.
    """
    for left in reversed(range(tries)):
        try:
            return get()
        except VugenError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            if not left or not _may_pass(error):
                reason = " ".join(str(error).split()) or type(error).__name__
                raise VugenError(f"cannot get {what}: {reason}") from error
        wait_again(PAUSE, tries - left - 1)
    raise AssertionError("unreachable")


def wait_again(first: float, before: int) -> None:
    """Pause before another try: about `first` seconds, doubled for each pause before.

    Random, so that the readers of a job do not come back all at once; not from a seeded generator.
    """
    time.sleep(first * 2**before * random.SystemRandom().uniform(0.5, 1.5))


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code in _PASSING
    return not isinstance(error, _FINAL)


def fetched_bytes(base: str, name: str) -> bytes:
    """A small file of a remote data set.

    Raises:
        VugenError: it cannot be had, or is no small file.
    """

    def get() -> bytes:
        with opened(base, name) as file:
            data = file.read(LARGEST)
            if len(data) == LARGEST:
                raise VugenError(f"{name} of {base} is longer than {LARGEST >> 20} MiB: it is no data set")
            data += file.read()  # nothing more; of a connection that broke off this tells
            if not data:
                raise ConnectionError("not one byte came")
            return data

    return patiently(f"{name} of {base}", get, FIRST_TRIES)


# --- the cache of shards


def shard_cache() -> Path:
    """Where copies of shards are kept."""
    return user_cache() / "shards"


def cached_path(shard: "Shard", folder: Path) -> Path:
    """Where the copy of a shard is, or will be."""
    return folder / f"{shard.sha256}.tar"


def open_shard(base: str, shard: "Shard", folder: Path) -> IO[bytes]:
    """The local copy of a shard, opened; fetched if there is none.

    Args:
        base: as for `opened`.
        shard: as `dataset.json` has it.
        folder: of the copies.

    Raises:
        VugenError: it cannot be had; the bytes are not those that `dataset.json` notes; the disk is full.
    """
    path = cached_path(shard, folder)
    for _ in range(3):  # another process may need the room before this one has opened it
        with contextlib.suppress(FileNotFoundError):
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
            with contextlib.suppress(OSError):  # a cache that cannot be written
                os.utime(file.fileno())  # read just now: the last to go
            return file
        fetch(base, shard, folder)
    raise VugenError(f"{folder} has no room for the shards being read: give it more ($VUGEN_CACHE_GB)")


def fetch(base: str, shard: "Shard", folder: Path, wait: bool = True) -> None:
    """Copy a shard into the cache, unless it is there; of several processes one does, the others wait.

    Args:
        base, shard, folder: as for `open_shard`.
        wait: for a process that is at it; otherwise leave it to that one.

    Raises:
        VugenError: as `open_shard`.
    """
    path = cached_path(shard, folder)
    with _lock(folder, f"lock-{shard.sha256[:2]}", wait) as held:
        if held is False or path.is_file():
            return
        # Of a process that was killed; without a lock it may be of one that is at it.
        for leftover in folder.glob(f".{path.name}.*") if held else ():
            leftover.unlink(missing_ok=True)
        make_room(folder, shard.bytes)
        with whole_file(path) as temporary:
            patiently(f"{shard.name} of {base}", lambda: _copy(base, shard, temporary), TRIES)


def _copy(base: str, shard: "Shard", target: Path) -> None:
    digest = _download(base, shard, target)
    if digest != shard.sha256:  # once more: a byte that was damaged on the way must not end a run of days
        digest = _download(base, shard, target)
    if digest != shard.sha256:
        raise VugenError(
            f"{shard.name} of {base} is not what its dataset.json notes (SHA-256 {digest[:12]}, "
            f"not {shard.sha256[:12]}): it was changed there, or is damaged on the way each time"
        )


def _download(base: str, shard: "Shard", target: Path) -> str:
    """Copy as many bytes as a shard has; their SHA-256."""
    digest, length = hashlib.sha256(), 0
    with opened(base, shard.name) as source, open(target, "wb") as file:
        while chunk := source.read(1 << 20):
            file.write(chunk)
            digest.update(chunk)
            length += len(chunk)
            if length > shard.bytes:
                raise VugenError(
                    f"{shard.name} of {base} is longer than the {shard.bytes} bytes that its dataset.json "
                    "notes: it was changed there"
                )
    if length < shard.bytes:
        raise ConnectionError(f"cut short at {length} of {shard.bytes} bytes")
    return digest.hexdigest()


@contextmanager
def _lock(folder: Path, name: str, wait: bool = True) -> Iterator[bool | None]:
    """Hold a lock file of the cache; False where `wait` is not wished and another process holds it, None on a
    file system without locks (some NFS): then two may fetch the same shard, each under a name of its own.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise VugenError(
            f"cannot write to {folder}: {error.strerror}; set $VUGEN_CACHE to another folder"
        ) from error
    with file:
        held: bool | None = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:
            held = None
        yield held


def _spare(total: int) -> float:
    """Bytes that stay free of a disk of `total` bytes: of a large one more would empty the cache in vain."""
    return min(total / 20, 20e9)


def make_room(folder: Path, need: int) -> None:
    """Delete the copies that were not read for longest, until `need` more bytes stay within the limit.

    A copy that a process has open stays readable there until it closes it.

    Raises:
        VugenError: $VUGEN_CACHE_GB is no number.
    """
    disk = shutil.disk_usage(folder)
    if not os.environ.get("VUGEN_CACHE_GB") and disk.free - need >= _spare(disk.total):
        return  # without a look at each of perhaps a hundred thousand copies
    with _lock(folder, "lock-room"):
        found = []
        for path in folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # one that was being fetched has its name now
                found.append((path.stat().st_mtime, path.stat().st_size, path.name))
        used = sum(size for _, size, _ in found)
        excess = used + need - _limit(folder, used)
        for _, size, name in sorted(found):
            if excess <= 0:
                return
            if not name.startswith("."):  # one that is being fetched
                (folder / name).unlink(missing_ok=True)
                (folder / name).with_suffix(".index.npy").unlink(missing_ok=True)
                excess -= size


def _limit(folder: Path, used: int) -> float:
    """Bytes that the copies may take together."""
    given = os.environ.get("VUGEN_CACHE_GB")
    if not given:
        disk = shutil.disk_usage(folder)
        return used + disk.free - _spare(disk.total)
    try:
        return float(given) * 1e9
    except ValueError:
        raise VugenError(f"VUGEN_CACHE_GB={given} is no number of gigabytes") from None


class Prefetch:
    """Calls `get` with numbers that it is given, one after the other, in a thread of its own.

    Errors are passed over: whoever needs the thing will meet them.
    """

    def __init__(self, get: Callable[[int], None]):
        self.get = get
        self.waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def __call__(self, numbers: list[int]) -> None:
        for number in numbers:
            self.waiting.put(number)
        if self.thread is None:  # a daemon: the process may end while it waits for a host
            self.thread = threading.Thread(target=self._work, daemon=True)
            self.thread.start()

    def _work(self) -> None:
        while True:
            with contextlib.suppress(Exception):
                self.get(self.waiting.get())
