"""The order in which a source's items are written: seeded, and computed in parts, whatever their number."""

from functools import cached_property
from typing import Any

import numpy as np

WHOLE = 1 << 22  # up to so many items, the order is one permutation
BLOCK = 64  # neighbours of a larger source that stay together, so that they can be read together
STRETCH = 16  # blocks that are shuffled together


class Shuffled:
    """Which item of the source comes at each position of a data set.

    Up to four million items are permuted as a whole. More are permuted in blocks of 64 neighbours, and the
    items of 16 blocks together: memory stays small (100 million items take 13 MB), and a shard is read from a
    few places of the source. Sent to another process, it takes no more than its four numbers.

    Args:
        items: of the source.
        seed: of the shuffle.
        count: a random subset of this many items (all if the source has fewer).
    """

    def __init__(self, items: int, seed: int, count: int | None = None):
        self.items, self.seed = items, seed
        self.count = items if count is None else min(items, count)

    def __len__(self) -> int:
        return self.count

    def __reduce__(self) -> tuple[Any, ...]:
        return Shuffled, (self.items, self.seed, self.count)

    def part(self, first: int, last: int) -> np.ndarray:
        """Source indices of positions `first` to `last` (exclusive), int64."""
        last = min(last, self.count)
        if self.items <= WHOLE:
            return self._places[first:last]
        size = BLOCK * STRETCH
        stretches = [self._stretch(number) for number in range(first // size, -(-last // size))]
        begin = first // size * size
        return np.concatenate(stretches)[first - begin : last - begin]

    @cached_property
    def _places(self) -> np.ndarray:
        """Of a small source, the order; of a large one, the order of its whole blocks."""
        return np.random.default_rng(self.seed).permutation(
            self.items if self.items <= WHOLE else self.items // BLOCK
        )

    def _stretch(self, number: int) -> np.ndarray:
        blocks = self._places[number * STRETCH : (number + 1) * STRETCH]
        items = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        if len(blocks) < STRETCH:  # the last one: what was left over from whole blocks
            items = np.concatenate([items, np.arange(self.items // BLOCK * BLOCK, self.items)])
        return np.random.default_rng([self.seed, number]).permutation(items)
