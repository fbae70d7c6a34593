"""Several data sets as one, drawn from by weights (the paper's StockMix is such a mixture).

Sample n of a mixture is a pure function of (sets, weights, batch size, seed, n), as it is of one set. Each of
its streams (see `order`) mixes one stream of every set: its samples come in blocks of 1024, each with the
same number from every set, shuffled by (seed, stream, block). How many came from a set before a sample is
then known without counting, and is the sample's number in that set's own stream: each sample comes once in
its own set's epoch, however long the epochs of the others are. A set too small for as many streams as the
mixture has gives several of them one of its own, from which they draw in turn.

Sets may hold pictures of several shapes, the same or not, whose squares are of one size. A batch is then of
one shape, as of one set: each shape has such streams, over the sets that have it. How often a shape comes and
a set within it follow from the sets' weights and from how much of each set is of that shape.
"""

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vugen_cli.card import DataCard
from vugen_cli.data.loader import MOST_OPEN, ShardedImages
from vugen_cli.data.order import (
    BLOCK,
    StreamOrder,
    block_of,
    block_shares,
    least_shares,
    ranks_in,
    stream_count,
)
from vugen_cli.data.sample import Meta
from vugen_cli.data.shapes import shape_name
from vugen_cli.errors import VugenError
from vugen_cli.recipe import MixtureSource, Recipe


class MixedImages(ShardedImages):
    """The samples of several data sets; shards are counted on from one set to the next.

    Args:
        sources: paths and weights, of which only the ratios matter.
        split: of each; a set that has no `val` gives its `train`, as it does alone.
        latents: take latent caches.

    Raises:
        VugenError: as `ShardedImages`; sets of different picture size, caches beside images, or a weight too
            small to be drawn.
    """

    def __init__(self, sources: list[MixtureSource], split: str = "train", latents: bool = False):
        train = [ShardedImages(source.path, latents=latents) for source in sources]
        self.parts = train if split == "train" else [images.held_out() for images in train]
        self.sources, self.split, first = sources, split, self.parts[0]
        self.directory = " + ".join(source.path for source in sources)
        for images in self.parts:
            if (images.size, images.latents is None) != (first.size, first.latents is None):
                raise VugenError(
                    f"{first.directory} and {images.directory} cannot be mixed: they hold pictures of "
                    f"different size ({first.size} and {images.size} px), or one is a latent cache; prepare "
                    "them alike, or train at one size after the other (train-sampler --init with --reducer)"
                )
        self.size, self.latents = first.size, first.latents
        self.shapes = list(dict.fromkeys(shape for images in self.parts for shape in images.shapes))
        self.most_sources = max(images.most_sources for images in self.parts)
        self.counts = np.concatenate([images.counts for images in self.parts])
        numbers = [[self.shapes.index(shape) for shape in images.shapes] for images in self.parts]
        self.kinds = np.concatenate(
            [np.array(of, np.int64)[images.kinds] for of, images in zip(numbers, self.parts, strict=True)]
        )
        self.names = [f"{images.directory}/{name}" for images in self.parts for name in images.names]
        self.firsts = np.cumsum([0, *(len(images.counts) for images in self.parts)])
        self.shares = block_shares([source.weight for source in sources])
        for source, share in zip(sources, self.shares, strict=True):
            if not share:
                raise VugenError(f"data.mixture: the weight of {source.path} is under 1 in {BLOCK} of all")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def card(self) -> DataCard:
        """As of one set, with the first one's path for scores to compare with, and `mixture`."""
        cards = [images.card() for images in self.parts]
        return DataCard(
            path=cards[0].path,
            dataset=" + ".join(dict.fromkeys(card.dataset for card in cards)),
            size=self.size,
            licence="; ".join(dict.fromkeys(card.licence for card in cards if card.licence)) or None,
            counts={"train": sum(card.counts.get("train", 0) for card in cards)},
            sha256=_joined([card.sha256 for card in cards]),
            train_sha256=_joined([card.train_sha256 for card in cards]),
            mixture=[source.model_dump(mode="json") for source in self.sources],
            shapes=[shape_name(shape) for shape in self.shapes] if len(self.shapes) > 1 else None,
        )

    def _of_kind(self, kind: int) -> list[tuple[int, ShardedImages, int, int]]:
        """The sets that have pictures of a shape: number, set, number of the shape there, samples of it."""
        found = []
        for part, images in enumerate(self.parts):
            if self.shapes[kind] in images.shapes:
                own = images.shapes.index(self.shapes[kind])
                if samples := int(images.counts[images.kinds == own].sum()):
                    found.append((part, images, own, samples))
        return found

    def _weights(self, kind: int) -> list[float]:
        """Of the sets that have a shape: their weight by how much of them is of it."""
        return [
            self.sources[part].weight * (samples / len(images))
            for part, images, _, samples in self._of_kind(kind)
        ]

    def weight(self, kind: int) -> float:
        """As `ShardedImages.weight`, by the sets' weights."""
        return sum(self._weights(kind))

    def array_shape(self, kind: int) -> tuple[int, ...]:
        """As `ShardedImages.array_shape`; a cache notes the grids of its own shapes."""
        _, images, own, _ = self._of_kind(kind)[0]
        return images.array_shape(own)

    def order(self, seed: int, window: int, batch_size: int, parts: int = 1, kind: int = 0) -> "MixedOrder":
        """As `ShardedImages.order`; every set shuffles a window of its own."""
        sets = self._of_kind(kind)
        streams = stream_count(batch_size, sum(samples for *_, samples in sets))
        orders = [
            images.streams(seed, window, stream_count(streams, samples), parts, own)
            for _, images, own, samples in sets
        ]
        # They share the files that a process may open, each by what it would keep open.
        wanted = [min(images.keep_open, len(images.names)) for images in self.parts]
        for images, files in zip(self.parts, wanted, strict=True):
            images.keep_open = max(1, files * MOST_OPEN // max(MOST_OPEN, sum(wanted)))
        firsts = self.firsts[[part for part, *_ in sets]]
        return MixedOrder(orders, least_shares(self._weights(kind)), firsts, seed, streams)

    def read(self, shard: int, index: int, place: np.ndarray | None = None) -> tuple[np.ndarray, Meta]:
        """As `ShardedImages.read`."""
        part = int(np.searchsorted(self.firsts, shard, side="right")) - 1
        return self.parts[part].read(shard - int(self.firsts[part]), index, place)

    def held_out(self) -> "MixedImages":
        """A mixture of the sets' `val` splits, of `train` where there is none."""
        return MixedImages(self.sources, "val", latents=self.latents is not None)

    def in_order(self, count: int | None = None) -> Iterator[tuple[np.ndarray, Meta]]:
        """The first `count` readable samples, of each set in stored order and taken in turn by weight."""
        left = len(self) if count is None else count
        sets = [images.in_order() for images in self.parts]
        alive, turn = set(range(len(sets))), 0
        while left > 0 and alive:
            part = int(block_of(self.shares, 0, 0, turn // BLOCK)[turn % BLOCK])
            turn += 1
            if part not in alive:
                continue
            sample = next(sets[part], None)
            if sample is None:
                alive.remove(part)
                continue
            left -= 1
            yield sample


class MixedOrder:
    """The streams of several sets; see `order.Order`.

    Args:
        orders: of each set alone; as many streams as go into `streams`.
        shares: samples of each set in a block, BLOCK together.
        firsts: number of each set's first shard.
        seed: of the run.
        streams: K.
    """

    def __init__(
        self, orders: list[StreamOrder], shares: np.ndarray, firsts: np.ndarray, seed: int, streams: int
    ):
        self.orders, self.shares, self.firsts, self.seed = orders, shares, firsts, seed
        self.streams = streams
        self._block = lru_cache(maxsize=2 * streams)(self._sources_and_ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedOrder, (self.orders, self.shares, self.firsts, self.seed, self.streams)

    def _sources_and_ranks(self, stream: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each sample of a block: its set, and how many of that set came before it. int64 [BLOCK]."""
        sources = block_of(self.shares, self.seed, stream, block)
        return sources, ranks_in(sources, self.shares)

    def _in_source(self, stream: int, position: int) -> tuple[int, int, int]:
        """The set of a sample, and its stream and position there."""
        block, place = divmod(position, BLOCK)
        sources, ranks = self._block(stream, block)
        source = int(sources[place])
        sharing = self.streams // self.orders[source].streams  # our streams that draw from one of the set's
        number = block * int(self.shares[source]) + int(ranks[place])
        return source, stream // sharing, number * sharing + stream % sharing

    def at(self, stream: int, position: int) -> tuple[int, int, int]:
        """See `order.Order`; epochs are those of the sample's own set."""
        source, stream, position = self._in_source(stream, position)
        epoch, shard, index = self.orders[source].at(stream, position)
        return epoch, shard + int(self.firsts[source]), index

    def stand_in(self, stream: int, position: int, attempt: int) -> tuple[int, int, int]:
        """See `order.Order`; of the same set."""
        source, stream, position = self._in_source(stream, position)
        epoch, shard, index = self.orders[source].stand_in(stream, position, attempt)
        return epoch, shard + int(self.firsts[source]), index


def open_dataset(data: str | Path | None, recipe: Recipe, latents: bool = False) -> ShardedImages:
    """A prepared data set, or for None the recipe's mixture."""
    if data is not None:
        return ShardedImages(data, latents=latents)
    return MixedImages(recipe.data.mixture, latents=latents)


def _joined(hashes: list[str | None]) -> str | None:
    """One hash over those of several sets, if all are known."""
    return None if None in hashes else hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
