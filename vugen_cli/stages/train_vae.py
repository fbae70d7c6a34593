"""A small `AutoencoderKL` from scratch, for the LDM decoder and the baseline where none can be had."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vugen_cli.data.loader import Batch, ShardedImages, held_out_images, stored_images, training_batches
from vugen_cli.data.mixture import open_dataset
from vugen_cli.engine.loop import train
from vugen_cli.engine.stage import RunOptions, Stage
from vugen_cli.errors import VugenError
from vugen_cli.files import refuse_foreign, whole_folder
from vugen_cli.models.pixel_decoder import to_pixels, to_uint8
from vugen_cli.pictures import save_grid
from vugen_cli.processes import is_first
from vugen_cli.recipe import VAE, Recipe
from vugen_cli.seeds import random_rows
from vugen_cli.stages.losses import PictureLoss, picture_losses
from vugen_cli.stages.train_reducer import STATISTICS_IMAGES
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm


class VAETraining(nn.Module):
    """The autoencoder and its loss.

    Args:
        recipe: sizes and the weight of KL.
        pictures: from `picture_losses`; they see the decoded picture.
        vlm: whose z those losses compare with; None if none of them asks for it.
    """

    def __init__(
        self,
        recipe: VAE,
        pictures: dict[str, tuple[float, PictureLoss]] | None = None,
        vlm: FrozenVLM | None = None,
    ):
        super().__init__()
        from diffusers import AutoencoderKL

        levels = len(recipe.widths)
        self.kl, self.pictures, self.vlm = recipe.kl, pictures or {}, vlm
        self.model: Any = AutoencoderKL(
            block_out_channels=tuple(recipe.widths),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=recipe.blocks,
            latent_channels=recipe.channels,
            norm_num_groups=8,
        )

    def loss(self, batch: Batch, generator: torch.Generator, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean square error of the pixels, KL of the posterior to a standard normal (arXiv 1312.6114), and
        the recipe's picture losses, as latent diffusion's VAEs have (arXiv 2112.10752).
        """
        pixels = to_pixels(batch.images)
        posterior = self.model.encode(pixels).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        noise = random_rows(torch.randn, mean.shape, generator)
        decoded = self.model.decode(mean + (0.5 * log_variance).exp() * noise).sample
        values = {
            "pixels": (decoded.float() - pixels).square().mean(),
            "kl": 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(),
        }
        total = values["pixels"] + self.kl * values["kl"]
        z = self.vlm.encode(batch.images) if self.vlm else pixels  # LPIPS reads no z
        for name, (weight, picture_loss) in self.pictures.items():
            values[name] = picture_loss(decoded, pixels, z)
            total = total + weight * values[name]
        return total, values


def train_vae(
    recipe: Recipe,
    data: str | Path | None,
    out: Path,
    device: torch.device,
    options: RunOptions = RunOptions(),
) -> Path:
    """Train a VAE and save it as a diffusers directory, whole or not at all.

    Its `scaling_factor` and `shift_factor` give the latents of the training set zero mean and unit variance.
    The run's states, metrics, curves and previews are kept in `<out>.run`.

    Args:
        recipe: its `vae` and `train_vae` sections, and its `vlm` if `vae.losses` look through it.
        data: a prepared data set; None: the recipe's mixture.
        out: the directory to write.
        device: where to train.
        options: of the command line.

    Raises:
        VugenError: bad data, sizes or VLM; something else is at `out`; a loss that is not finite.
    """
    out = out.absolute()
    run = out.with_name(out.name + ".run")
    refuse_foreign(out, run)
    images = open_dataset(data, recipe)
    if recipe.vae.losses.perceptual:
        images.refuse_shapes("which vae.losses.perceptual does not see: set it to 0")
    factor = 2 ** (len(recipe.vae.widths) - 1)
    if any(side % factor for shape in images.shapes for side in shape):
        raise VugenError(f"images of {images.size} px: this VAE needs a multiple of {factor}; see vae.widths")
    vlm = load_vlm(recipe.vlm, device, recipe) if recipe.vae.losses.perceptual else None
    pictures = picture_losses(recipe.vae.losses, vlm, images.size, device)
    torch.manual_seed(recipe.seed)
    training = VAETraining(recipe.vae, pictures, vlm).to(device)
    shown = held_out_images(images, images.size)

    @torch.no_grad()
    def preview(path: Path) -> None:
        mean = training.model.encode(to_pixels(shown.to(device))).latent_dist.mean
        save_grid(torch.cat([shown, to_uint8(training.model.decode(mean).sample).cpu()]), path, len(shown))

    resolved = {
        "recipe": recipe.model_dump(mode="json", include={"seed", "data", "vae", "train_vae"}),
        **({"vlm": vlm.card().model_dump(mode="json")} if vlm else {}),
        "data": images.card().model_dump(mode="json"),
    }
    settings = recipe.train_vae
    stream = training_batches(images, recipe, settings.batch_size, recipe.data.flip)
    stage = Stage("vae", training, training.loss, preview, resolved)
    train(stage, stream, settings, recipe, run, device, options)
    mean, std = latent_statistics(training.model, images, device)
    training.model.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    if is_first():
        with whole_folder(out) as temporary:
            training.model.save_pretrained(temporary)
    return out


@torch.no_grad()
def latent_statistics(model: Any, images: ShardedImages, device: torch.device) -> tuple[float, float]:
    """Mean and deviation of all latent values over the set, streaming in float64."""
    count, total, squares = 0, 0.0, 0.0
    for batch in stored_images(images, STATISTICS_IMAGES):
        latents = model.encode(to_pixels(batch.to(device))).latent_dist.mean.cpu().double()
        count += latents.numel()
        total, squares = total + latents.sum().item(), squares + latents.square().sum().item()
    mean = total / count
    return mean, (squares / count - mean**2) ** 0.5
