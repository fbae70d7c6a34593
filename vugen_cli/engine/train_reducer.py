"""Stage 1: the reducer and the pixel decoder, trained together on the frozen VLM's latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vugen_cli.data.images import adm_crop
from vugen_cli.data.loader import Batch, ShardedImages, dataset_card, training_batches
from vugen_cli.engine.checkpoint import load_checkpoint, part, save_checkpoint, with_prefix
from vugen_cli.engine.latent_report import describe_latents, save_latent_report
from vugen_cli.engine.loop import Stage, train
from vugen_cli.engine.perceptual import Alignment, PictureLoss, picture_losses
from vugen_cli.engine.seeds import seeded_noise
from vugen_cli.errors import VugenError
from vugen_cli.flow import Solver, draw_times, flow_matching_loss
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.models.reducer import Reducer, merge
from vugen_cli.pictures import save_grid
from vugen_cli.recipe import USE_OF_VLM, Recipe, parse_recipe
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm

STATISTICS_IMAGES = 10_000  # enough for a per-channel mean and deviation to three digits
REPORT_IMAGES = 1_000


class Autoencoder(nn.Module):
    """What stage 1 trains: image latents z to z̃, and z̃ back to pixels.

    Args:
        recipe: its `reducer` and `decoder` sections.
        width: d of the VLM's z.
    """

    def __init__(self, recipe: Recipe, width: int):
        super().__init__()
        self.reducer = Reducer(recipe.reducer, width)
        self.decoder = PixelDecoder(recipe.decoder, self.reducer.channels)
        self.alignment: Alignment | None = None  # only while training with REPA

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("alignment.")}

    def loss(
        self,
        z: Tensor,
        images: Tensor,
        recipe: Recipe,
        generator: torch.Generator,
        pictures: dict[str, tuple[float, PictureLoss]],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching of the pixels given z̃, and the recipe's other terms; the total, and each by name.

        Args:
            z: [B, h, w, d] of the images.
            images: uint8 [B, 3, S, S].
            recipe: its weights.
            generator: draws times and noise.
            pictures: from `picture_losses`; they see the clean prediction.
        """
        latents, penalty = self.reducer.noisy(z, recipe.decoder.noise, generator)
        t = draw_times(len(images), recipe.flow.time, recipe.decoder.shift, generator)
        target = self.decoder.target(images)
        middle: list[Tensor] | None = [] if self.alignment else None
        clean = []

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            v = self.decoder(x, t, latents, middle)
            clean.append(x + (1 - t)[:, None, None, None] * v)
            return v

        total = flow = flow_matching_loss(velocity, target, t, generator)
        values = {"flow": flow}
        for name, (weight, picture_loss) in pictures.items():
            values[name] = picture_loss(clean[0], target, z)
            total = total + weight * values[name]
        if self.alignment and middle:
            values["repa"] = self.alignment(middle[0], z)
            total = total + recipe.decoder.losses.repa * values["repa"]
        if recipe.reducer.normalise in ("kl", "l2"):
            values[recipe.reducer.normalise] = penalty
            total = total + recipe.reducer.penalty * penalty
        return total, values if len(values) > 1 else {}


def train_reducer(recipe: Recipe, data: Path, out: Path, device: torch.device) -> Path:
    """Train stage 1 and write its checkpoint.

    Args:
        recipe: the whole run's recipe.
        data: a prepared data set.
        out: the `.safetensors` file to write; the run is kept in `<out without suffix>.run`.
        device: where to train.

    Raises:
        VugenError: bad data, VLM or recipe; a loss that is not finite.
    """
    images = ShardedImages(data)
    size = recipe.decoder.image_size or images.size
    vlm = load_vlm(recipe.vlm, device, recipe)
    vlm.prefix([""])  # stage 2 needs it: a VLM that has none must not cost hours first
    first, _ = next(images.in_order(1))
    z = vlm.encode(torch.from_numpy(first).permute(2, 0, 1)[None])
    _, height, width, _ = merge(z, recipe.reducer.merge).shape
    torch.manual_seed(recipe.seed)
    module = Autoencoder(recipe, z.shape[-1]).to(device)
    if size % module.decoder.multiple:
        raise VugenError(
            f"images of {size} px: the decoder of this recipe needs a multiple of {module.decoder.multiple}"
        )
    settings = recipe.train_reducer
    pictures = picture_losses(recipe.decoder.losses, vlm, size, device)
    if recipe.decoder.losses.repa:
        module.alignment = Alignment(recipe.decoder.channels[-1], z.shape[-1]).to(device)

    def loss(batch: Batch, generator: torch.Generator, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return module.loss(vlm.encode(batch.images), batch.images, recipe, generator, pictures)

    card = {
        "stage": "reducer",
        "step": settings.steps,
        "recipe": recipe.model_dump(mode="json"),
        "vlm": {"name": recipe.vlm, "fingerprint": vlm.fingerprint},
        "data": dataset_card(data),
        "latents": {"channels": module.reducer.channels, "grid": [height, width], "width": z.shape[-1]},
        "image_size": size,
    }
    resolved = {key: card[key] for key in ("vlm", "data", "latents", "image_size")} | {
        "recipe": recipe.model_dump(
            mode="json", include={*USE_OF_VLM, "seed", "data", "reducer", "decoder", "flow", "train_reducer"}
        )
    }

    shown = held_out_images(images, size)

    def preview(path: Path) -> None:
        decoded = decode_images(vlm, module.reducer, module.decoder, shown, recipe.seed)
        save_grid(torch.cat([shown, decoded.cpu()]), path, columns=len(shown))

    if recipe.reducer.kind == "pca":
        module.reducer.fit_pca(latents_of(vlm, images, STATISTICS_IMAGES))
    if not recipe.reducer.trained:
        module.reducer.fit_statistics(latents_of(vlm, images, STATISTICS_IMAGES))
    run = out.with_suffix(".run")
    stream = training_batches(images, recipe, settings.batch_size, recipe.data.flip, size)
    train(Stage("reducer", module, loss, preview, resolved), stream, settings, recipe.seed, run, device)
    if recipe.reducer.trained:
        module.reducer.fit_statistics(latents_of(vlm, images, STATISTICS_IMAGES))
    with torch.no_grad():
        report = describe_latents(map(module.reducer, latents_of(vlm, images, REPORT_IMAGES)))
    save_latent_report(report, out)
    save_checkpoint(out, with_prefix(module.weights(), "autoencoder"), card)
    return out


def held_out_images(images: ShardedImages, size: int) -> Tensor:
    """The pictures of a preview, uint8 [8, 3, size, size]: the first of the `val` split."""
    held_out = [adm_crop(pixels, size) for pixels, _ in images.held_out().in_order(8)]
    return torch.from_numpy(np.stack(held_out)).permute(0, 3, 1, 2)


def load_autoencoder(
    path: str | Path, device: torch.device, stage: str | None = None
) -> tuple[Autoencoder, dict[str, Tensor], dict[str, Any]]:
    """Reducer and pixel decoder of a checkpoint, with all its tensors and its card.

    Args:
        path: of a reducer or a sampler.
        device: where to put the two networks.
        stage: the one of the two it must be, if only one will do.

    Raises:
        VugenError: as `load_checkpoint`, or the file is of neither stage.
    """
    tensors, card = load_checkpoint(path, stage)
    if card.get("stage") not in ("reducer", "sampler"):
        raise VugenError(f"{path} is a {card.get('stage')} checkpoint: a reducer or sampler is needed here")
    recipe = parse_recipe(card["recipe"], str(path))
    module = Autoencoder(recipe, card["latents"]["width"])
    load_weights(module, part(tensors, "autoencoder"), path)
    return module.to(device).eval().requires_grad_(False), tensors, card


def load_decoder(
    path: str | Path, autoencoder: Autoencoder, device: torch.device
) -> tuple[PixelDecoder, dict[str, Any]]:
    """The decoder of another checkpoint, with its card, for the z̃ of this autoencoder.

    Raises:
        VugenError: as `load_autoencoder`, or its reducer is another one.
    """
    other, _, card = load_autoencoder(path, device)
    mine, theirs = autoencoder.reducer.state_dict(), other.reducer.state_dict()
    if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
        raise VugenError(
            f"{path} decodes the latents of another reducer: give one that `vugen train-reducer --distill` "
            "made from this sampler or from the reducer it was trained on"
        )
    return other.decoder, card


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict, whatever float type it is stored in.

    Raises:
        VugenError: a tensor is missing, unknown, or of another shape.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise VugenError(
            f"{path} does not fit its own recipe: {' '.join(str(error).split())[:200]}"
        ) from error


def latents_of(vlm: FrozenVLM, images: ShardedImages, count: int, batch_size: int = 64) -> Iterator[Tensor]:
    """z of the first `count` images of a split, in batches."""
    pending: list[Tensor] = []
    for pixels, _ in images.in_order(count):
        pending.append(torch.from_numpy(pixels).permute(2, 0, 1))
        if len(pending) == batch_size:
            yield vlm.encode(torch.stack(pending))
            pending.clear()
    if pending:
        yield vlm.encode(torch.stack(pending))


@torch.no_grad()
def decode_images(
    vlm: FrozenVLM,
    reducer: Reducer,
    decoder: PixelDecoder,
    images: Tensor,
    seed: int,
    steps: int | None = None,
    first: int = 0,
    solver: Solver | None = None,
) -> Tensor:
    """Images decoded from their own z̃: uint8 [B, 3, S, S] -> uint8 of the same shape.

    The noise of image i depends on the seed and its number, first + i, alone.
    """
    latents = reducer(vlm.encode(images))
    noise = torch.stack(
        [seeded_noise(images.shape[1:], seed, "reconstruct", first + i) for i in range(len(images))]
    )
    return decoder.decode(latents, noise.to(latents.device), steps, solver)
