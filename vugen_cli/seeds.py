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
    """Draws for a whole batch, of which one process computes some rows; see `random_rows`.

    Args:
        device: of the numbers.
        size: rows of the whole batch.

    Attributes:
        rows: those that are computed with this generator.
        host: a generator for what the host decides, which on a GPU must not wait for numbers from there.
    """

    def __new__(cls, device: torch.device | str = "cpu", size: int = 0) -> "BatchGenerator":
        """As `torch.Generator`, which takes its device here."""
        return super().__new__(cls, device)  # type: ignore[call-arg]  # torch's types know no __new__

    def __init__(self, device: torch.device | str = "cpu", size: int = 0):
        self.size, self.rows = size, slice(0, size)
        on_host = torch.device(device).type in ("cpu", "meta")
        self.host = self if on_host else BatchGenerator("cpu", size)

    def begin(self, seed: int, first: int, count: int) -> None:
        """Start anew for `count` rows of the batch from row `first`."""
        self.manual_seed(seed)
        self.rows = slice(first, first + count)
        if self.host is not self:
            self.host.begin(seed, first, count)


def random_rows(
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
        return random((generator.size, *shape[1:]), **how)[generator.rows].clone()
    return random(tuple(shape), **how)
