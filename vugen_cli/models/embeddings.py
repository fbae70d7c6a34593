"""Features of time and place, and of the pictures that a prompt is about."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.data.sample import MOST_SOURCES
from vugen_cli.vlm.prefix import Prefix


def zeroed(linear: nn.Linear) -> nn.Linear:
    """The layer with zero weights, so that what it modulates, gates or gives starts from nothing."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def sinusoid(values: Tensor, width: int) -> Tensor:
    """Sines and cosines of `values` [...] at `width / 2` geometric frequencies, float32 [..., width]."""
    frequencies = torch.exp(
        -math.log(10_000.0) * torch.arange(width // 2, device=values.device) / (width // 2)
    )
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def grid_positions(
    height: int, width: int, channels: int, device: torch.device | str | None = None
) -> Tensor:
    """2-D sine-cosine positions (MAE, arXiv 2111.06377), row by row: float32 [height * width, channels]."""
    rows = sinusoid(torch.arange(height, device=device), channels // 2)
    columns = sinusoid(torch.arange(width, device=device), channels - channels // 2)
    return torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1).flatten(
        0, 1
    )


def stretched(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions learned for one grid, interpolated for another, as a ViT's are (arXiv 2010.11929, 3.2).

    Args:
        positions: row by row, [h * w, channels].
        old: (h, w) of their grid.
        new: (h', w') of the other.

    Returns:
        float32 [h' * w', channels]; of the same grid they are the same.
    """
    table = positions.float().unflatten(0, old).permute(2, 0, 1)[None]  # [1, channels, h, w]
    return functional.interpolate(table, new, mode="bilinear")[0].flatten(1).T.contiguous()


class TimeEmbedding(nn.Module):
    """Flow time t in [0, 1], [B] -> [B, width]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Times are scaled to [0, 1000] first, the range these frequencies are made for."""
        return self.mlp(sinusoid(1000 * t, 256))


class ReferenceEmbedding(nn.Module):
    """Tells clean tokens of a prompt's pictures from the noised ones, and one picture from another.

    Args:
        width: of the tokens.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(MOST_SOURCES, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens of each picture, [B, R, N, width], marked and in one row: [B, R N, width]."""
        return (tokens + self.weight[: tokens.shape[1], None]).flatten(1, 2)

    def unused(self, tokens: Tensor) -> Tensor:
        """The tokens of a batch without pictures, as they are, so that the weight has a gradient of zeros.

        Processes average gradients, and wait for each other's: one whose part has no pictures must bring it.
        """
        return tokens + 0 * self.weight.sum()


def visible(prefix: Prefix, count: int, references: int) -> Tensor:
    """Which keys a prompt's image tokens see, bool [B, T + N + R N]: all but padding.

    Args:
        prefix: of B prompts.
        count: N, places of the grid.
        references: R that the expert reads.
    """
    parts = [prefix.mask, prefix.mask.new_ones(len(prefix.mask), count)]
    if references:
        assert prefix.referred is not None
        parts.append(prefix.referred.repeat_interleave(count, 1))
    return torch.cat(parts, 1)
