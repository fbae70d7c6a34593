"""Noise that depends on nothing but what it is for."""

import hashlib

import torch
from torch import Tensor


def seeded_noise(shape: tuple[int, ...] | torch.Size, *key: str | int) -> Tensor:
    """Standard normal noise, float32 on the CPU, fixed by `key` (seed, prompt, index, ...) alone."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
