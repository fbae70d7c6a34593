"""A frozen diffusers `AutoencoderKL`: where the LDM decoder diffuses, and the paper's baseline latents."""

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.card import VAECard
from vugen_cli.checkpoint import fingerprint
from vugen_cli.flow import Solver
from vugen_cli.models.pixel_decoder import to_pixels, to_uint8
from vugen_cli.recipe import Decoder as DecoderRecipe


class FrozenVAE:
    """An autoencoder used as it is, on latents of about zero mean and unit variance.

    It is no `nn.Module` on purpose: its weights are neither trained, averaged nor kept in a run's states. A
    finished checkpoint holds them once, so that it can be used without the VAE's own files.

    Args:
        model: a diffusers `AutoencoderKL`.
        name: where it came from.

    Attributes:
        channels: of its latents.
        factor: pixels a side of one place of the latents.
    """

    def __init__(self, model: Any, name: str):
        self.model, self.name = model.eval().requires_grad_(False), name
        self.channels: int = model.config.latent_channels
        self.factor: int = 2 ** (len(model.config.block_out_channels) - 1)
        self.scale: float = model.config.scaling_factor
        self.shift: float = model.config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean, scaled: uint8 [B, 3, H, W] -> float32 [B, channels, H / f, W / f]."""
        pixels = to_pixels(images.to(self.model.device))
        return (self.model.encode(pixels).latent_dist.mean.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`: float32 pixels [B, 3, H, W], about [-1, 1]."""
        return self.model.decode(latents / self.scale + self.shift).sample.float()

    def card(self) -> VAECard:
        """What a checkpoint's card says of it; enough to build it again."""
        config = json.loads(self.model.to_json_string())
        return VAECard(name=self.name, fingerprint=fingerprint(self.model), config=config)


class VAEDecoder(nn.Module):
    """The baseline's decoder: the VAE's own, on its latents as they were before the reducer normalised them.

    Args:
        recipe: kept for its `steps`; there is nothing else to set.
        merge: of the reducer.
        vae: whose latents the reducer normalises.
    """

    def __init__(self, recipe: DecoderRecipe, merge: int, vae: FrozenVAE):
        super().__init__()
        self.recipe, self.merge, self.vae = recipe.model_copy(update={"steps": 1}), merge, vae

    @property
    def multiple(self) -> int:
        """Image sides must be a multiple of this."""
        return self.vae.factor * self.merge

    def decode(
        self, latents: Tensor, noise: Tensor, steps: int | None = None, solver: Solver | None = None
    ) -> Tensor:
        """Images of σ z̃ + μ [B, h, w, c], uint8 [B, 3, H, W]; nothing is diffused: the rest has no effect."""
        return to_uint8(self.vae.decode(functional.pixel_shuffle(latents.permute(0, 3, 1, 2), self.merge)))
