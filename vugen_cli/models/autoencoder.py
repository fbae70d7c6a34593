"""Reducer and pixel decoder, the pair that stage 1 trains."""

from torch import Tensor, nn

from vugen_cli.flow import Solver
from vugen_cli.models.latent_decoder import LatentDecoder
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.models.reducer import Reducer
from vugen_cli.models.vae import FrozenVAE, VAEDecoder
from vugen_cli.recipe import Recipe
from vugen_cli.vlm.frozen import FrozenVLM

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
        """What the reducer reads of images, uint8 [B, 3, S, S] -> [B, h, w, d]: z, or a VAE's latents."""
        if self.reducer.recipe.kind == "vae":
            assert self.vae
            return self.vae.encode(images.to(vlm.device)).permute(0, 2, 3, 1)
        return vlm.encode(images)

    def encode(self, vlm: FrozenVLM, images: Tensor) -> Tensor:
        """z̃ of images, uint8 [B, 3, S, S] -> [B, h, w, c]."""
        return self.reducer(self.z(vlm, images))

    def decode(
        self, latents: Tensor, noise: Tensor, steps: int | None = None, solver: Solver | None = None
    ) -> Tensor:
        """Images of z̃ [B, h, w, c], uint8 [B, 3, S, S]; arguments as `PixelDecoder.decode`."""
        if isinstance(self.decoder, VAEDecoder):
            latents = latents * self.reducer.std + self.reducer.mean
        return self.decoder.decode(latents, noise, steps, solver)
