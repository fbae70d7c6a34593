"""Streams prepared shards to training: one seeded order that does not depend on workers or ranks.

Sample number n of a run is a pure function of (data set, batch size, seed, n); see `order`. Batch b holds
samples b*B to b*B+B-1, so a run resumes to the sample by starting at another b, and worker processes cannot
change what is seen: worker w of W makes batches w, w+W, ... and the loader takes them in turn.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, Any, Generic, TypeAlias, TypeVar

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vugen_cli.card import DataCard
from vugen_cli.data.images import adm_crop, is_jpeg
from vugen_cli.data.index import shard_index
from vugen_cli.data.manifest import Shard, read_manifest
from vugen_cli.data.order import Order, StreamOrder, Turns, random_bits, stream_count
from vugen_cli.data.remote import (
    READ_PAUSE,
    READ_TRIES,
    Prefetch,
    cached_path,
    fetch,
    is_remote,
    open_shard,
    shard_cache,
    wait_again,
)
from vugen_cli.data.sample import Meta
from vugen_cli.data.shapes import Shape, as_shape, parse_shape, shape_name
from vugen_cli.errors import VugenError, first_line
from vugen_cli.processes import end_with_parent, rank, world_size
from vugen_cli.recipe import Recipe

T = TypeVar("T")

MOST_OPEN = 256  # shards a reader keeps open: of the 1024 files that a process may have as a rule
STAND_INS = 96  # tries before a data set counts as unreadable
JUDGED = 10_000  # samples over which the share of damaged ones is taken
# What `vugen prepare` writes again: it looks at sizes, since to hash all that is there takes long.
MEND = "delete the shards whose sha256 is not that in dataset.json and run `vugen prepare` again"


class Damaged(Exception):
    """A sample whose bytes are not what was stored: missing, cut short, or not to be decoded."""


@dataclass
class Batch:
    """What a training step reads.

    Attributes:
        images: uint8 [B, 3, H, W], RGB, squares as a rule; of a latent cache z̃ instead, float16
            [B, h, w, c].
        captions: B captions, one chosen at random for each image and epoch.
        meta: B dictionaries, the samples' `.json`, with every caption under `captions`.
        corrupt: how many samples of this batch were damaged; others, drawn at random, stand in for them.
        tokens: the captions' token ids, where the stream was given a tokeniser.
        sources: the pictures that each image is made from, uint8 [3, H, W] each; none if it is no edit. None
            where the stream was not asked for them.
        cut: how many captions were too long and lost their end.
    """

    images: Tensor
    captions: list[str]
    meta: list[Meta]
    corrupt: int
    tokens: list[list[int]] | None = None
    cut: int = 0
    sources: list[list[Tensor]] | None = None

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader so that the copy to the GPU need not wait."""
        self.images = self.images.pin_memory()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For another process: a tensor goes through a socket of its own, some 0.1 ms, so sources as one."""
        if not self.sources:
            return self.__dict__
        shapes = [[source.shape for source in row] for row in self.sources]
        pixels = [source.flatten() for row in self.sources for source in row]
        return self.__dict__ | {"sources": (shapes, torch.cat([torch.empty(0, dtype=torch.uint8), *pixels]))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["sources"]:
            shapes, pixels = state["sources"]
            pieces = iter(pixels.split([shape.numel() for row in shapes for shape in row]))
            self.sources = [[next(pieces).view(shape) for shape in row] for row in shapes]


class ShardedImages:
    """Random access to the samples of one split; opens shards lazily and keeps a few open.

    Workers are sent arrays, not the manifest.

    Args:
        path: a directory written by `vugen prepare`, or a URL of one (see `remote`).
        split: `train` or `val`.
        latents: take a latent cache too, whose z̃ are then read in place of images.

    Attributes:
        size: pixels a side; of pictures of several shapes, of the square ones.
        shapes: of the pictures, as (height, width); one alone as a rule.
        kinds: int64 [shards], the number of each shard's shape.
        most_sources: pictures that a sample is made from, at most; 0 of a data set without edits.

    Raises:
        VugenError: there is no such data set, split or shard, or it holds latents.
    """

    def __init__(self, path: str | Path, split: str = "train", latents: bool = False):
        self.directory: str | Path = str(path) if is_remote(path) else Path(path)
        self.split = split
        self.manifest = read_manifest(path)
        self.latents = self.manifest.latents
        if self.latents and not latents:
            images = self.manifest.data.path if self.manifest.data else "see its dataset.json"
            raise VugenError(
                f"{path} holds latents, which only `vugen train-sampler` reads: give the images they were "
                f"made from ({images})"
            )
        if split not in self.manifest.splits:
            found = ", ".join(self.manifest.splits) or "none"
            raise VugenError(
                f"{path} has no {split} split (found: {found}): run `vugen prepare --split {split}`"
            )
        shards = [s for s in self.manifest.splits[split].shards if s.samples]
        self.names = [s.name for s in shards]
        self.counts = np.array([s.samples for s in shards], dtype=np.int64)
        self.lengths = np.array([s.bytes for s in shards], dtype=np.int64)
        self.shapes = [parse_shape(shape) for shape in self.manifest.shapes or [str(self.manifest.size)]]
        self.kinds = self._kinds(shards)
        self.digests = np.frombuffer(b"".join(bytes.fromhex(s.sha256) for s in shards), np.uint8)
        if not is_remote(path):
            there = set(os.listdir(path))
            if missing := next((name for name in self.names if name not in there), None):
                raise VugenError(f"shard {missing} of {path} is missing: run `vugen prepare` again")
        self.size, self.most_sources = self.manifest.size, self.manifest.splits[split].sources
        self.cache = shard_cache()  # of this process: a worker's environment may be older
        self.keep_open = 8
        self._start_reading()

    def _kinds(self, shards: Sequence[Shard]) -> np.ndarray:
        numbers = {shape_name(shape): number for number, shape in enumerate(self.shapes)}
        usual = numbers.get(shape_name(as_shape(self.manifest.size)), -1)
        found = (numbers.get(shard.shape, -1) if shard.shape else usual for shard in shards)
        kinds = np.fromiter(found, np.int64, len(shards))
        if (kinds < 0).any():
            wrong = shards[int(kinds.argmin())]
            raise VugenError(
                f"dataset.json of {self.directory} is damaged: it names no shape {wrong.shape}, that of "
                f"{wrong.name}; run `vugen prepare` again"
            )
        return kinds

    def _start_reading(self) -> None:
        self._open: OrderedDict[int, tuple[IO[bytes], np.ndarray, int]] = OrderedDict()
        self._prefetch = Prefetch(self._fetch_ahead)

    def _fetch_ahead(self, shard: int) -> None:
        fetch(str(self.directory), self.shard(shard), self.cache, wait=False)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_prefetch", "manifest")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_reading()

    def shard(self, shard: int) -> Shard:
        """What `dataset.json` says of a shard."""
        digest = self.digests[32 * shard : 32 * shard + 32].tobytes().hex()
        return Shard(self.names[shard], int(self.counts[shard]), int(self.lengths[shard]), digest)

    def shape(self, shard: int) -> Shape:
        """(height, width) of the pictures of a shard."""
        return self.shapes[self.kinds[shard]]

    def array_shape(self, kind: int) -> tuple[int, ...]:
        """Of what a sample of one of the shapes is trained on: pixels [H, W, 3], or z̃ [h, w, c]."""
        if not self.latents:
            return (*self.shapes[kind], 3)
        grids = self.latents.grids or {}
        return (*grids.get(shape_name(self.shapes[kind]), self.latents.grid), self.latents.channels)

    def weight(self, kind: int) -> float:
        """How much of all that is drawn is of one of the shapes, in proportion: its samples."""
        return float(self.counts[self.kinds == kind].sum())

    def refuse_shapes(self, why: str) -> None:
        """End what is only for squares.

        Raises:
            VugenError: pictures are of several shapes.
        """
        if len(self.shapes) > 1:
            raise VugenError(f"{self.directory} holds pictures of several shapes, {why}")

    def _opened(self, shard: int) -> tuple[IO[bytes], np.ndarray, int]:
        """A shard's file, its index, and its length as it is; the longest unused one is closed.

        Raises:
            OSError: the system will not open it.
        """
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        facts = self.shard(shard)
        if is_remote(self.directory):
            file, path = open_shard(str(self.directory), facts, self.cache), cached_path(facts, self.cache)
        else:
            path = Path(self.directory) / facts.name
            file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed when it is let go of
        spare = cached_path(facts, self.cache).with_suffix(".index.npy")
        opened = file, shard_index(path, facts.samples, spare), os.fstat(file.fileno()).st_size
        self._open[shard] = opened
        while len(self._open) > self.keep_open:
            self._open.popitem(last=False)  # nobody else holds the file: it is closed
        return opened

    def stored(self, shard: int, index: int) -> list[bytes]:
        """The bytes of a sample: picture or latents, `.json`, `.txt`, pictures that it is made from.

        Raises:
            Damaged: one of them is missing.
            VugenError: the system does not read the shard, though it was asked again.
        """
        for left in reversed(range(READ_TRIES)):
            try:
                file, places, length = self._opened(shard)
                if index >= len(places):
                    raise Damaged(f"sample {index} is missing from {self.names[shard]}")
                members = []
                for column, (offset, size) in enumerate(places[index].tolist()):
                    if column > 2 and offset < 0:  # others of the shard are made from more
                        break
                    if offset < 0 or size < 0 or offset + size > length:
                        raise Damaged(f"a part of sample {index} is missing from {self.names[shard]}")
                    members.append(os.pread(file.fileno(), size, offset))
                return members
            except OSError as error:  # too many open files, an input/output error, a stale handle, gone
                self._open.clear()
                if not left:
                    raise VugenError(
                        f"cannot read {self.names[shard]} of {self.directory}: {error.strerror or error}"
                    ) from error
                wait_again(READ_PAUSE, READ_TRIES - 1 - left)
        raise AssertionError("unreachable")

    def read(self, shard: int, index: int, place: np.ndarray | None = None) -> tuple[np.ndarray, Meta]:
        """Decode one sample: uint8 [S, S, 3], or z̃ float16 [1 or 2, h, w, c]; and its meta with `captions`.

        The meta of an edit has the pictures that it is made from under `sources`, as they are stored.

        Args:
            shard, index: where it is.
            place: may be decoded into, where it has the stored size.

        Raises:
            Damaged: the sample is damaged or missing from its shard.
            VugenError: the shard cannot be read or had.
        """
        stored, facts, text, *sources = self.stored(shard, index)
        try:
            meta: Meta = dict(json.loads(facts))
            meta["captions"] = text.decode().splitlines()
            meta.pop("sources", None)  # a foreign fact of that name
            if sources:
                if len(sources) != meta["source_count"]:
                    raise ValueError("a picture that it is made from is missing")
                meta["sources"] = sources
            if self.latents:
                shape = (1 + self.latents.flip, *self.array_shape(self.kinds[shard]))
                return decode_latents(stored, shape), meta
            fits = place is not None and place.shape[:2] == self.shape(shard)
            return decode_stored(stored, self.shape(shard), place if fits else None), meta
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes make decoders raise nearly anything
            raise Damaged(f"sample {index} of {self.names[shard]}: {first_line(error)}") from error

    @property
    def sets(self) -> list["ShardedImages"]:
        """The data sets that this is read from: itself, or those of a mixture."""
        return getattr(self, "parts", [self])

    def card(self) -> DataCard:
        """What checkpoints remember of it."""
        return self.manifest.card(self.directory)

    def order(self, seed: int, window: int, batch_size: int, parts: int = 1, kind: int = 0) -> Order:
        """Where the samples of one of the shapes lie in a seeded run, for a reader of one of `parts` equal
        parts of each batch.
        """
        samples = int(self.counts[self.kinds == kind].sum())
        return self.streams(seed, window, stream_count(batch_size, samples), parts, kind)

    def streams(self, seed: int, window: int, count: int, parts: int, kind: int = 0) -> StreamOrder:
        """`count` streams; as many shards are kept open as the windows of a part of them take."""
        shards = np.flatnonzero(self.kinds == kind)
        expect = self._expect if is_remote(self.directory) else None
        order = StreamOrder(self.counts[shards], seed, window, count, expect, shards)
        at_once = len(self.shapes) * (count // parts + 1) * (order.shards_at_once() + 1)
        self.keep_open = min(MOST_OPEN, at_once)
        return order

    def _expect(self, shards: list[int]) -> None:
        self._prefetch(shards)

    def held_out(self) -> "ShardedImages":
        """The data set's `val` split, or `train` if it has none."""
        return ShardedImages(self.directory, self.manifest.held_out, latents=self.latents is not None)

    def in_order(self, count: int | None = None) -> Iterator[tuple[np.ndarray, Meta]]:
        """The first `count` readable samples in stored order."""
        left = len(self) if count is None else count
        for shard, samples in enumerate(self.counts):
            for index in range(samples):
                if left <= 0:
                    return
                try:
                    sample = self.read(shard, index)
                except Damaged:
                    continue
                left -= 1
                yield sample


def decode_stored(data: bytes, size: int | Shape, place: np.ndarray | None = None) -> np.ndarray:
    """Pixels of an image as `vugen prepare` stores it (RGB PNG or JPEG), uint8 [S, S, 3] or [H, W, 3].

    Nothing is decoded that claims another size: a few damaged bytes can claim gigabytes.

    Args:
        data: of the file.
        size: S, or (H, W).
        place: a JPEG is decoded into this contiguous array.

    Raises:
        Exception: the bytes are damaged, or the picture is of another size.
    """
    shape = as_shape(size)
    if is_jpeg(data):
        found = simplejpeg.decode_jpeg_header(data)[:2]
        if found != shape:
            raise ValueError(f"a picture of {shape_name(found)} pixels, not {shape_name(shape)}")
        return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=place)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.size != shape[::-1]:
            raise ValueError(f"a picture of {image.width}x{image.height} pixels, not {shape_name(shape)}")
        return np.array(image.convert("RGB"))


def decode_source(data: bytes, shapes: Sequence[Shape], size: int) -> np.ndarray:
    """A picture that an edit is made from, of one of a data set's shapes, cut to a square: uint8 [S, S, 3].

    Raises:
        Exception: as `decode_stored`.
    """
    for shape in shapes[:-1]:
        with contextlib.suppress(ValueError):
            return adm_crop(decode_stored(data, shape), size)
    return adm_crop(decode_stored(data, shapes[-1]), size)


def decode_latents(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The latents of an image from their `.npy`, float16 of `shape`.

    Raises:
        Exception: the bytes are damaged or of another shape.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0(file) if version == (1, 0) else None
    if header != (shape, False, np.dtype(np.float16)):  # before anything is allocated
        raise ValueError(f"{header} are not latents of the shape {shape}")
    return np.frombuffer(data, np.float16, offset=file.tell()).reshape(shape)


# Rows of a shard, their pixels (uint8 [rows, 3, H, W]) and what is said of them.
Chunk: TypeAlias = tuple[list[int], Tensor, list[Meta]]


class TrainingStream(IterableDataset[Batch]):
    """An endless stream of batches from batch number `start`: a webdataset pipeline in the planned order.

    Args:
        images: the split to read.
        batch_size: samples in a batch.
        seed: of the run: order, caption choice and flips.
        window: see `StreamOrder`.
        flip: mirror half of the images.
        start: number of the first batch (resume: the step to go on from).
        size: pixels a side; images of another stored size are resized, if all are squares.
        part: (i, of): the i-th of `of` equal parts of every batch, for one of several processes.
        accumulate: a part comes as this many batches that follow one another.
        tokenize: caption -> token ids, and whether it was cut; called in the workers, to which it is sent.
        sources: give the pictures that images are made from too.

    Raises:
        VugenError: images of several shapes are to be resized.
    """

    def __init__(
        self,
        images: ShardedImages,
        batch_size: int,
        seed: int,
        window: int = 10_000,
        flip: bool = False,
        start: int = 0,
        size: int | None = None,
        part: tuple[int, int] = (0, 1),
        accumulate: int = 1,
        tokenize: Callable[[str], tuple[list[int], bool]] | None = None,
        sources: bool = False,
    ):
        self.images, self.batch_size, self.seed, self.flip = images, batch_size, seed, flip
        self.first, self.count = batch_size // part[1] * part[0], batch_size // part[1] // accumulate
        self.start, self.size, self.accumulate = start, size or images.size, accumulate
        self.tokenize, self.sources = tokenize, sources
        if self.size != images.size:
            images.refuse_shapes(f"which cannot be resized to {self.size}: prepare others")
        self.kinds = [kind for kind in range(len(images.shapes)) if images.counts[images.kinds == kind].any()]
        self.orders = [images.order(seed, window, batch_size, part[1], kind) for kind in self.kinds]
        self.turns = Turns([images.weight(kind) for kind in self.kinds], seed)

    def __iter__(self) -> Iterator[Batch]:
        return iter(wds.DataPipeline(self.numbers, wds.map(self.batch)))

    def numbers(self) -> Iterator[int]:
        """Numbers of this worker's micro-batches: worker w of W makes w, w + W, ... from the first on."""
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        return itertools.count(self.start * self.accumulate + number, of)

    def batch(self, number: int) -> Batch:
        """This process's micro-batch `number`, its pictures decoded straight into place."""
        # Rows of pixels, as they are decoded; the permuted view is channels-last, as convolutions like it.
        batch, part = divmod(number, self.accumulate)
        cached = self.images.latents
        shape = self.images.array_shape(self.kinds[self.turns.at(batch)[0]])
        if not cached and len(self.images.shapes) == 1:
            shape = (self.size, self.size, 3)
        images = torch.empty(self.count, *shape, dtype=torch.float16 if cached else torch.uint8)
        places = images.numpy()
        first = self.first + part * self.count
        samples = [self.read(batch, first + row, places[row]) for row in range(self.count)]
        choices, metas, corrupt = zip(*samples, strict=True)
        captions = [m["captions"][i] if m["captions"] else "" for i, m in zip(choices, metas, strict=True)]
        tokens, cut = None, 0
        if self.tokenize:
            tokens, cuts = map(list, zip(*map(self.tokenize, captions), strict=True))
            cut = sum(cuts)
        pictures = images if cached else images.permute(0, 3, 1, 2)
        sources = [meta.pop("sources", []) for meta in metas]
        shown = sources if self.sources else None
        return Batch(pictures, captions, list(metas), sum(corrupt), tokens, cut, shown)

    def read(self, batch: int, row: int, place: np.ndarray) -> tuple[int, Meta, int]:
        """A row of a whole batch: picture or z̃ into `place`; which caption, meta, and 1 for a stand-in."""
        turn, batch = self.turns.at(batch)
        order = self.orders[turn]
        rows = self.batch_size // order.streams
        stream, position = row // rows, batch * rows + row % rows
        epoch, shard, index = order.at(stream, position)
        luck = random_bits(self.seed, epoch, shard, index)
        corrupt = 0
        try:
            pixels, meta = self._read(shard, index, place)
        except Damaged as damage:
            pixels, meta = self._stand_in(order, stream, position, place, damage)
            corrupt = 1
        if self.flip and luck & 1:
            meta["sources"] = [source.flip(-1) for source in meta.get("sources", [])]
        choice = (luck >> 1) % max(len(meta["captions"]), 1)
        if self.images.latents:  # mirrored latents are not the mirror's latents: both were stored
            place[:] = pixels[1 if self.flip and luck & 1 else 0]
            return choice, meta, corrupt
        if pixels.shape != place.shape:
            pixels = adm_crop(pixels, self.size)
        if self.flip and luck & 1:
            place[:] = pixels[:, ::-1]
        elif not np.may_share_memory(pixels, place):
            place[:] = pixels
        return choice, meta, corrupt

    def _read(self, shard: int, index: int, place: np.ndarray) -> tuple[np.ndarray, Meta]:
        """A sample with the pictures that it is made from decoded, where they are asked for.

        Raises:
            Damaged: the sample or one of them.
        """
        pixels, meta = self.images.read(shard, index, place)
        stored = meta.pop("sources", [])
        if self.sources and stored:
            shape = self.images.shape(shard)
            cut = self.size if len(self.images.shapes) == 1 else shape
            try:
                decoded = [adm_crop(decode_stored(data, shape), cut) for data in stored]
            except Exception as error:  # damaged bytes make decoders raise nearly anything
                raise Damaged(f"a source of sample {index}: {first_line(error)}") from error
            meta["sources"] = [torch.from_numpy(source).permute(2, 0, 1) for source in decoded]
        return pixels, meta

    def _stand_in(
        self, order: Order, stream: int, position: int, place: np.ndarray, damage: Damaged
    ) -> tuple[np.ndarray, Meta]:
        """A sample drawn at random, near the damaged one if one can be read there."""
        for attempt in range(STAND_INS):
            _, shard, index = order.stand_in(stream, position, attempt)
            try:
                return self._read(shard, index, place)
            except Damaged:
                continue
        raise VugenError(
            f"no readable sample in {self.images.directory}, in {STAND_INS} tries ({damage}): {MEND}"
        )


class DamageLimit:
    """Ends a run on a data set that is more than a little damaged.

    Args:
        most: share of damaged samples (`data.max_corrupt`) among the last 10,000; a run that has not read as
            many is held to the same number.
    """

    def __init__(self, most: float):
        self.most, self.found, self.read = most, 0, 0
        self.steps: deque[tuple[int, int]] = deque()

    def add(self, corrupt: int, samples: int) -> None:
        """Count the damaged samples of a step.

        Raises:
            VugenError: there are too many.
        """
        self.steps.append((corrupt, samples))
        self.found, self.read = self.found + corrupt, self.read + samples
        while self.read - self.steps[0][1] >= JUDGED:
            past = self.steps.popleft()
            self.found, self.read = self.found - past[0], self.read - past[1]
        if self.found > self.most * max(JUDGED, self.read):
            raise VugenError(
                f"{self.found} of the last {self.read} samples are damaged, more than "
                f"data.max_corrupt={self.most} allows: check the disk, {MEND}, or raise it"
            )


def training_batches(
    images: ShardedImages,
    recipe: Recipe,
    batch_size: int,
    flip: bool,
    size: int | None = None,
    tokenize: Callable[[str], tuple[list[int], bool]] | None = None,
    sources: bool = False,
) -> Callable[[int], Iterator[Batch]]:
    """What a stage trains on: step -> this process's stream from there, `engine.accumulate` batches a step.

    Raises:
        VugenError: the recipe's batch cannot be shared out evenly.
    """
    data, parts = recipe.data, recipe.engine.accumulate
    if batch_size % (parts * world_size()):
        raise VugenError(
            f"a batch of {batch_size} cannot be shared out evenly over {world_size()} processes in {parts} "
            f"parts (engine.accumulate): take a batch size that is a multiple of {parts * world_size()}"
        )

    def batches_from(step: int) -> Iterator[Batch]:
        part = (rank(), world_size())
        return batches(
            TrainingStream(
                images,
                batch_size,
                recipe.seed,
                data.shuffle,
                flip,
                step,
                size,
                part,
                parts,
                tokenize,
                sources,
            ),
            data.workers,
        )

    return batches_from


class _Told(IterableDataset[Any], Generic[T]):
    """A stream in a worker, whose error for the user comes as a value: raised, it would be rewrapped."""

    def __init__(self, stream: Iterable[T]):
        self.stream = stream

    def __iter__(self) -> Iterator[T | VugenError]:
        try:
            yield from self.stream
        except VugenError as error:
            yield error


def batches(stream: Iterable[T], workers: int) -> Iterator[T]:
    """Iterate over a stream, decoding in `workers` processes (0: in this one).

    In each of them the stream gives every `workers`-th batch; see `TrainingStream` and `StoredChunks`.

    Raises:
        VugenError: as it was raised in a worker; a worker died.
    """
    # Imported once in the server that workers are forked from: they start at once and share its memory. First
    # what takes server and workers out of the group that Ctrl-C and launchers signal: the run stops itself.
    preload = ["vugen_cli.data.own_group", "vugen_cli.data.loader"]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    if workers:
        _start_tracker()
    loader = DataLoader(
        _Told(stream),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )
    return _raised(iter(loader))  # the workers start now, not when the first batch is asked for


def _start_tracker() -> None:
    """Start multiprocessing's resource tracker, which stays in the run's group, deaf to SIGUSR1 too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # inherited
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_number: int) -> None:
    end_with_parent()  # what kills the run's group does not reach it
    # A batch that cannot be sent is missed by a thread alone, and the run would wait for it for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: Exception, _batch: Any) -> None:
    print(f"decoding process: {first_line(error)}", file=sys.stderr, flush=True)
    os._exit(1)


def _raised(found: Iterator[T | VugenError]) -> Iterator[T]:
    try:
        for batch in found:
            if isinstance(batch, VugenError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "killed by signal" not in str(error):
            raise
        raise VugenError(
            "a decoding process died, most likely for want of memory: run again with fewer data.workers; if "
            "it says shared memory, with more of that (docker run --ipc host, or --shm-size 8g)"
        ) from error


class StoredChunks(IterableDataset[Chunk]):
    """Stored shards in stored order, some samples at a time; a damaged one is left out of its chunk.

    Args:
        shards: data sets and the numbers of their shards.
        size: samples of a chunk; a shard's last may have fewer.
    """

    def __init__(self, shards: list[tuple[ShardedImages, int]], size: int):
        self.chunks = [
            (images, shard, range(first, min(first + size, int(images.counts[shard]))))
            for images, shard in shards
            for first in range(0, int(images.counts[shard]), size)
        ]

    def __iter__(self) -> Iterator[Chunk]:
        worker = get_worker_info()
        for images, shard, rows in self.chunks[worker.id :: worker.num_workers] if worker else self.chunks:
            read = {}
            for row in rows:
                with contextlib.suppress(Damaged):
                    read[row] = images.read(shard, row)
            pixels = [torch.from_numpy(found) for found, _ in read.values()]
            shown = torch.stack(pixels).permute(0, 3, 1, 2) if pixels else torch.empty(0)
            yield list(read), shown, [meta for _, meta in read.values()]


def stored_images(
    images: ShardedImages, count: int, size: int | None = None, batch_size: int = 64
) -> Iterator[Tensor]:
    """The first `count` images of a split in batches of one shape, uint8 [B, 3, H, W].

    `size` resizes squares as training does.
    """
    pending: dict[Shape, list[Tensor]] = {as_shape(size or images.size): []}
    for pixels, _ in images.in_order(count):
        if len(images.shapes) == 1:
            pixels = adm_crop(pixels, size or images.size)
        alike = pending.setdefault(pixels.shape[:2], [])
        alike.append(torch.from_numpy(pixels).permute(2, 0, 1))
        if len(alike) == batch_size:
            yield torch.stack(alike)
            alike.clear()
    for alike in pending.values():
        if alike:
            yield torch.stack(alike)


def held_out_images(images: ShardedImages, size: int, count: int = 8) -> Tensor:
    """The pictures of a preview, uint8 [count, 3, size, size]: the first held-out ones, cut to squares.

    Raises:
        VugenError: none can be read.
    """
    held_out = [adm_crop(pixels, size) for pixels, _ in images.held_out().in_order(count)]
    if not held_out:
        raise VugenError(f"no held-out picture of {images.directory} can be read: {MEND}")
    return torch.from_numpy(np.stack(held_out)).permute(0, 3, 1, 2)
