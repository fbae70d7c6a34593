"""Streams prepared shards to training: one global, seeded order that does not depend on workers or ranks.

Sample number n of a run is a pure function of (data set, seed, n). Batch b holds samples b*B to b*B+B-1, so a
run resumes to the sample by starting at another b, and worker processes cannot change what is seen: worker w
of W makes batches w, w+W, ... and the loader takes them in turn. The order shuffles whole shards, then
the samples of a window of neighbouring shards together, so reading stays local to a few files.
"""

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vugen_cli.data.images import adm_crop
from vugen_cli.data.manifest import dataset_card, read_manifest
from vugen_cli.data.remote import fetched, is_remote, shard_cache
from vugen_cli.errors import VugenError
from vugen_cli.processes import rank, world_size
from vugen_cli.recipe import Recipe


@dataclass
class Batch:
    """What a training step reads.

    Attributes:
        images: uint8 [B, 3, S, S], RGB; of a latent cache z̃ instead, float16 [B, h, w, c].
        captions: B captions, one chosen at random for each image and epoch.
        meta: B dictionaries, the samples' `.json`, with every caption under `captions`.
        corrupt: how many samples of this batch could not be read and were replaced by a neighbour.
        tokens: the captions' token ids.
        cut: how many captions were too long and lost their end.
    """

    images: Tensor
    captions: list[str]
    meta: list[dict[str, Any]]
    corrupt: int
    tokens: list[list[int]] | None = None
    cut: int = 0

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader so that the copy to the GPU need not wait."""
        self.images = self.images.pin_memory()
        return self


class ShardedImages:
    """Random access to the samples of one split; opens shards lazily and keeps a few open.

    Args:
        path: a directory written by `vugen prepare`, a URL of one, or a `pipe:` command (see `remote`).
        split: `train` or `val`.
        latents: take a latent cache too, whose z̃ are then read in place of images.
    """

    def __init__(self, path: str | Path, split: str = "train", latents: bool = False):
        self.directory: str | Path = str(path) if is_remote(path) else Path(path)
        self.split = split
        self.manifest = read_manifest(path)
        self.latents: dict[str, Any] | None = self.manifest.get("latents")
        if self.latents and not latents:
            raise VugenError(
                f"{path} holds latents, which only `vugen train-sampler` reads: give the images they were "
                f"made from ({self.manifest['data']['path']})"
            )
        if split not in self.manifest["splits"]:
            found = ", ".join(self.manifest["splits"]) or "none"
            raise VugenError(
                f"{path} has no {split} split (found: {found}): run `vugen prepare --split {split}`"
            )
        shards = [s for s in self.manifest["splits"][split]["shards"] if s["samples"]]
        self.names = [s["name"] for s in shards]
        self.facts = shards
        self.counts = np.array([s["samples"] for s in shards], dtype=np.int64)
        for name in self.names:
            if is_remote(path) and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                # The far shell of `pipe:ssh host cat {}` would run what a manifest put into a name.
                raise VugenError(
                    f"dataset.json of {path} names a shard {name!r}, which is no plain file name"
                )
            if Path(name).name != name or not (is_remote(path) or (Path(path) / name).is_file()):
                raise VugenError(f"shard {name} of {path} is missing: run `vugen prepare` again")
        self.size: int = self.manifest["size"]
        self.cache = shard_cache()  # of this process: a worker's environment may be older
        self._shard = lru_cache(maxsize=64)(self._open_shard)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_shard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shard = lru_cache(maxsize=64)(self._open_shard)

    def _open_shard(self, shard: int) -> tuple[IO[bytes], list[dict[str, tuple[int, int]]]]:
        """The file, closed when the cache lets go of it, and for each sample where each member lies."""
        if is_remote(self.directory):
            path = fetched(str(self.directory), self.facts[shard], self.cache)
        else:
            path = Path(self.directory) / self.names[shard]
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, _, kind = member.name.partition(".")
                    if member.isfile():
                        samples.setdefault(key, {})[kind] = (member.offset_data, member.size)
        except tarfile.TarError:
            pass  # a truncated shard: what was listed before the damage can still be read
        return open(path, "rb", buffering=0), list(samples.values())

    def read(
        self, shard: int, index: int, place: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Decode one sample: uint8 [S, S, 3], or z̃ float16 [1 or 2, h, w, c]; and its meta with `captions`.

        Args:
            shard, index: where it is.
            place: may be decoded into, where it has the stored size.

        Raises:
            ValueError, OSError: the sample is damaged or missing from its shard.
        """
        file, samples = self._shard(shard)
        if index >= len(samples):
            raise ValueError(f"sample {index} is missing from {self.names[shard]}")
        members = samples[index]

        def member(*kinds: str) -> bytes:
            for kind in kinds:
                if kind in members:
                    offset, size = members[kind]
                    data = os.pread(file.fileno(), size, offset)
                    if len(data) == size:
                        return data
            raise ValueError(f"sample {index} of {self.names[shard]} has no readable {'/'.join(kinds)}")

        if self.latents:
            stored = np.load(io.BytesIO(member("npy")), allow_pickle=False)
            if stored.shape[1:] != (*self.latents["grid"], self.latents["channels"]):
                raise ValueError(f"sample {index} of {self.names[shard]} has the shape {stored.shape}")
        meta = json.loads(member("json"))
        meta["captions"] = member("txt").decode().splitlines()
        if self.latents:
            return stored, meta
        fits = place is not None and place.shape[0] == place.shape[1] == self.size
        return decode_stored(member("png", "jpg"), place if fits else None), meta

    @property
    def sets(self) -> list["ShardedImages"]:
        """The data sets that this is read from: itself, or those of a mixture."""
        return getattr(self, "parts", [self])

    def card(self) -> dict[str, Any]:
        """See `dataset_card`."""
        return dataset_card(self.directory)

    def order(self, seed: int, window: int) -> Any:
        """Where sample n of a seeded stream lies: a `ShuffledOrder`, or a mixture's own."""
        return ShuffledOrder(self.counts, seed, window)

    def held_out(self) -> "ShardedImages":
        """The data set's `val` split, or `train` if it has none."""
        split = "val" if "val" in self.manifest["splits"] else "train"
        return ShardedImages(self.directory, split, latents=self.latents is not None)

    def in_order(self, count: int | None = None) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """The first `count` readable samples in stored order."""
        left = len(self) if count is None else count
        for shard, samples in enumerate(self.counts):
            for index in range(samples):
                if left <= 0:
                    return
                try:
                    sample = self.read(shard, index)
                except (ValueError, OSError):
                    continue
                left -= 1
                yield sample


def decode_stored(data: bytes, place: np.ndarray | None = None) -> np.ndarray:
    """Pixels of an image as `vugen prepare` stores it (RGB PNG or JPEG), uint8 [S, S, 3].

    Args:
        data: of the file.
        place: a JPEG is decoded into this contiguous array; one that is larger counts as damaged.

    Raises:
        ValueError, OSError: the bytes are damaged.
    """
    if data[:2] == b"\xff\xd8":
        return simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=place)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.array(image.convert("RGB"))


class ShuffledOrder:
    """Where sample n of an endless, seeded stream lies.

    Args:
        counts: samples in each shard.
        seed: of the run.
        window: samples shuffled together, rounded up to whole shards.
    """

    def __init__(self, counts: np.ndarray, seed: int, window: int):
        self.counts, self.seed, self.window = counts, seed, window
        self.total = int(counts.sum())
        self._epoch = lru_cache(maxsize=2)(self._epoch_windows)
        self._samples = lru_cache(maxsize=2)(self._window_samples)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShuffledOrder, (self.counts, self.seed, self.window)  # worker processes make their own caches

    def _epoch_windows(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each window of an epoch, and where in the epoch each window ends."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        windows: list[np.ndarray] = []
        first, size = 0, 0
        for i, shard in enumerate(shards):
            size += int(self.counts[shard])
            if size >= self.window or i == len(shards) - 1:
                windows.append(shards[first : i + 1])
                first, size = i + 1, 0
        return windows, np.cumsum([self.counts[w].sum() for w in windows])

    def _window_samples(self, epoch: int, window: int) -> np.ndarray:
        shards = self._epoch(epoch)[0][window]
        pairs = np.concatenate(
            [np.stack([np.full(self.counts[s], s), np.arange(self.counts[s])], 1) for s in shards]
        )
        return np.random.default_rng([self.seed, epoch, window, 1]).permutation(pairs)

    def __getitem__(self, n: int) -> tuple[int, int, int]:
        """(epoch, shard, index in shard) of sample n >= 0."""
        epoch, position = divmod(n, self.total)
        _, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[window - 1]) if window else 0
        shard, index = self._samples(epoch, window)[position - begin]
        return epoch, int(shard), int(index)


class TrainingStream(IterableDataset[Batch]):
    """An endless stream of batches from batch number `start`: a webdataset pipeline in the planned order.

    Args:
        images: the split to read.
        batch_size: samples in a batch.
        seed: of the run: order, caption choice and flips.
        window: see `ShuffledOrder`.
        flip: mirror half of the images.
        start: number of the first batch (resume: the step to go on from).
        size: pixels a side; images of another stored size are resized.
        part: (i, of): the i-th of `of` equal parts of every batch, for one of several processes.
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
    ):
        self.images, self.batch_size, self.seed, self.flip = images, batch_size, seed, flip
        self.first, self.count = batch_size // part[1] * part[0], batch_size // part[1]
        self.start, self.size = start, size or images.size
        self.order = images.order(seed, window)

    def __iter__(self) -> Iterator[Batch]:
        return iter(wds.DataPipeline(self.numbers, wds.map(self.batch)))

    def numbers(self) -> Iterator[int]:
        """Numbers of this worker's batches: worker w of W makes start + w, start + w + W, ..."""
        worker = get_worker_info()
        number, of = (worker.id, worker.num_workers) if worker else (0, 1)
        return itertools.count(self.start + number, of)

    def batch(self, number: int) -> Batch:
        """This process's part of batch `number`, its pictures decoded straight into place."""
        # Rows of pixels, as they are decoded; the permuted view is channels-last, as convolutions like it.
        cached = self.images.latents
        shape = (*cached["grid"], cached["channels"]) if cached else (self.size, self.size, 3)
        images = torch.empty(self.count, *shape, dtype=torch.float16 if cached else torch.uint8)
        places = images.numpy()
        begin = number * self.batch_size + self.first
        samples = [self.read(begin + row, places[row]) for row in range(self.count)]
        choices, meta, corrupt = zip(*samples, strict=True)
        captions = [m["captions"][i] if m["captions"] else "" for i, m in zip(choices, meta, strict=True)]
        if cached:
            tokens = [m["tokens"][i] for i, m in zip(choices, meta, strict=True)]
            return Batch(images, captions, list(meta), sum(corrupt), tokens)
        return Batch(images.permute(0, 3, 1, 2), captions, list(meta), sum(corrupt))

    def read(self, n: int, place: np.ndarray) -> tuple[int, dict[str, Any], int]:
        """Sample n: picture or z̃ into `place`; which caption, meta, and 1 if it is a stand-in."""
        epoch, shard, index = self.order[n]
        pixels, meta, corrupt = self._read_or_neighbour(shard, index, place)
        luck = random_bits(self.seed, epoch, shard, index)
        choice = (luck >> 1) % max(len(meta["captions"]), 1)
        if self.images.latents:  # mirrored latents are not the mirror's latents: both were stored
            place[:] = pixels[1 if self.flip and luck & 1 else 0]
            return choice, meta, corrupt
        if pixels.shape[:2] != (self.size, self.size):
            pixels = adm_crop(pixels, self.size)
        if self.flip and luck & 1:
            place[:] = pixels[:, ::-1]
        elif not np.may_share_memory(pixels, place):
            place[:] = pixels
        return choice, meta, corrupt

    def _read_or_neighbour(
        self, shard: int, index: int, place: np.ndarray
    ) -> tuple[np.ndarray, dict[str, Any], int]:
        """A sample, or the next readable one of its shard (then of the others) if it is damaged."""
        corrupt = 0
        for s in [shard, *range(len(self.images.counts))]:
            count = int(self.images.counts[s])
            for step in range(count):
                try:
                    pixels, meta = self.images.read(s, (index + step) % count, place)
                    return pixels, meta, corrupt
                except (ValueError, OSError):
                    corrupt = 1
        raise VugenError(f"no readable sample in {self.images.directory}: run `vugen prepare` again")


def random_bits(*key: int) -> int:
    """64 bits fixed by some numbers; a generator of its own for each sample would cost more than its JSON."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def training_batches(
    images: ShardedImages, recipe: Recipe, batch_size: int, flip: bool, size: int | None = None
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
        stream = TrainingStream(
            images,
            batch_size // parts,
            recipe.seed,
            data.shuffle,
            flip,
            step * parts,
            size,
            (rank(), world_size()),
        )
        return batches(stream, data.workers)

    return batches_from


def batches(stream: TrainingStream, workers: int) -> Iterator[Batch]:
    """Iterate over a stream, decoding in `workers` processes (0: in this one)."""
    loader = wds.WebLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def stored_images(
    images: ShardedImages, count: int, size: int | None = None, batch_size: int = 64
) -> Iterator[Tensor]:
    """The first `count` images of a split in batches, uint8 [B, 3, S, S]; `size` resizes as training does."""
    pending: list[Tensor] = []
    for pixels, _ in images.in_order(count):
        pending.append(torch.from_numpy(adm_crop(pixels, size or images.size)).permute(2, 0, 1))
        if len(pending) == batch_size:
            yield torch.stack(pending)
            pending.clear()
    if pending:
        yield torch.stack(pending)


def held_out_images(images: ShardedImages, size: int) -> Tensor:
    """The pictures of a preview, uint8 [8, 3, size, size]: the first of the `val` split."""
    held_out = [adm_crop(pixels, size) for pixels, _ in images.held_out().in_order(8)]
    return torch.from_numpy(np.stack(held_out)).permute(0, 3, 1, 2)
