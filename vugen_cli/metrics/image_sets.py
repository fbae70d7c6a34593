"""Sets of images to score: folders, shards, tars, zips and npz batches, each read as one stream of arrays.

Nothing is unpacked to disk, nothing is unpickled and no name read from a file leads out of its folder. An
image that cannot be decoded is left out of the stream, named and counted; a container that cannot be read
ends the run, since a score over part of a reference would look like a score.
"""

import hashlib
import itertools
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from vugen_cli.data.folder import IMAGE_SUFFIXES, image_paths
from vugen_cli.data.images import MAX_PIXELS, adm_crop, decode
from vugen_cli.data.index import is_source
from vugen_cli.data.loader import ShardedImages
from vugen_cli.data.manifest import read_manifest
from vugen_cli.data.shards import read_at, tar_members
from vugen_cli.errors import VugenError, first_line
from vugen_cli.metrics.mjhq import META
from vugen_cli.metrics.report import SetRecord
from vugen_cli.metrics.samples import UNFINISHED, DrawnImage, read_samples
from vugen_cli.processes import all_gather, rank, world_size
from vugen_cli.progress import progress_bar

MAX_FILE_BYTES = 256 << 20  # one encoded image; a zip member may claim to unpack to anything

# An image not yet read: its name, and how to get its bytes. The call runs in a worker thread.
_Item = tuple[str, Callable[[], bytes]]

# An image that was read: its index, name and pixels (uint8 [3, H, W]), None if it is bad.
Read = tuple[int, str, np.ndarray | None]

# What reading or decoding one damaged image raises; zlib.error: a damaged stream inside it.
_BAD = (ValueError, OSError, SyntaxError, zlib.error)


@dataclass
class ImageSet:
    """Images at one path, read by iterating over them; `open_image_set` makes one.

    Attributes:
        path: where the images are, as it was given.
        kind: "folder", "samples", "geneval", "mjhq", "shards", "tar", "zip", "npz", or "statistics" without
            images.
        total: how many images there are, readable or not; None where only reading would tell.
        limit: read this many images from the start, bad ones included; None reads all.
        split: the split of a prepared data set, None for other kinds.
        shape: (H, W) where the images are rows of an array and not encoded files.
        tars: the files that a set of kind "tar" or "shards" lies in.
        samples: what `vugen sample` says of each of its pictures, in a folder that it wrote.
        arrays: the names in an npz, which may hold statistics beside images or in their place.
        count: good images read so far, by the iteration now running or the last one.
        left_out: "name: reason" of each image that could not be read so far, by its place in the set.
        unsure: whether a file could not be read at all, which may pass, unlike damage.
    """

    path: Path
    kind: str
    total: int | None
    limit: int | None
    items: Callable[[], Iterator[_Item]] = field(repr=False)
    split: str | None = None
    shape: tuple[int, int] | None = None
    tars: list[Path] = field(default_factory=list, repr=False)
    samples: list[DrawnImage] = field(default_factory=list, repr=False)
    arrays: frozenset[str] = frozenset()
    count: int = 0
    left_out: dict[int, str] = field(default_factory=dict)
    unsure: bool = False

    @property
    def bad(self) -> list[str]:
        """ "name: reason" of each image left out so far, in the set's order."""
        return [self.left_out[index] for index in sorted(self.left_out)]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield each good image as uint8 RGB [3, H, W], in the set's order.

        Raises:
            VugenError: a tar, zip or npz is truncated or not what its name says.
        """
        return (image for _, _, image in self.read() if image is not None)

    def read(self, block: int | None = None) -> Iterator[Read]:
        """Yield every image's index, name and pixels, None if it is bad; decoded ahead of need in threads.

        Args:
            block: in a job of several processes, deal the set out to them in blocks of this many images; each
                process then knows its own alone, until `merge`. None: every process reads all.

        Raises:
            VugenError: a tar, zip or npz is truncated or not what its name says.
        """
        self.count, self.left_out, self.unsure = 0, {}, False
        workers = min(8, os.cpu_count() or 1)
        items: Iterator[tuple[int, _Item]] = enumerate(self._limited())
        if block:
            items = ((i, item) for i, item in items if i // block % world_size() == rank())
        waiting: deque[tuple[int, str, Future[np.ndarray]]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        try:
            while True:
                for index, (name, get) in itertools.islice(items, 4 * workers - len(waiting)):
                    waiting.append((index, name, pool.submit(self._pixels, get)))
                if not waiting:
                    return
                index, name, future = waiting.popleft()
                try:
                    image = future.result()
                except _BAD as error:
                    self.left_out[index] = f"{name}: {first_line(error)}"
                    self.unsure |= isinstance(error, OSError)
                    yield index, name, None
                    continue
                self.count += 1
                yield index, name, image
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def merge(self) -> None:
        """After a `read` in blocks: make `count`, `left_out` and `unsure` those of all processes, in each."""
        parts = all_gather((self.count, self.left_out, self.unsure))
        self.count = sum(count for count, _, _ in parts)
        self.left_out = {index: why for _, part, _ in parts for index, why in part.items()}
        self.unsure = any(unsure for _, _, unsure in parts)

    def names(self) -> Iterator[str]:
        """Yield every image's name, readable or not; no image is read."""
        return (name for name, _ in self._limited())

    def good_names(self) -> list[str]:
        """The names of the images that were read: those that the last whole `read` did not leave out."""
        return [name for index, name in enumerate(self.names()) if index not in self.left_out]

    def pictures(self, names: Collection[str]) -> np.ndarray:
        """The images of these names as uint8 [N, 3, H, W], in the set's order.

        Where they are of several sizes, squares of the shortest side among them are cut from them.
        """
        found = [self._pixels(get) for name, get in self._limited() if name in names]
        if len({image.shape for image in found}) > 1:
            side = min(min(image.shape[1:]) for image in found)
            found = [adm_crop(image.transpose(1, 2, 0), side).transpose(2, 0, 1) for image in found]
        return np.stack(found)

    def digest(self) -> str:
        """SHA-256 over the name and the bytes of every image, in order; nothing is decoded.

        Raises:
            VugenError: as iterating does.
        """
        sha = hashlib.sha256(repr(self.shape).encode())
        bar = progress_bar(self._limited(), desc="hash", total=self.total, unit="img", delay=2)
        for name, read in bar:
            try:
                content = hashlib.sha256(read()).hexdigest()
            except _BAD as error:
                content = first_line(error)
            sha.update(f"{name}\0{content}\0".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()

    def describe(self) -> SetRecord:
        """What was read."""
        record = SetRecord(path=str(self.path), kind=self.kind, count=self.count, bad=self.bad)
        return record if self.split is None else record.model_copy(update={"split": self.split})

    def _limited(self) -> Iterator[_Item]:
        return itertools.islice(self.items(), self.limit)

    def _pixels(self, read: Callable[[], bytes]) -> np.ndarray:
        data = read()
        pixels = decode(data) if self.shape is None else np.frombuffer(data, np.uint8).reshape(*self.shape, 3)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def open_image_set(path: Path, limit: int | None = None) -> ImageSet:
    """Find out what kind of image set `path` is; reads no image yet.

    Args:
        path: one of
            a folder with a `dataset.json` as `vugen prepare` writes (its `val` split, else `train`),
            a folder with a `samples.jsonl` as `vugen sample` writes (only the files it lists under "file"),
            a folder as GenEval's generation scripts write (`*/metadata.jsonl` and `*/samples/*`; no grids),
            a folder with MJHQ-30K's `meta_data.json` and its pictures, in its zip or unpacked,
            a folder of tars, or a folder of images (read recursively),
            a `.tar`, a `.zip`, or an `.npz` with "arr_0" uint8 [N, H, W, 3] as guided-diffusion (ADM) writes;
            an `.npz` of statistics alone is opened too, and has no images to read.
        limit: read only this many images from the start.

    Raises:
        VugenError: there is nothing at `path`, it is none of these, or it is empty or malformed.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise VugenError(f"the number of images must be at least 1, got {limit}.")
    images = _recognise(path)
    if images.total == 0:
        raise VugenError(f"no image in {path}: expected image files, shards, a zip or an npz batch.")
    images.limit = limit
    if images.total is not None and limit is not None:
        images.total = min(images.total, limit)
    return images


def image_batches(images: ImageSet, batch_size: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield the good images as uint8 [B, 3, H, W], B at most `batch_size`, with their indices in the set.

    The set is cut into blocks of `4 * batch_size`, and the images of a block are grouped by size, so their
    order may change. The processes of a job take the blocks in turn; an image is batched with the same others
    however many processes there are.
    """
    block = 4 * batch_size
    for _, of_block in itertools.groupby(images.read(block), lambda item: item[0] // block):
        groups: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for index, _, image in of_block:
            if image is None:
                continue
            group = groups.setdefault(image.shape, [])
            group.append((index, image))
            if len(group) == batch_size:
                yield _stack(groups.pop(image.shape))
        for group in groups.values():
            yield _stack(group)


def _stack(group: list[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
    return [index for index, _ in group], np.stack([image for _, image in group])


def npz_names(path: Path) -> set[str]:
    """The names of the arrays in an `.npz`, read from its directory alone.

    Raises:
        VugenError: the file is not an npz.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise VugenError(f"{path} is not a readable .npz: {first_line(error)}.") from error


def _recognise(path: Path) -> ImageSet:
    if path.is_dir():
        if (path / "dataset.json").is_file():
            return _prepared(path)
        if (path / "samples.jsonl").is_file():
            samples = read_samples(path)
            files = list(dict.fromkeys(sample.file for sample in samples))
            return ImageSet(
                path, "samples", len(files), None, partial(_file_items, path, files), samples=samples
            )
        files = _drawn_alone(path, list(image_paths(path)))
        if drawn := [name for name in files if _is_geneval(path, name)]:
            return ImageSet(path, "geneval", len(drawn), None, partial(_file_items, path, drawn))
        if (path / META).is_file():
            return _mjhq(path, files)
        tars = sorted(path.glob("*.tar"))
        if tars and not any("/" not in name for name in files):
            return ImageSet(path, "tar", None, None, partial(_tar_items, tars), tars=tars)
        return ImageSet(path, "folder", len(files), None, partial(_file_items, path, files))
    if not path.is_file():
        raise VugenError(f"no images at {path}: there is no such file or folder.")
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return ImageSet(path, "tar", None, None, partial(_tar_items, [path]), tars=[path])
    if suffix == ".zip":
        return ImageSet(path, "zip", _zip_count(path), None, partial(_zip_items, path))
    if suffix == ".npz":
        arrays = frozenset(npz_names(path))
        if "arr_0" not in arrays and arrays >= {"mu", "sigma"}:
            return ImageSet(path, "statistics", None, None, partial(_no_items, path), arrays=arrays)
        n, *shape = _npz_header(path)
        rows = partial(_npz_items, path)
        return ImageSet(path, "npz", n, None, rows, shape=(shape[0], shape[1]), arrays=arrays)
    raise VugenError(f"{path} is no image set: expected a folder, a .tar, a .zip or an .npz batch.")


def _drawn_alone(directory: Path, files: list[str]) -> list[str]:
    """Without what `vugen sample` writes beside its pictures, where a folder holds folders of it.

    Raises:
        VugenError: a drawing into one of them did not finish.
    """
    listed: dict[str, set[str]] = {}  # by folder with a slash at its end, which pictures are samples
    for folder in {name[: name.rfind("/") + 1] for name in files}:
        if (directory / folder / UNFINISHED).exists():
            raise VugenError(
                f"drawing into {directory / folder} did not finish, and what lies there may be older: run "
                "the same `vugen sample` again, which goes on, or delete the folder"
            )
        if (directory / folder / "samples.jsonl").is_file():
            listed[folder] = {folder + sample.file for sample in read_samples(directory / folder)}
            listed[f"{folder}sources/"] = set()
    if not listed:
        return files
    return [name for name in files if name in listed.get(name[: name.rfind("/") + 1], {name})]


def _is_geneval(directory: Path, name: str) -> bool:
    folder = PurePosixPath(name).parent
    return folder.name == "samples" and (directory / folder.parent / "metadata.jsonl").is_file()


def _mjhq(directory: Path, files: list[str]) -> ImageSet:
    """MJHQ-30K's pictures: those below its folder, else those in the one zip there."""
    zips = sorted(directory.glob("*.zip"))
    if files or len(zips) != 1:
        return ImageSet(directory, "mjhq", len(files), None, partial(_file_items, directory, files))
    return ImageSet(directory, "mjhq", _zip_count(zips[0]), None, partial(_zip_items, zips[0]))


def _prepared(directory: Path) -> ImageSet:
    """One split of a data set that `vugen prepare` wrote: `val` if there is one."""
    split = read_manifest(directory).held_out
    stored = ShardedImages(directory, split)
    shards = [directory / name for name in stored.names]
    return ImageSet(directory, "shards", len(stored), None, partial(_tar_items, shards), split, tars=shards)


def is_image(name: str) -> bool:
    """Whether a file or archive member is an image by its name; macOS's `._x.png` and `__MACOSX/` are not."""
    pure = PurePosixPath(name)
    hidden = pure.name.startswith(".") or pure.parts[:1] == ("__MACOSX",)
    return pure.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _file_items(directory: Path, names: list[str]) -> Iterator[_Item]:
    for name in names:
        yield name, partial(_read_file, directory / name)


def _read_file(file: Path) -> bytes:
    _check_size(file.stat().st_size)
    return file.read_bytes()


def _tar_items(shards: list[Path]) -> Iterator[_Item]:
    for shard in shards:
        for name, offset, size in tar_members(shard):
            if is_image(name) and not is_source(name):
                yield f"{shard.name}/{name}", partial(_read_member, shard, offset, size)


def _read_member(shard: Path, offset: int, size: int) -> bytes:
    _check_size(size)
    return read_at(shard, offset, size)


def _zip_count(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(is_image(name) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise VugenError(f"{path} is truncated or not a zip: {first_line(error)}.") from error


def _zip_items(path: Path) -> Iterator[_Item]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not is_image(info.filename):
                continue
            data: bytes | Exception
            try:
                _check_size(info.file_size)
                data = archive.read(info)
            # RuntimeError: an encrypted member. NotImplementedError: a compression that Python lacks.
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
                data = ValueError(first_line(error))
            yield info.filename, partial(_given, data)


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
        raise VugenError(f'{path} has no readable "arr_0": {first_line(error)}.') from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or 0 in shape[1:]:
        raise VugenError(
            f'"arr_0" of {path} is {dtype} {list(shape)}: expected uint8 [N, H, W, 3], rows contiguous.'
        )
    if shape[1] * shape[2] > MAX_PIXELS:
        raise VugenError(f"{path} holds images of {shape[2]}x{shape[1]} pixels: too large to score.")
    return shape[0], shape[1], shape[2]


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _npz_items(path: Path) -> Iterator[_Item]:
    """Rows are read one by one: `np.load` would hold the whole batch, 10 GB for 50,000 images of 256 px."""
    n, height, width = _npz_header(path)
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        _read_npy_header(stream)
        for index in range(n):
            try:
                row = stream.read(height * width * 3)
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
                raise VugenError(f"{path} is damaged at image {index}: {first_line(error)}.") from error
            if len(row) != height * width * 3:
                raise VugenError(f"{path} ends at image {index} of {n}: it is truncated.")
            yield f"arr_0[{index}]", partial(_given, row)


def _no_items(path: Path) -> Iterator[_Item]:
    raise VugenError(f"{path} holds statistics and no images: give images.")


def _given(data: bytes | Exception) -> bytes:
    if isinstance(data, Exception):
        raise data
    return data


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes is too large for an image")
