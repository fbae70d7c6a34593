"""Noise that depends on nothing but what it is for."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def seeded_noise(shape: tuple[int, ...] | torch.Size, *key: str | int) -> Tensor:
    """Standard normal noise, float32 on the CPU, fixed by `key` (seed, prompt, index, ...) alone."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)


class BatchGenerator(torch.Generator):
    """Draws for a whole batch, of which one process computes some rows; see `draw`.

    Attributes:
        size: rows of the whole batch.
        rows: those that are computed with this generator.
    """

    size: int
    rows: slice


def draw(
    random: Callable[..., Tensor],
    shape: tuple[int, ...] | torch.Size,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random numbers for the rows of a batch that are computed here, on the generator's device.

    A `BatchGenerator` draws for the whole batch and gives the wanted rows, so that a sample meets the same
    numbers however the batch is shared out.

    Args:
        random: `torch.rand` or `torch.randn`.
        shape: [rows, ...].
        generator: a plain one draws just these rows.
    """
    how = {"generator": generator, "device": generator.device, "dtype": dtype}
    if isinstance(generator, BatchGenerator):
        return random((generator.size, *shape[1:]), **how)[generator.rows]
    return random(tuple(shape), **how)
