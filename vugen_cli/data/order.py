"""The order of samples: K canonical streams over the shards, fixed by the data set, the seed and the batch.

A data set is cut into K streams of equal length (to one sample), each a run of neighbouring shards, the first
and the last perhaps in part. A stream never ends: in each of its epochs it shuffles its own shards, then the
samples of a window of them together, and gives each of its samples once. Row r of a batch of B comes from
stream r * K // B. So whoever computes some rows of every batch reads some streams' shards and no others,
while what a batch holds does not depend on who computes it (as MosaicML Streaming's `num_canonical_nodes`).

Pictures of several shapes have an order for each shape, and a batch is of one. Which one, is drawn in blocks
of 1024 batches, each with every shape in proportion to its samples, shuffled by (seed, block). See `Turns`.
"""

from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np

STREAMS = 64  # at most: as many hosts as can share a data set out without reading each other's shards
LEAST = 1000  # samples of a stream: in shorter ones, lengths that differ by one would matter
BLOCK = 1024  # to one part in this many, weights of what is drawn from are kept
IN_WINDOW = 32  # stand-ins that are tried near a damaged sample before they are taken from the whole stream


def stream_count(rows: int, samples: int) -> int:
    """K: the largest divisor of `rows` that is at most 64 and leaves each stream 1000 samples."""
    most = min(STREAMS, max(1, samples // LEAST))
    return max(k for k in range(1, most + 1) if rows % k == 0)


def random_bits(*key: int) -> int:
    """64 bits fixed by some numbers; a generator of its own for each sample would cost more than its JSON."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


class Order(Protocol):
    """Where the samples of K endless streams lie. A place is (epoch, shard, index in the shard).

    Attributes:
        streams: K.
    """

    streams: int

    def at(self, stream: int, position: int) -> tuple[int, int, int]:
        """Of sample number `position` >= 0 of a stream."""
        ...

    def stand_in(self, stream: int, position: int, attempt: int) -> tuple[int, int, int]:
        """Of a sample drawn at random to stand in for that one; `attempt` counts from 0."""
        ...


class StreamOrder:
    """The streams of one data set; see `Order`.

    Args:
        counts: int64 [shards], samples in each.
        seed: of the run.
        window: samples shuffled together, over all streams; each takes its part, rounded up to whole shards.
        streams: K.
        expect: called with the numbers of shards that will be read soon, when a stream comes to a new window.
        shards: int64 [shards], what they are called; default 0, 1, ...
    """

    def __init__(
        self,
        counts: np.ndarray,
        seed: int,
        window: int,
        streams: int = 1,
        expect: Callable[[list[int]], None] | None = None,
        shards: np.ndarray | None = None,
    ):
        self.shards = np.arange(len(counts)) if shards is None else shards
        self.counts, self.seed, self.window, self.streams = counts, seed, window, streams
        self.expect = expect
        self.ends = np.cumsum(counts)
        self.total = int(self.ends[-1]) if len(counts) else 0
        self._pieces = lru_cache(maxsize=streams)(self._find_pieces)
        self._windows = lru_cache(maxsize=2 * streams)(self._shuffle_pieces)
        self._samples = lru_cache(maxsize=2 * streams)(self._shuffle_window)

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes make their own caches
        return StreamOrder, (self.counts, self.seed, self.window, self.streams, self.expect, self.shards)

    def begin(self, stream: int) -> int:
        """The number, in stored order, of a stream's first sample."""
        return stream * self.total // self.streams

    def length(self, stream: int) -> int:
        """Samples in an epoch of a stream."""
        return self.begin(stream + 1) - self.begin(stream)

    def shards_at_once(self) -> int:
        """Shards from which a stream's window is drawn, at most as a rule."""
        return 1 + int(-(-self.window * len(self.counts) // (self.streams * max(self.total, 1))))

    def at(self, stream: int, position: int) -> tuple[int, int, int]:
        epoch, place = divmod(position, self.length(stream))
        window, begin = self._window_of(stream, epoch, place)
        shard, index = self._samples(stream, epoch, window)[place - begin]
        return epoch, int(shard), int(index)

    def stand_in(self, stream: int, position: int, attempt: int) -> tuple[int, int, int]:
        length = self.length(stream)
        epoch, place = divmod(position, length)
        luck = random_bits(self.seed, stream, position, attempt)
        if attempt >= IN_WINDOW:
            return self.at(stream, epoch * length + luck % length)
        window, _ = self._window_of(stream, epoch, place)
        near = self._samples(stream, epoch, window)
        shard, index = near[luck % len(near)]
        return epoch, int(shard), int(index)

    def _window_of(self, stream: int, epoch: int, place: int) -> tuple[int, int]:
        """The window that a place of an epoch falls into, and where that window begins."""
        _, ends = self._windows(stream, epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        return window, int(ends[window - 1]) if window else 0

    def _find_pieces(self, stream: int) -> np.ndarray:
        """The stream's shards, int64 [pieces, 3]: shard, its first sample in the stream, and the end."""
        begin, end = self.begin(stream), self.begin(stream + 1)
        first = int(np.searchsorted(self.ends, begin, side="right"))
        last = int(np.searchsorted(self.ends, end, side="left"))
        shards = np.arange(first, last + 1)
        starts = self.ends[shards] - self.counts[shards]
        return np.stack(
            [
                self.shards[shards],
                np.maximum(begin - starts, 0),
                np.minimum(end - starts, self.counts[shards]),
            ],
            1,
        )

    def _shuffle_pieces(self, stream: int, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The pieces of each window of an epoch, and where in the epoch each window ends."""
        pieces = np.random.default_rng([self.seed, epoch, stream]).permutation(self._pieces(stream))
        sizes = pieces[:, 2] - pieces[:, 1]
        windows, first, size = [], 0, 0
        for i in range(len(pieces)):
            size += int(sizes[i])
            if size * self.streams >= self.window or i == len(pieces) - 1:
                windows.append(pieces[first : i + 1])
                first, size = i + 1, 0
        return windows, np.cumsum([(w[:, 2] - w[:, 1]).sum() for w in windows])

    def _shuffle_window(self, stream: int, epoch: int, window: int) -> np.ndarray:
        """Shard and index of each sample of a window, int64 [samples, 2]."""
        windows, _ = self._windows(stream, epoch)
        if self.expect:
            following = windows[window + 1 :] or self._windows(stream, epoch + 1)[0]
            self.expect([int(piece[0]) for pieces in (windows[window], following[0]) for piece in pieces])
        pairs = [np.stack(np.broadcast_arrays(s, np.arange(a, b)), 1) for s, a, b in windows[window]]
        return np.random.default_rng([self.seed, epoch, stream, window]).permutation(np.concatenate(pairs))


class Turns:
    """Which of several orders gives a batch, and which of that one's batches it is.

    Args:
        weights: of each order, its samples as a rule; at least one batch of a block comes from each.
        seed: of the run.
    """

    def __init__(self, weights: list[float], seed: int):
        self.weights, self.seed = weights, seed
        self.shares = least_shares(weights)
        self._block = lru_cache(maxsize=4)(self._shuffle)

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, (self.weights, self.seed)

    def at(self, batch: int) -> tuple[int, int]:
        """The order that gives batch number `batch`, and its number among the batches of that order."""
        block, place = divmod(batch, BLOCK)
        orders, ranks = self._block(block)
        order = int(orders[place])
        return order, block * int(self.shares[order]) + int(ranks[place])

    def _shuffle(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        orders = block_of(self.shares, self.seed, 0, block)
        return orders, ranks_in(orders, self.shares)


def block_shares(weights: list[float]) -> np.ndarray:
    """How many places of a block each source has: int64, BLOCK together, largest remainders first."""
    exact = np.array(weights) / sum(weights) * BLOCK
    shares = np.floor(exact).astype(np.int64)
    for source in np.argsort(shares - exact, kind="stable")[: BLOCK - int(shares.sum())]:
        shares[source] += 1
    return shares


def least_shares(weights: list[float]) -> np.ndarray:
    """As `block_shares`, but no source is without a place: rather too often than never."""
    shares = block_shares(weights)
    shares[shares == 0] = 1
    shares[shares.argmax()] -= shares.sum() - BLOCK
    return shares


def block_of(shares: np.ndarray, seed: int, stream: int, block: int) -> np.ndarray:
    """The source of each place of a stream's block, int64 [BLOCK]."""
    sources = np.repeat(np.arange(len(shares)), shares)
    return np.random.default_rng([seed, stream, block]).permutation(sources)


def ranks_in(sources: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Of each place of a block: how many of its source came before it. int64 [BLOCK]."""
    ranks = np.empty(BLOCK, dtype=np.int64)
    for source, share in enumerate(shares):
        ranks[sources == source] = np.arange(share)
    return ranks
