"""The reducer: understanding embeddings z to the reduced latents z̃ that are generated."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vugen_cli.recipe import Reducer as ReducerRecipe


class Reducer(nn.Module):
    """z [B, h, w, d] -> z̃ [B, h, w, channels] with zero mean and unit variance in each channel.

    Normalising inside the reducer fixes the latents' scale while it trains, so that it cannot outrun the
    noise that is added to z̃ by growing, and the sampler always works in a normalised space.

    Args:
        recipe: kind and sizes.
        width: d.
    """

    def __init__(self, recipe: ReducerRecipe, width: int):
        super().__init__()
        if recipe.kind == "linear":
            self.net: nn.Module = nn.Linear(width, recipe.channels)
        else:
            self.net = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, recipe.hidden),
                nn.GELU(),
                nn.Linear(recipe.hidden, recipe.channels),
            )
        self.register_buffer("mean", torch.zeros(recipe.channels))
        self.register_buffer("std", torch.ones(recipe.channels))

    def forward(self, z: Tensor) -> Tensor:
        """Normalised by the batch's own statistics in training, by the stored ones otherwise."""
        raw = self.net(z).float()
        if not self.training:
            return (raw - self.mean) / self.std
        mean, std = raw.mean((0, 1, 2)), raw.std((0, 1, 2)) + 1e-5
        with torch.no_grad():
            self.mean.lerp_(mean, 0.02)
            self.std.lerp_(std, 0.02)
        return (raw - mean) / std

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Replace the running statistics by exact ones over an iterable of z, streaming in float64."""
        count = 0
        total = squares = torch.zeros_like(self.mean, dtype=torch.float64)
        for z in batches:
            raw = self.net(z).double().flatten(0, 2)
            count, total, squares = count + len(raw), total + raw.sum(0), squares + raw.square().sum(0)
        mean = total / count
        self.mean.copy_(mean)
        self.std.copy_((squares / count - mean**2).clamp_min(1e-10).sqrt())
