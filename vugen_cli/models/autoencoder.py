"""Reducer and pixel decoder, the pair that stage 1 trains."""

import torch
from torch import Tensor, nn

from vugen_cli.data.shapes import Shape, shape_name
from vugen_cli.errors import VugenError
from vugen_cli.flow import Solver
from vugen_cli.models.latent_decoder import LatentDecoder
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.models.reducer import Reducer, merge
from vugen_cli.models.vae import FrozenVAE, VAEDecoder
from vugen_cli.recipe import Recipe
from vugen_cli.vlm.frozen import FrozenVLM
from vugen_cli.vlm.latents import check_aspect

ImageDecoder = PixelDecoder | LatentDecoder | VAEDecoder


class Autoencoder(nn.Module):
    """What stage 1 trains: image latents z to z̃, and z̃ back to pixels.

    Args:
        recipe: its `reducer` and `decoder` sections.
        width: d of the VLM's z, or the channels of the VAE where that is what the reducer reads.
        vae: of a recipe that names one.
    """

    decoder: ImageDecoder

    def __init__(self, recipe: Recipe, width: int, vae: FrozenVAE | None = None):
        super().__init__()
        self.reducer, self.vae = Reducer(recipe.reducer, width), vae
        if recipe.reducer.kind == "vae":
            assert vae
            self.decoder = VAEDecoder(recipe.decoder, recipe.reducer.merge, vae)
        elif recipe.decoder.kind == "ldm":
            assert vae
            self.decoder = LatentDecoder(recipe.decoder, self.reducer.channels, vae)
        else:
            self.decoder = PixelDecoder(recipe.decoder, self.reducer.channels)
        self.alignment: nn.Module | None = None  # only while training with REPA

    def z(self, vlm: FrozenVLM, images: Tensor) -> Tensor:
        """What the reducer reads of images, uint8 [B, 3, H, W] -> [B, h, w, d]: z, or a VAE's latents."""
        if self.reducer.recipe.kind == "vae":
            assert self.vae
            return self.vae.encode(images).permute(0, 2, 3, 1)
        return vlm.encode(images)

    @torch.no_grad()
    def grid(self, vlm: FrozenVLM, shape: Shape) -> tuple[int, int]:
        """Rows and columns of z̃ of pictures of a shape, found by encoding a grey one.

        Raises:
            VugenError: the VLM, the reducer or the decoder does not take that shape.
        """
        if any(side % self.decoder.multiple for side in shape):
            raise VugenError(
                f"pictures of {shape_name(shape)}: this decoder needs sides that are multiples of "
                f"{self.decoder.multiple}"
            )
        diffused = isinstance(self.decoder, LatentDecoder) and self.decoder.recipe.denoiser
        if shape[0] != shape[1] and diffused == "dit":
            raise VugenError(
                f"pictures of {shape_name(shape)}: decoder.denoiser=dit draws squares; set it to unet"
            )
        z = self.z(vlm, torch.full((1, 3, *shape), 127, dtype=torch.uint8))
        if self.reducer.recipe.kind != "vae":
            check_aspect(vlm, shape, z)
        rows, columns = merge(z, self.reducer.recipe.merge).shape[1:3]
        return rows, columns

    def check_shapes(self, vlm: FrozenVLM, shapes: list[Shape]) -> None:
        """See that pictures of several shapes can be trained on, where they are.

        Raises:
            VugenError: as `grid`.
        """
        for shape in shapes if len(shapes) > 1 else []:
            self.grid(vlm, shape)

    def encode(self, vlm: FrozenVLM, images: Tensor) -> Tensor:
        """z̃ of images, uint8 [B, 3, H, W] -> [B, h, w, c]."""
        return self.reducer(self.z(vlm, images))

    def decode(
        self, latents: Tensor, noise: Tensor, steps: int | None = None, solver: Solver | None = None
    ) -> Tensor:
        """Images of z̃ [B, h, w, c], uint8 [B, 3, H, W]; arguments as `PixelDecoder.decode`."""
        if isinstance(self.decoder, VAEDecoder):
            latents = latents * self.reducer.std + self.reducer.mean
        return self.decoder.decode(latents, noise, steps, solver)
