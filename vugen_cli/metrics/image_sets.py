"""Sets of images to score: folders, shards, tars, zips and npz batches, each read as one stream of arrays.

Nothing is unpacked to disk, nothing is unpickled and no name read from a file leads out of its folder. An
image that cannot be decoded is left out of the stream, named and counted; a container that cannot be read
ends the run, since a score over part of a reference would look like a score.
"""

import itertools
import json
import os
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vugen_cli.errors import VugenError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_FILE_BYTES = 256 << 20  # one encoded image; a zip member may claim to unpack to anything
MAX_PIXELS = 178_956_970  # one image of an npz batch; Pillow's own limit before it calls an image a bomb

# An image not yet read: its name, and how to get it as uint8 [3, H, W]. The call runs in a worker thread.
_Item = tuple[str, Callable[[], np.ndarray]]


@dataclass
class ImageSet:
    """Images at one path, read by iterating over them; `open_images` makes one.

    Attributes:
        path: where the images are, as it was given.
        kind: "folder", "samples", "shards", "tar", "zip" or "npz".
        total: how many images there are, None where only reading would tell; capped by `limit`.
        limit: stop after this many good images; None reads all.
        split: the split of a prepared data set, None for other kinds.
        count: good images read so far, by the iteration now running or the last one.
        bad: "name: reason" of each image left out so far.
    """

    path: Path
    kind: str
    total: int | None
    limit: int | None
    items: Callable[[], Iterator[_Item]] = field(repr=False)
    split: str | None = None
    count: int = 0
    bad: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each image as uint8 RGB [3, H, W], in the set's order, decoded ahead of need in threads.

        Raises:
            VugenError: a tar, zip or npz is truncated or not what its name says.
        """
        self.count, self.bad = 0, []
        if self.limit == 0:
            return
        workers = min(8, os.cpu_count() or 1)
        items = self.items()
        waiting: deque[tuple[str, Future[np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            while True:
                for name, read in itertools.islice(items, 4 * workers - len(waiting)):
                    waiting.append((name, pool.submit(read)))
                if not waiting:
                    return
                name, future = waiting.popleft()
                try:
                    image = future.result()
                # zlib.error: a damaged stream inside an image, which Pillow lets through.
                except (ValueError, OSError, SyntaxError, zlib.error) as error:
                    self.bad.append(f"{name}: {_one_line(error)}")
                    continue
                self.count += 1
                yield image
                if self.count == self.limit:
                    return
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def describe(self) -> dict[str, Any]:
        """What was read, as a record: path, kind, split if it has one, count of good images, bad ones."""
        record = {"path": str(self.path), "kind": self.kind, "count": self.count, "bad": list(self.bad)}
        return record if self.split is None else {**record, "split": self.split}


def open_images(path: Path, limit: int | None = None, split: str | None = None) -> ImageSet:
    """Find out what kind of image set `path` is; reads no image yet.

    Args:
        path: one of
            a folder with a `dataset.json` as `vugen prepare` writes (its `val` split, else `train`),
            a folder with a `samples.jsonl` as `vugen sample` writes (only the files it lists under "file"),
            a folder of tars, or a folder of images (read recursively: png, jpg, jpeg, webp, bmp),
            a `.tar`, a `.zip`, or an `.npz` with "arr_0" uint8 [N, H, W, 3] as guided-diffusion (ADM) writes.
        limit: read at most this many images.
        split: the split of a prepared data set, instead of `val`, else `train`.

    Raises:
        VugenError: there is nothing at `path`, it is none of these, or it is empty or malformed.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise VugenError(f"the number of images must be at least 1, got {limit}.")
    kind, total, items, found_split = _recognise(path, split)
    if total == 0:
        raise VugenError(f"no image in {path}: expected {_suffixes()} files, shards, a zip or an npz batch.")
    if total is not None and limit is not None:
        total = min(total, limit)
    return ImageSet(path, kind, total, limit, items, found_split)


def batches(images: ImageSet, batch_size: int) -> Iterator[np.ndarray]:
    """Yield the set as uint8 [B, 3, H, W], B at most `batch_size`; images are grouped by size, so order may
    change.

    At most `4 * batch_size` images wait for others of their size; when more would, the largest group goes out
    short.
    """
    waiting: dict[tuple[int, ...], list[np.ndarray]] = {}
    for image in images:
        group = waiting.setdefault(image.shape, [])
        group.append(image)
        if len(group) < batch_size:
            if sum(map(len, waiting.values())) < 4 * batch_size:
                continue
            group = max(waiting.values(), key=len)
        yield np.stack(waiting.pop(group[0].shape))
    for group in waiting.values():
        yield np.stack(group)


def npz_names(path: Path) -> set[str]:
    """The names of the arrays in an `.npz`, read from its directory alone.

    Raises:
        VugenError: the file is not an npz.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise VugenError(f"{path} is not a readable .npz: {_one_line(error)}.") from error


def _recognise(
    path: Path, split: str | None
) -> tuple[str, int | None, Callable[[], Iterator[_Item]], str | None]:
    if path.is_dir():
        if (path / "dataset.json").is_file():
            shards, total, found = _manifest_shards(path, split)
            return "shards", total, lambda: _tar_items(shards), found
        if (path / "samples.jsonl").is_file():
            files = _sample_files(path)
            return "samples", len(files), lambda: _file_items(path, files), None
        files = _image_files(path)
        tars = sorted(path.glob("*.tar"))
        if tars and not any(file.parent == path for file in files):
            return "tar", None, lambda: _tar_items(tars), None
        return "folder", len(files), lambda: _file_items(path, files), None
    if not path.is_file():
        raise VugenError(f"no images at {path}: there is no such file or folder.")
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return "tar", None, lambda: _tar_items([path]), None
    if suffix == ".zip":
        return "zip", _zip_count(path), lambda: _zip_items(path), None
    if suffix == ".npz":
        return "npz", _npz_count(path), lambda: _npz_items(path), None
    raise VugenError(f"{path} is no image set: expected a folder, a .tar, a .zip or an .npz batch.")


def _manifest_shards(directory: Path, split: str | None) -> tuple[list[Path], int, str]:
    """The shards of one split of a prepared data set, how many samples they hold, and the split's name."""
    manifest = directory / "dataset.json"
    try:
        splits = json.loads(manifest.read_text(encoding="utf-8"))["splits"]
        if split is None:
            split = "val" if splits.get("val", {}).get("shards") else "train"
        if split not in splits:
            raise VugenError(f"{directory} has no split '{split}': it has {', '.join(splits) or 'none'}.")
        shards = [(str(shard["name"]), int(shard["samples"])) for shard in splits[split]["shards"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VugenError(f"{manifest} is not a manifest that `vugen prepare` writes: {error!r}.") from error
    for name, _ in shards:
        if PurePosixPath(name).name != name or "\\" in name:
            raise VugenError(f"{manifest} names the shard '{name}', which is outside its folder.")
        if not (directory / name).is_file():
            raise VugenError(
                f"{directory / name} is missing: prepare {directory} again, or score another set."
            )
    return [directory / name for name, _ in shards], sum(samples for _, samples in shards), split


def _sample_files(directory: Path) -> list[Path]:
    """The files that `samples.jsonl` lists, each once: what else a folder holds (a grid) is no sample."""
    listing = directory / "samples.jsonl"
    names: dict[str, None] = {}
    for number, row in enumerate(read_jsonl(listing), start=1):
        name = row.get("file")
        if not isinstance(name, str):
            raise VugenError(f'{listing} line {number} has no "file": it is not what `vugen sample` writes.')
        if not (directory / name).resolve().is_relative_to(directory.resolve()):
            raise VugenError(f"{listing} line {number} names '{name}', which is outside its folder.")
        names[name] = None
    return [directory / name for name in names]


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the object on each non-empty line of a JSON-lines file.

    Raises:
        VugenError: the file cannot be read or a line is no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise VugenError(f"{path} line {number} is no JSON object: expected one a line.")
                yield row
    except (OSError, ValueError) as error:
        raise VugenError(f"{path} cannot be read as JSON lines: {_one_line(error)}.") from error


def _image_files(directory: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files += [Path(folder, name) for name in sorted(names) if _is_image(name)]
    return files


def _is_image(name: str) -> bool:
    """Whether a file or archive member is an image by its name; macOS's `._x.png` and `__MACOSX/` are not."""
    pure = PurePosixPath(name)
    hidden = pure.name.startswith(".") or pure.parts[:1] == ("__MACOSX",)
    return pure.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _file_items(directory: Path, files: list[Path]) -> Iterator[_Item]:
    def reader(file: Path) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            _check_size(file.stat().st_size)
            return _decode(file.read_bytes())

        return read

    for file in files:
        yield str(file.relative_to(directory)), reader(file)


def _tar_items(shards: list[Path]) -> Iterator[_Item]:
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if member.isfile() and _is_image(member.name):
                        name = f"{shard.name}/{member.name}"
                        yield name, _decoder(_read_member(archive, member))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise VugenError(
                f"{shard} is truncated or not a tar ({_one_line(error)}): write it again."
            ) from error


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | ValueError:
    """The member's bytes, or the error that makes only this image bad; `tarfile.ReadError` if cut short."""
    if member.size > MAX_FILE_BYTES:
        return ValueError(f"{member.size} bytes is too large for an image")
    stream = archive.extractfile(member)
    assert stream is not None  # the caller checked that it is a regular file
    data = stream.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _zip_count(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(_is_image(name) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise VugenError(f"{path} is truncated or not a zip: {_one_line(error)}.") from error


def _zip_items(path: Path) -> Iterator[_Item]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not _is_image(info.filename):
                continue
            data: bytes | Exception
            try:
                _check_size(info.file_size)
                data = archive.read(info)
            # RuntimeError: an encrypted member. NotImplementedError: a compression that Python lacks.
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
                data = ValueError(_one_line(error))
            yield info.filename, _decoder(data)


def _npz_header(path: Path) -> tuple[int, int, int]:
    """(N, H, W) of the batch; refuses what is not uint8 [N, H, W, 3] in C order."""
    names = npz_names(path)
    if "arr_0" not in names:
        held = ", ".join(sorted(names)) or "nothing"
        raise VugenError(f'{path} is no image batch: expected "arr_0" uint8 [N, H, W, 3], found {held}.')
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
            shape, fortran, dtype = _read_npy_header(stream)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        raise VugenError(f'{path} has no readable "arr_0": {_one_line(error)}.') from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape[1:]:
        raise VugenError(
            f'"arr_0" of {path} is {dtype} {list(shape)}: expected uint8 [N, H, W, 3], rows contiguous.'
        )
    if shape[1] * shape[2] > MAX_PIXELS:
        raise VugenError(f"{path} holds images of {shape[2]}x{shape[1]} pixels: too large to score.")
    return shape[0], shape[1], shape[2]


def _read_npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _npz_count(path: Path) -> int:
    return _npz_header(path)[0]


def _npz_items(path: Path) -> Iterator[_Item]:
    """Rows are read one by one: `np.load` would hold the whole batch, 10 GB for 50,000 images of 256 px."""
    n, height, width = _npz_header(path)
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        _read_npy_header(stream)
        for index in range(n):
            try:
                row = stream.read(height * width * 3)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
                raise VugenError(f"{path} is damaged at image {index}: {_one_line(error)}.") from error
            if len(row) != height * width * 3:
                raise VugenError(f"{path} ends at image {index} of {n}: it is truncated.")
            yield f"arr_0[{index}]", _unpacker(row, height, width)


def _unpacker(row: bytes, height: int, width: int) -> Callable[[], np.ndarray]:
    return lambda: np.ascontiguousarray(
        np.frombuffer(row, np.uint8).reshape(height, width, 3).transpose(2, 0, 1)
    )


def _decoder(data: bytes | Exception) -> Callable[[], np.ndarray]:
    def decode() -> np.ndarray:
        if isinstance(data, Exception):
            raise data
        return _decode(data)

    return decode


def _decode(data: bytes) -> np.ndarray:
    """Encoded image -> uint8 [3, H, W]; ValueError or OSError for what is no image or too large a one."""
    from vugen_cli.data.images import load_image

    return np.ascontiguousarray(np.asarray(load_image(data), dtype=np.uint8).transpose(2, 0, 1))


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes is too large for an image")


def _suffixes() -> str:
    return ", ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
