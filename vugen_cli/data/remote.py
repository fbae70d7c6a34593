"""Prepared data sets that lie elsewhere: shards are fetched whole, verified, and read from a local cache.

The cache is `shards` in the user's cache folder ($VUGEN_CACHE); a shard's name there is its SHA-256, so that
no two data sets can be confused. Nothing is ever deleted from it.
"""

import fcntl
import hashlib
import io
import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.request import urlopen

from vugen_cli.errors import VugenError
from vugen_cli.files import user_cache, whole_file

PATIENCE = 10.0  # seconds without an answer or a byte after which a host counts as unreachable
PIPE = "pipe:"
PIPE_PATIENCE = 60.0  # seconds without a byte after which a command is given up: it may have to log in first


def is_remote(path: str | Path) -> bool:
    """Whether a data set is given by URL or by a `pipe:` command; a `Path` is never one."""
    return isinstance(path, str) and (path.startswith(PIPE) or "://" in path)


@contextmanager
def opened(base: str, name: str) -> Iterator[IO[bytes]]:
    """One file of a remote data set as a stream.

    Args:
        base: `http://...`, anything fsspec opens, or `pipe:COMMAND`, whose `{}` is replaced by `name` and
            whose output is the file. It is run without a shell.
        name: of the file.

    Raises:
        VugenError: it is not there or cannot be had.
    """
    try:
        if base.startswith(PIPE):
            words = [word.replace("{}", name) for word in shlex.split(base.removeprefix(PIPE))]
            with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
                assert process.stdout
                try:
                    yield io.BufferedReader(_Patient(process.stdout.fileno()))
                except BaseException:
                    process.kill()
                    raise
            if process.returncode:
                raise OSError(f"the command ended with {process.returncode}")
        elif base.startswith(("http://", "https://")):
            with urlopen(f"{base.rstrip('/')}/{name}", timeout=PATIENCE) as file:
                yield file
        else:
            try:
                import fsspec
            except ImportError as error:
                raise VugenError(f"{base} needs fsspec: pip install 'vugen-cli[remote]'") from error
            with fsspec.open(f"{base.rstrip('/')}/{name}", "rb") as file:
                yield file
    except VugenError:
        raise
    except Exception as error:  # as many kinds as fsspec has file systems
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VugenError(f"cannot get {name} of {base}: {reason}") from error


class _Patient(io.RawIOBase):
    """Reads a command's output, for as long as there comes some."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not select.select([self.descriptor], [], [], PIPE_PATIENCE)[0]:
            raise TimeoutError(f"the command wrote nothing for {PIPE_PATIENCE:.0f} seconds")
        return os.readv(self.descriptor, [buffer])


def shard_cache() -> Path:
    """Where copies of shards are kept."""
    return user_cache() / "shards"


def fetched(base: str, shard: dict[str, Any], folder: Path | None = None) -> Path:
    """The local copy of a shard, fetched if there is none; of several processes one fetches, the others wait.

    Args:
        base: as for `opened`.
        shard: its `name` and `sha256` in `dataset.json`.
        folder: of the copies; default: `shard_cache` of this process.

    Raises:
        VugenError: as `opened`; the bytes are not those that `dataset.json` notes; the disk is full.
    """
    digest = str(shard["sha256"])
    if len(digest) != 64 or not digest.isalnum():
        raise VugenError(f"dataset.json of {base} has no SHA-256 of {shard['name']}")
    folder = folder or shard_cache()
    path = folder / f"{digest}.tar"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return path
        with whole_file(path) as temporary:
            with opened(base, shard["name"]) as source, open(temporary, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            with open(temporary, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != digest:
                raise VugenError(
                    f"{shard['name']} of {base} is not what its dataset.json notes (SHA-256 {found[:12]}, "
                    f"not {digest[:12]}): it was damaged on the way or changed there"
                )
    return path
