"""Several data sets as one, drawn from by weights (the paper's StockMix is such a mixture).

Sample n of a mixture is a pure function of (sets, weights, seed, n), as it is of one set: samples come in
blocks of 1024, each with the same number from every source, shuffled by (seed, block). How many came from a
source before sample n is then known without counting, and is the sample's number in that source's own order:
each of its samples comes once in its own epoch, however long the epochs of the others are.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vugen_cli.data.loader import ShardedImages, ShuffledOrder
from vugen_cli.data.manifest import dataset_card
from vugen_cli.errors import VugenError
from vugen_cli.recipe import MixtureSource, Recipe

BLOCK = 1024  # to one part in this many, weights are kept


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
                    f"different size, or one is a latent cache; prepare them alike"
                )
        self.size, self.latents = first.size, first.latents
        self.counts = np.concatenate([images.counts for images in self.parts])
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

    def card(self) -> dict[str, Any]:
        """As of one set, with the first one's path for scores to compare with, and `mixture`."""
        cards = [dataset_card(source.path) for source in self.sources]
        return {
            "path": cards[0]["path"],
            "dataset": " + ".join(card["dataset"] for card in cards),
            "size": self.size,
            "licence": "; ".join(dict.fromkeys(card["licence"] for card in cards if card["licence"])) or None,
            "counts": {"train": sum(card["counts"].get("train", 0) for card in cards)},
            "mixture": [source.model_dump(mode="json") for source in self.sources],
        }

    def order(self, seed: int, window: int) -> "MixedOrder":
        """Where sample n of a seeded stream lies."""
        orders = [images.order(seed, window) for images in self.parts]
        return MixedOrder(orders, self.shares, self.firsts, seed)

    def read(
        self, shard: int, index: int, place: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As `ShardedImages.read`."""
        part = int(np.searchsorted(self.firsts, shard, side="right")) - 1
        return self.parts[part].read(shard - int(self.firsts[part]), index, place)

    def held_out(self) -> "MixedImages":
        """A mixture of the sets' `val` splits, of `train` where there is none."""
        return MixedImages(self.sources, "val", latents=self.latents is not None)

    def in_order(self, count: int | None = None) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """The first `count` readable samples, of each set in stored order and taken in turn by weight."""
        left = len(self) if count is None else count
        sets = [images.in_order() for images in self.parts]
        alive, turn = set(range(len(sets))), 0
        while left > 0 and alive:
            part = int(block_of(self.shares, 0, turn // BLOCK)[turn % BLOCK])
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
    """Where sample n of an endless, seeded stream of several sets lies.

    Args:
        orders: of each set alone.
        shares: samples of each set in a block, BLOCK together.
        firsts: number of each set's first shard.
        seed: of the run.
    """

    def __init__(self, orders: list[ShuffledOrder], shares: np.ndarray, firsts: np.ndarray, seed: int):
        self.orders, self.shares, self.firsts, self.seed = orders, shares, firsts, seed
        self._block = lru_cache(maxsize=2)(self._sources_and_ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedOrder, (self.orders, self.shares, self.firsts, self.seed)

    def _sources_and_ranks(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        sources = block_of(self.shares, self.seed, block)
        ranks = np.empty(BLOCK, dtype=np.int64)
        for source, share in enumerate(self.shares):
            ranks[sources == source] = np.arange(share)
        return sources, ranks

    def __getitem__(self, n: int) -> tuple[int, int, int]:
        """(epoch of its set, shard, index in shard) of sample n >= 0."""
        block, place = divmod(n, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[place])
        epoch, shard, index = self.orders[source][block * int(self.shares[source]) + int(ranks[place])]
        return epoch, shard + int(self.firsts[source]), index


def block_shares(weights: list[float]) -> np.ndarray:
    """How many samples of a block come from each source: int64, BLOCK together, largest remainders first."""
    exact = np.array(weights) / sum(weights) * BLOCK
    shares = np.floor(exact).astype(np.int64)
    for source in np.argsort(shares - exact, kind="stable")[: BLOCK - int(shares.sum())]:
        shares[source] += 1
    return shares


def block_of(shares: np.ndarray, seed: int, block: int) -> np.ndarray:
    """The source of each sample of a block, int64 [BLOCK]."""
    return np.random.default_rng([seed, block, 2]).permutation(np.repeat(np.arange(len(shares)), shares))


def open_images(data: str | Path | None, recipe: Recipe, latents: bool = False) -> ShardedImages:
    """A prepared data set, or for None the recipe's mixture."""
    if data is not None:
        return ShardedImages(data, latents=latents)
    return MixedImages(recipe.data.mixture, latents=latents)
