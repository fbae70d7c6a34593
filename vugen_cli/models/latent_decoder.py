"""The paper's LDM decoder: latent diffusion conditioned on z̃ that ends in a frozen VAE's decoder.

The denoiser is diffusers' own, a UNet or a DiT, given z̃ as more channels beside the noised latents. It
predicts the velocity; VAE latents are no thin manifold as pixels are, so there is no reason to go through the
clean prediction here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.errors import VugenError
from vugen_cli.flow import Solver, at, solve
from vugen_cli.models.pixel_decoder import to_uint8
from vugen_cli.models.vae import FrozenVAE
from vugen_cli.recipe import Decoder as DecoderRecipe


class LatentDecoder(nn.Module):
    """Velocity of noised VAE latents given z̃, with the same interface as `PixelDecoder`.

    Args:
        recipe: the denoiser and its sizes.
        channels: of z̃.
        vae: frozen; not a part of this module's weights.

    Raises:
        VugenError: the VAE's latents hold more numbers than the noise of a picture.
    """

    def __init__(self, recipe: DecoderRecipe, channels: int, vae: FrozenVAE):
        super().__init__()
        if vae.channels > 3 * vae.factor**2:
            raise VugenError(
                f"a VAE of {vae.channels} channels at 1 / {vae.factor} of the size holds more numbers than a "
                "picture: decoder.kind=ldm needs one that compresses"
            )
        self.recipe, self.vae = recipe, vae
        widths, heads = recipe.channels, recipe.heads
        ends = {"in_channels": vae.channels + channels, "out_channels": vae.channels}
        if recipe.denoiser == "unet":
            from diffusers import UNet2DModel

            plain = len(widths) - 1
            self.denoiser: Any = UNet2DModel(
                **ends,
                block_out_channels=tuple(widths),
                layers_per_block=recipe.blocks,
                down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
                up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
                attention_head_dim=widths[-1] // heads,
                norm_num_groups=8,
            )
        else:
            from diffusers import DiTTransformer2DModel

            self.denoiser = DiTTransformer2DModel(
                **ends,
                num_attention_heads=heads,
                attention_head_dim=widths[-1] // heads,
                num_layers=recipe.middle_layers,
                patch_size=recipe.patch,
                sample_size=32,
                num_embeds_ada_norm=1,
            )
            for block in self.denoiser.transformer_blocks:
                block.norm1.emb.class_embedder.dropout_prob = 0.0  # one class, and no dice outside our seeds

    @property
    def multiple(self) -> int:
        """Image sides must be a multiple of this."""
        unet = self.recipe.denoiser == "unet"
        return self.vae.factor * (2 ** (len(self.recipe.channels) - 1) if unet else self.recipe.patch)

    def target(self, images: Tensor) -> Tensor:
        """What diffusion ends in, x at t = 1: scaled VAE latents of uint8 images [B, 3, H, W]."""
        return self.vae.encode(images)

    def forward(
        self, noised: Tensor, t: Tensor, latents: Tensor, middle: list[Tensor] | None = None
    ) -> Tensor:
        """Velocity, float [B, c, h', w'].

        Args:
            noised: VAE latents on the path to noise, [B, c, h', w'].
            t: [B] in [0, 1].
            latents: z̃ [B, h, w, ...], stretched over the VAE's grid.
            middle: stays empty; alignment (REPA) is the pixel decoder's.
        """
        # z̃ on the VAE's grid: [B, ..., h', w'].
        beside = functional.interpolate(latents.permute(0, 3, 1, 2), noised.shape[-2:], mode="bilinear")
        x = torch.cat([noised, beside.to(noised.dtype)], 1)  # [B, c + ..., h', w']
        if self.recipe.denoiser == "unet":
            return self.denoiser(x, 1000 * t).sample.float()
        label = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.denoiser(x, 1000 * t, class_labels=label).sample.float()

    def integrate(self, latents: Tensor, noise: Tensor, steps: int, solver: Solver) -> Tensor:
        """x at t = 1, scaled VAE latents.

        Args:
            latents: z̃ [B, h, w, c].
            noise: standard normal [B, 3, H, W], as every decoder takes it; its first numbers are used.
            steps, solver: see `flow.solve`.
        """
        height, width = noise.shape[2] // self.vae.factor, noise.shape[3] // self.vae.factor
        shape = (self.vae.channels, height, width)
        start = noise.flatten(1)[:, : self.vae.channels * height * width].unflatten(1, shape)
        return solve(lambda x, t: self(x, at(t, x), latents), start, steps, solver, self.recipe.shift)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, noise: Tensor, steps: int | None = None, solver: Solver | None = None
    ) -> Tensor:
        """Images of some latents, uint8 [B, 3, H, W]; arguments as `PixelDecoder.decode`."""
        end = self.integrate(latents, noise, steps or self.recipe.steps, solver or self.recipe.solver)
        return to_uint8(self.vae.decode(end))
