"""Fixed features of time and place."""

import math

import torch
from torch import Tensor, nn


def sinusoid(values: Tensor, width: int, longest: float = 10_000.0) -> Tensor:
    """Sines and cosines of `values` [...] at `width / 2` geometric frequencies, float32 [..., width]."""
    frequencies = torch.exp(
        -math.log(longest) * torch.arange(width // 2, device=values.device) / (width // 2)
    )
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def grid_positions(height: int, width: int, channels: int) -> Tensor:
    """2-D sine-cosine positions (MAE, arXiv 2111.06377), row by row: float32 [height * width, channels]."""
    rows = sinusoid(torch.arange(height), channels // 2)
    columns = sinusoid(torch.arange(width), channels - channels // 2)
    return torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1).flatten(
        0, 1
    )


class TimeEmbedding(nn.Module):
    """Flow time t in [0, 1], [B] -> [B, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Times are scaled to [0, 1000] first, the range these frequencies are made for."""
        return self.mlp(sinusoid(1000 * t, 256))
