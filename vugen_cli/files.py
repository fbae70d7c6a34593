"""Writing files whole or not at all, reading lines of JSON, and where the package keeps its own."""

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vugen_cli.errors import VugenError, first_line


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it is flushed to disk and renamed to `path`.

    On any exception the temporary file is removed and `path` stays as it was. Where `path` is a link, it
    stays one, and what it leads to is replaced.

    Raises:
        VugenError: the folder cannot be written, the disk is full, or `path` is a device.
    """
    given, path = path, Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise VugenError(f"cannot write {given}: it is {'a folder' if path.is_dir() else 'no plain file'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise VugenError(f"cannot write {given}: {error.strerror or error}") from error
    temporary = Path(name)
    try:
        yield temporary
        _settle(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise VugenError(f"cannot write {given}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _settle(file: Path) -> None:
    """Flush a file to disk, with the mode that `open` gives: temporaries and safetensors' own have 0600."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
    with open(file, "rb") as written:
        os.fsync(written.fileno())


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """As `whole_file`, of a folder: what stood at `path` is replaced as a whole, or stays as it was.

    Where `path` is a link, it stays one, and what it leads to is replaced.

    Raises:
        VugenError: the folder cannot be written or the disk is full.
    """
    path = Path(path).resolve()
    temporary, earlier = (path.with_name(f".{path.name}.{what}") for what in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _settle(file)
        shutil.rmtree(earlier, ignore_errors=True)
        if path.exists():
            path.rename(earlier)
        try:
            temporary.rename(path)
        except OSError:
            if earlier.exists():
                earlier.rename(path)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    except OSError as error:
        raise VugenError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_foreign(path: Path, run: Path) -> None:
    """Training that ends in a folder replaces what stood there: only its own earlier result, never more.

    Args:
        path: the folder that will be written.
        run: the folder of its run; while that is there, `path` is what the run wrote.

    Raises:
        VugenError: something else is at `path`.
    """
    if path.exists() and not run.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise VugenError(f"{path} is there already and no run here wrote it: choose another --out")


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Make a folder and hold it against other processes; the lock goes with the process, however that ends.

    Args:
        folder: to hold.
        busy: what to say where another process holds it.

    Raises:
        VugenError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise VugenError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VugenError(busy) from None
        except OSError:
            pass  # a file system without locks (some NFS): renames still keep every file whole
        _held.add(handle)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether a process holds a folder by `locked`.

    To find out, it is held for some microseconds; on a file system without locks nothing holds anything.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


_held: set[int] = set()


def _let_go() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


# A loader's forked workers may outlive a killed run by seconds: they must not hold its lock.
os.register_at_fork(after_in_child=_let_go)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the object on each non-empty line of a JSON-lines file.

    Raises:
        VugenError: the file cannot be read or a line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise VugenError(f"{path} line {number} is no JSON object: expected one a line.")
                yield row
    except (OSError, ValueError) as error:
        raise VugenError(f"{path} cannot be read as JSON lines: {first_line(error)}.") from error


def user_cache() -> Path:
    """The folder for what can be had again: $VUGEN_CACHE, or `vugen` in the platform's folder for caches."""
    if folder := os.environ.get("VUGEN_CACHE"):
        return Path(folder)
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "vugen"


def bundle(name: str) -> Path:
    """Where a part of the bundled nano line lies in the installed package: `vlm`, `sampler.safetensors`."""
    return Path(__file__).parent / "bundles" / "nano" / name


def is_bundled(path: str | Path) -> bool:
    """Whether this is the bundled sampler, however its path is written."""
    return Path(path).resolve() == bundle("sampler.safetensors").resolve()
