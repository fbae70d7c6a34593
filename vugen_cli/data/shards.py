"""Tars read in place: listing members by their headers, and existing webdataset shards as a source."""

import multiprocessing
import os
import tarfile
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from vugen_cli.data.folder import IMAGE_SUFFIXES, files_of_split, split_folder
from vugen_cli.data.sample import Meta, Sample, decoded, facts_of, hash_of, texts_of
from vugen_cli.errors import VugenError
from vugen_cli.files import user_cache, whole_file
from vugen_cli.processes import barrier, local_world_size, rank, world_size

_CAPTION_KEYS = ("caption", "captions", "text")


def tar_members(
    path: str | Path, inside: tuple[str, int, int] | None = None
) -> Iterator[tuple[str, int, int]]:
    """List the files of a tar by its headers: `(name, offset, size)`, the offset counted from the start of
    `path`.

    Args:
        path: an uncompressed tar.
        inside: list the tar that is this member of `path` instead.

    Raises:
        VugenError: not a tar, compressed, or cut short.
    """
    path = Path(path)
    what = f"{path}" if inside is None else f"{inside[0]} in {path}"
    try:
        with open(path, "rb") as file:
            start, length = (0, os.fstat(file.fileno()).st_size) if inside is None else inside[1:]
            if inside is not None and start + length > os.fstat(file.fileno()).st_size:
                raise VugenError(f"{path} is cut short within {inside[0]}: download or copy it again")
            view: IO[bytes] = file
            if inside is not None:
                view = _Window(file, start, length)  # type: ignore[assignment]
            with tarfile.open(fileobj=view, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # tarfile remembers every header, which for a million is a gigabyte.
                    tar.members = []  # type: ignore[attr-defined]
                    if not member.isreg():
                        continue
                    if member.offset_data + member.size > length:
                        raise VugenError(
                            f"{what} is cut short within {member.name}: download or copy it again"
                        )
                    yield member.name, start + member.offset_data, member.size
                # tarfile takes a damaged or missing header for the end; the true end is marked by zeros.
                view.seek(tar.offset)
                if view.read(512) != bytes(512):
                    raise VugenError(f"{what} is cut short or damaged: download or copy it again")
    except FileNotFoundError:
        raise VugenError(f"there is no {path}: check --source") from None
    except tarfile.TarError as error:
        raise VugenError(
            f"{what} is not a whole, uncompressed tar ({error}): download or copy it again, or unpack it "
            f"if it is compressed"
        ) from error
    except OSError as error:
        raise VugenError(f"cannot read {what}: {error.strerror or error}") from error


class _Window:
    """A stretch of a file as a file of its own; just what tarfile needs to read a tar within a tar."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def read(self, count: int = -1) -> bytes:
        left = max(self.length - self.at, 0)
        self.file.seek(self.start + self.at)
        data = self.file.read(left if count < 0 else min(count, left))
        self.at += len(data)
        return data


def read_at(path: str | Path, offset: int, size: int) -> bytes:
    """Read `size` bytes of a file from `offset`.

    Raises:
        OSError: the file cannot be read or is shorter.
    """
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
        while len(data) < size and (more := os.pread(file.fileno(), size - len(data), offset + len(data))):
            data += more
    if len(data) < size:
        raise OSError(f"{path} is cut short")
    return data


class WebDatasetShards:
    """A folder of webdataset shards, such as img2dataset writes, as a source.

    Neighbouring members with the same name up to the first dot make a sample: one image, and captions from
    `.txt` (a caption a line) or else from `caption`, `captions` or `text` in `.json`. What else the `.json`
    holds is kept. A sample without an image (img2dataset leaves some where a download failed) is skipped and
    counted by the writer.

    Args:
        path: the folder of `.tar` files, or one of them.
        split: with `train/` and `val/` folders, or shards with such names, which of them; see
            `files_of_split`.

    Raises:
        VugenError: no shards, a shard that is damaged, or none of them holds images with captions.
    """

    name = "webdataset"
    licence = "that of the source"
    classes: Sequence[str] = ()

    def __init__(self, path: str | Path, split: str = "train"):
        path = Path(path)
        self.origin = str(path)
        self.shards = shards_of(path, split)
        list_shards(self.shards)
        counts, usable = [], False
        for shard in self.shards:
            rows, _ = _listing(shard)
            counts.append(len(rows))
            usable = usable or bool(((rows[:, 0] >= 0) & (rows[:, 2:].max(1, initial=-1) >= 0)).any())
        self.ends = np.cumsum(counts)
        if not usable:
            found = [name for name, *_ in islice(tar_members(self.shards[0]), 5)]
            raise VugenError(
                f"{path} holds no webdataset samples (an image with a .txt or .json of the same name); found "
                f"{', '.join(found) or 'nothing'} in {self.shards[0].name}"
            )
        self.fingerprint = hash_of([(shard.name, shard.stat().st_size) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Sample:
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[number]
        rows, keys = _listing(shard)
        row = index - (int(self.ends[number - 1]) if number else 0)
        places = rows[row].tolist()
        key = f"{shard.name}/{keys[row].decode('utf-8', 'replace')}"
        if places[0] < 0:
            raise OSError(0, "no image in the sample", key)
        meta: Meta = {}
        captions: list[str] = []
        if places[2] >= 0:
            captions = decoded(read_at(shard, *places[2:4]), key).splitlines()
        try:
            if places[4] >= 0:
                meta = facts_of(read_at(shard, *places[4:6]))
            for name in _CAPTION_KEYS:
                value = meta.pop(name, None)
                if not captions and value:
                    captions = texts_of(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise OSError(0, f"damaged .json: {error}", key) from error
        return Sample(key=key, image=read_at(shard, *places[0:2]), captions=captions, meta=meta)


def shards_of(path: Path, split: str) -> list[Path]:
    """The shards of a split: a `.tar`, or those of a folder.

    Args:
        path: the folder, or one of them.
        split: with `train/` and `val/` folders, or shards with such names, which of them.

    Raises:
        VugenError: there are none.
    """
    if not path.exists():
        raise VugenError(f"there is no {path}: point --source at a folder of webdataset shards (.tar)")
    if not path.is_dir():
        return [path]
    folder = split_folder(path, split)
    shards = sorted(folder.glob("[!.]*.tar"))  # not what is hidden: macOS's ._x.tar, a shard half written
    shards = files_of_split(shards, split)
    if not shards:
        raise VugenError(
            f"{folder} holds no .tar shards of the {split} split: point --source at a folder of them"
        )
    return shards


# --- listings: read once, kept in the user's cache, and never all in memory


def listing_path(shard: Path) -> Path:
    """Where the listing of a foreign shard is kept; a shard that changes gets another."""
    try:
        facts = shard.stat()
    except OSError as error:
        raise VugenError(f"cannot read {shard}: {error.strerror or error}: check --source") from error
    name = hash_of(["plain endings first", str(shard.resolve()), facts.st_size, facts.st_mtime_ns])
    return user_cache() / "listings" / name[:2] / f"{name}.npz"


def list_shards(shards: list[Path]) -> None:
    """List those shards that no listing is kept of; the processes of a job, and workers, share the work.

    Raises:
        VugenError: a shard is damaged, or the cache cannot be written.
    """
    for mine in (shards[rank() :: world_size()], shards):  # then what others have not left here
        todo = [shard for shard in mine if not listing_path(shard).is_file()]
        workers = min(cores(), len(todo) // 64)
        if workers > 1:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
                deque(pool.map(_list_shard, todo, chunksize=4), maxlen=0)
        else:
            for shard in todo:
                _list_shard(shard)
        barrier("listed")


@lru_cache(maxsize=32)
def _listing(shard: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of each sample offset and size of image, `.txt` and `.json` (-1: none), int64 [samples, 6]; its key."""
    try:
        with np.load(listing_path(shard), allow_pickle=False) as stored:
            return stored["rows"], stored["keys"]
    except Exception:  # emptied in the meantime, or damaged: numpy raises nearly anything
        _list_shard(shard)
    with np.load(listing_path(shard), allow_pickle=False) as stored:
        return stored["rows"], stored["keys"]


def samples_of(shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """The samples of a shard: key, and offset and size of each member by what follows the key.

    Neighbouring members of one name up to the first dot are a sample; an ending that comes again begins
    another one.
    """
    key, parts = "", dict[str, tuple[int, int]]()
    for name, offset, size in tar_members(shard):
        folder, _, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        if not stem:
            continue
        sample, kind = f"{folder}/{stem}".removeprefix("./").removeprefix("/"), kind.lower()
        if sample != key or kind in parts:
            if parts:
                yield key, parts
            key, parts = sample, {}
        parts[kind] = offset, size
    if parts:
        yield key, parts


def _list_shard(shard: Path) -> None:
    """Keep a listing of a shard."""
    rows, keys = array("q"), []
    for key, parts in samples_of(shard):
        keys.append(key.encode("utf-8", "replace"))
        for endings in (IMAGE_SUFFIXES, (".txt",), (".json",)):
            found = [kind for kind in parts if f".{kind.rpartition('.')[2]}" in endings]
            plain = [kind for kind in found if "." not in kind]  # beside `jpg`, `depth.png` is another's
            if len(found) > 1 and not plain and endings is IMAGE_SUFFIXES:
                raise VugenError(
                    f"{shard}: the sample {key} has several pictures ({', '.join(found[:3])}), since a key "
                    "ends at the first dot: rename them to KEY.jpg, without other dots"
                )
            rows.extend(parts[kind] if (kind := next(iter(plain or found), "")) else (-1, -1))
    with whole_file(listing_path(shard)) as temporary, open(temporary, "wb") as file:
        np.savez(
            file, rows=np.array(rows, dtype=np.int64).reshape(-1, 6), keys=np.array(keys, dtype=np.bytes_)
        )


def cores() -> int:
    """Cores for this process: of those that it may use, its share beside the job's others on this host."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // local_world_size())
