"""The reducer: understanding embeddings z to the reduced latents z̃ that are generated."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.errors import VugenError
from vugen_cli.models.embeddings import grid_positions
from vugen_cli.moments import Moments
from vugen_cli.recipe import Reducer as ReducerRecipe
from vugen_cli.seeds import random_rows


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of [B, h, w, channels]."""
    return x.mean((0, 1, 2)), x.std((0, 1, 2))


class Reducer(nn.Module):
    """z [B, h, w, d] -> z̃ [B, h, w, channels] with zero mean and unit variance in each channel.

    Normalising inside the reducer fixes the latents' scale while it trains, so that it cannot outrun the
    noise that is added to z̃ by growing, and the sampler always works in a normalised space. With `merge` of 2
    the grid is halved first.

    Args:
        recipe: kind, sizes, and what keeps the scale.
        width: d.

    Attributes:
        channels: of z̃.
        mean, std: float32 [channels], what the network's output is normalised by outside training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, recipe: ReducerRecipe, width: int):
        super().__init__()
        self.recipe = recipe
        self.statistics = channel_statistics  # of a batch; training over several processes sets its own
        width *= recipe.merge**2
        self.channels = width if recipe.kind in ("identity", "vae") else recipe.channels
        if recipe.kind == "pca" and recipe.channels > width:
            raise VugenError(
                f"reducer.channels={recipe.channels}: PCA of {width} values has no more than those"
            )
        out = self.channels * (2 if recipe.normalise == "kl" else 1)  # KL: a mean and a log-variance
        if recipe.kind in ("identity", "vae"):
            self.net: nn.Module = nn.Identity()
        elif recipe.kind == "attention":
            self.net = GridAttention(recipe, width, out)
        elif recipe.kind == "mlp":
            self.net = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, recipe.hidden), nn.GELU(), nn.Linear(recipe.hidden, out)
            )
        else:
            self.net = nn.Linear(width, out)
        if not recipe.trained:
            self.net.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("std", torch.ones(self.channels))

    @property
    def trained(self) -> bool:
        """Whether its weights are to be trained here: not if they are fitted, or kept from a checkpoint."""
        return any(weight.requires_grad for weight in self.net.parameters())

    def forward(self, z: Tensor) -> Tensor:
        """Normalised by the batch's own statistics in training, by the stored ones otherwise."""
        return self._normalised(self.raw(z)[0])

    def noisy(self, z: Tensor, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """z̃ as the decoder sees it in training, and the penalty that keeps its scale (a scalar).

        The noise (RAE, arXiv 2510.11690) has a standard deviation drawn between 0 and `noise` for each image.
        It is in units of z̃'s own spread; under `kl` it is in units of the network's output, whose scale the
        penalty holds, and so is the posterior's noise (arXiv 1312.6114).
        """
        raw, log_variance = self.raw(z)
        latents = self._normalised(raw)
        size = (len(latents), 1, 1, 1)
        spread = noise * random_rows(torch.rand, size, generator)
        if log_variance is not None:
            spread = spread / self.std
        # z̃ + a n, a ~ U(0, `decoder.noise`), n ~ N(0, 1)
        latents = latents + spread * random_rows(torch.randn, latents.shape, generator)
        if log_variance is None:
            return latents, latents.new_zeros(())
        posterior = random_rows(torch.randn, latents.shape, generator)
        latents = latents + (0.5 * log_variance).exp() / self.std * posterior
        # KL(N(m, s²) ‖ N(0, 1)) = (m² + s² - 1 - log s²) / 2
        return latents, 0.5 * (raw.square() + log_variance.exp() - 1 - log_variance).mean()

    def raw(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output before normalising, float32 [B, h, w, channels], and KL's log-variance."""
        out = self.net(merge(z, self.recipe.merge)).float()  # W z: [B, h, w, channels], twice those for KL
        if self.recipe.normalise == "kl":
            mean, log_variance = out.chunk(2, -1)
            return mean, log_variance.clamp(-30, 20)
        return out, None

    def _normalised(self, raw: Tensor) -> Tensor:
        if not self.training or not self.trained:
            return (raw - self.mean) / self.std  # z̃ = (W z - μ) / σ
        mean, std = self.statistics(raw)
        std = std + 1e-5
        with torch.no_grad():
            self.mean.lerp_(mean, 0.02)
            self.std.lerp_(std, 0.02)
        if self.recipe.normalise == "kl":  # which holds the scale; this only follows it
            return (raw - self.mean) / self.std
        return (raw - mean) / std

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Replace the running statistics by exact ones over an iterable of z, streaming in float64."""
        count = 0
        total = squares = torch.zeros(self.mean.shape, dtype=torch.float64)
        for z in batches:
            raw = self.raw(z)[0].cpu().double().flatten(0, 2)  # MPS has no float64
            count, total, squares = count + len(raw), total + raw.sum(0), squares + raw.square().sum(0)
        mean = total / count  # μ = E[W z], σ² = E[(W z)²] - μ²
        self.mean.copy_(mean)
        self.std.copy_((squares / count - mean**2).clamp_min(1e-10).sqrt())

    @torch.no_grad()
    def fit_pca(self, batches: Iterable[Tensor]) -> None:
        """Make the linear map the leading principal directions of an iterable of z; no training.

        The covariance is summed up streaming in float64. Each direction's largest entry is positive, so that
        the same data give the same reducer.
        """
        assert isinstance(self.net, nn.Linear)
        moments = Moments()
        for z in batches:
            moments.update(merge(z, self.recipe.merge).flatten(0, 2))
        # W: the first eigenvectors of E[z zᵀ] - E[z] E[z]ᵀ
        _, vectors = torch.linalg.eigh(torch.from_numpy(moments.covariance))  # eigenvalues ascend
        directions = vectors.flip(1)[:, : self.channels].T
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        directions = directions * largest.sign()
        self.net.weight.copy_(directions)
        self.net.bias.copy_(-directions @ torch.from_numpy(moments.mean))


class GridAttention(nn.Module):
    """Transformer blocks over the grid, so that a place can leave to its neighbours what they already say."""

    def __init__(self, recipe: ReducerRecipe, width: int, out: int):
        super().__init__()
        self.proj_in = nn.Linear(width, recipe.hidden)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                recipe.hidden,
                recipe.heads,
                4 * recipe.hidden,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(recipe.layers)
        )
        self.proj_out = nn.Sequential(nn.LayerNorm(recipe.hidden), nn.Linear(recipe.hidden, out))

    def forward(self, z: Tensor) -> Tensor:
        """[B, h, w, width] -> [B, h, w, out], any grid."""
        height, width = z.shape[1:3]
        x = self.proj_in(z.flatten(1, 2))  # [B, h w, hidden]
        x = x + grid_positions(height, width, x.shape[-1], x.device).to(x)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x).unflatten(1, (height, width))


def merge(z: Tensor, factor: int) -> Tensor:
    """Fold factor x factor places of a grid into one: [B, h, w, d] -> [B, h / f, w / f, d f²].

    Raises:
        VugenError: the grid cannot be divided so.
    """
    if factor == 1:
        return z
    if z.shape[1] % factor or z.shape[2] % factor:
        raise VugenError(
            f"reducer.merge={factor}: a grid of {z.shape[1]} x {z.shape[2]} cannot be divided so; set it to 1"
        )
    return functional.pixel_unshuffle(z.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
