"""Stage 1: the reducer and the pixel decoder, trained together on the frozen VLM's latents."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vugen_cli.data.images import adm_crop
from vugen_cli.data.loader import Batch, ShardedImages, training_batches
from vugen_cli.data.mixture import open_images
from vugen_cli.engine.checkpoint import load_checkpoint, part, save_checkpoint, with_prefix
from vugen_cli.engine.compiling import compile_forward, wants_compile
from vugen_cli.engine.distributed import batch_statistics, shard_frozen, shards_vlm
from vugen_cli.engine.latent_report import describe_latents, save_latent_report
from vugen_cli.engine.loop import RunOptions, Stage, differences, train
from vugen_cli.engine.perceptual import Alignment, PictureLoss, picture_losses
from vugen_cli.engine.profiling import lap
from vugen_cli.errors import VugenError
from vugen_cli.flow import Solver, draw_times, flow_matching_loss
from vugen_cli.models.latent_decoder import ImageDecoder, LatentDecoder
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.models.reducer import Reducer
from vugen_cli.models.vae import FrozenVAE, VAEDecoder, load_vae, stored_vae
from vugen_cli.pictures import save_grid
from vugen_cli.processes import is_first
from vugen_cli.recipe import USE_OF_VLM, Recipe, parse_recipe
from vugen_cli.seeds import seeded_noise
from vugen_cli.vlm.frozen import FrozenVLM, fingerprint, load_vlm

STATISTICS_IMAGES = 10_000  # enough for a per-channel mean and deviation to three digits
REPORT_IMAGES = 1_000
# What of the decoder's recipe says nothing of its weights.
DECODING = {"steps", "solver", "shift", "noise", "losses", "image_size"}


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
            self.decoder = VAEDecoder(recipe.decoder, self.reducer, vae)
        elif recipe.decoder.kind == "ldm":
            assert vae
            self.decoder = LatentDecoder(recipe.decoder, self.reducer.channels, vae)
        else:
            self.decoder = PixelDecoder(recipe.decoder, self.reducer.channels)
        self.alignment: Alignment | None = None  # only while training with REPA

    def z(self, vlm: FrozenVLM, images: Tensor) -> Tensor:
        """What the reducer reads of images, uint8 [B, 3, S, S] -> [B, h, w, d]: z, or a VAE's latents."""
        if self.reducer.recipe.kind == "vae":
            assert self.vae
            return self.vae.encode(images.to(vlm.device)).permute(0, 2, 3, 1)
        return vlm.encode(images)

    def encode(self, vlm: FrozenVLM, images: Tensor) -> Tensor:
        """z̃ of images, uint8 [B, 3, S, S] -> [B, h, w, c]."""
        return self.reducer(self.z(vlm, images))


def save_autoencoder(
    autoencoder: Autoencoder, path: Path, card: dict[str, Any], others: dict[str, Tensor] | None = None
) -> None:
    """Write a checkpoint with all that decoding needs, a VAE included, and with other tensors."""
    weights = {k: v for k, v in autoencoder.state_dict().items() if not k.startswith("alignment.")}
    tensors = with_prefix(weights, "autoencoder") | (others or {})
    if autoencoder.vae:
        tensors |= with_prefix(autoencoder.vae.model.state_dict(), "vae")
        card = {**card, "vae": autoencoder.vae.card()}
    save_checkpoint(path, tensors, card)


def reducer_loss(
    module: Autoencoder,
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
    latents, penalty = module.reducer.noisy(z, recipe.decoder.noise, generator)
    assert not isinstance(module.decoder, VAEDecoder)
    t = draw_times(len(images), recipe.flow.time, recipe.decoder.shift, generator)
    target = module.decoder.target(images)
    middle: list[Tensor] | None = [] if module.alignment else None
    clean = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = module.decoder(x, t, latents, middle)
        clean.append(x + (1 - t)[:, None, None, None] * v)
        return v

    total = flow = flow_matching_loss(velocity, target, t, generator)
    values = {"flow": flow}
    for name, (weight, picture_loss) in pictures.items():
        values[name] = picture_loss(clean[0], target, z)
        total = total + weight * values[name]
    if module.alignment and middle:
        values["repa"] = module.alignment(middle[0], z)
        total = total + recipe.decoder.losses.repa * values["repa"]
    if recipe.reducer.normalise in ("kl", "l2"):
        values[recipe.reducer.normalise] = penalty
        total = total + recipe.reducer.penalty * penalty
    return total, values if len(values) > 1 else {}


def train_reducer(
    recipe: Recipe,
    data: str | Path | None,
    out: Path,
    device: torch.device,
    reducer: Path | None = None,
    options: RunOptions = RunOptions(),
) -> Path:
    """Train stage 1 and write its checkpoint.

    Args:
        recipe: the whole run's recipe.
        data: a prepared data set; None: the recipe's mixture.
        out: the `.safetensors` file to write; the run is kept in `<out without suffix>.run`.
        device: where to train.
        reducer: a checkpoint whose reducer is kept as it is, so that samplers trained on it can draw with the
            decoder that is trained here. The decoder goes on from the checkpoint's, if it has the same sizes.
        options: of the command line.

    Raises:
        VugenError: bad data, VLM, checkpoint or recipe; a loss that is not finite.
    """
    images = open_images(data, recipe)
    size = recipe.decoder.image_size or images.size
    vlm = load_vlm(recipe.vlm, device, recipe)
    vlm.prefix([""])  # stage 2 needs it: a VLM that has none must not cost hours first
    vae = load_vae(recipe.decoder.vae, device) if recipe.decoder.vae else None
    shown = held_out_images(images, size)
    if recipe.reducer.kind == "vae" and vae:
        d, height, width = vae.encode(shown[:1].to(device)).shape[1:]
    else:
        height, width, d = vlm.encode(shown[:1]).shape[1:]
    torch.manual_seed(recipe.seed)
    module = Autoencoder(recipe, d, vae).to(device)
    module.reducer.statistics = batch_statistics
    if reducer:
        keep_reducer(module, reducer, vlm)
    if size % module.decoder.multiple:
        raise VugenError(
            f"images of {size} px: the decoder of this recipe needs a multiple of {module.decoder.multiple}"
        )
    settings = recipe.train_reducer
    if wants_compile(recipe.engine, device, settings.steps, on_cpu=False):
        compile_forward([module.decoder], must=recipe.engine.compile is True)
    pictures = picture_losses(recipe.decoder.losses, vlm, size, device)
    if recipe.decoder.losses.repa:
        module.alignment = Alignment(recipe.decoder.channels[-1], d).to(device)
    if shards_vlm(recipe.engine):
        shard_frozen(vlm.model)

    def loss(batch: Batch, generator: torch.Generator, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        z = module.z(vlm, batch.images)
        lap("frozen VLM")
        return reducer_loss(module, z, batch.images, recipe, generator, pictures)

    card = {
        "stage": "reducer",
        "step": settings.steps,
        "recipe": recipe.model_dump(mode="json"),
        "vlm": vlm.card(),
        "data": images.card(),
        "latents": {
            "channels": module.reducer.channels,
            "grid": [side // recipe.reducer.merge for side in (height, width)],
            "width": d,
        },
        "image_size": size,
    }
    kept = {"reducer": fingerprint(module.reducer)} if reducer else {}
    resolved = (
        {key: card[key] for key in ("vlm", "data", "latents", "image_size")}
        | kept
        | {
            "recipe": recipe.model_dump(
                mode="json",
                include={*USE_OF_VLM, "seed", "data", "reducer", "decoder", "flow", "train_reducer"},
            )
        }
    )

    def preview(path: Path) -> None:
        decoded = decode_images(vlm, module, shown, recipe.seed)
        save_grid(torch.cat([shown, decoded.cpu()]), path, columns=len(shown))

    def z_of(count: int) -> Iterator[Tensor]:
        return (module.z(vlm, batch) for batch in stored_images(images, count, size))

    if recipe.reducer.kind == "pca" and not reducer:
        module.reducer.fit_pca(z_of(STATISTICS_IMAGES))
    if not recipe.reducer.trained and not reducer:
        module.reducer.fit_statistics(z_of(STATISTICS_IMAGES))
    run = out.with_suffix(".run")
    stream = training_batches(images, recipe, settings.batch_size, recipe.data.flip, size)
    if recipe.reducer.kind == "vae":  # reducer and decoder are the VAE's: there is nothing to train
        module.eval()
        card["step"] = 0
    else:

        def save(path: Path, step: int) -> None:  # with the latents' running statistics
            if is_first():
                save_autoencoder(module, path, {**card, "step": step})

        stage = Stage("reducer", module, loss, preview, resolved, save=save)
        train(stage, stream, settings, recipe, run, device, options)
    if module.reducer.trained:
        module.reducer.fit_statistics(z_of(STATISTICS_IMAGES))
    with torch.no_grad():
        report = describe_latents(map(module.reducer, z_of(REPORT_IMAGES)))
    if is_first():
        save_latent_report(report, out)
        save_autoencoder(module, out, card)
    return out


def keep_reducer(module: Autoencoder, path: Path, vlm: FrozenVLM) -> None:
    """Take the reducer of a checkpoint, for good, and its decoder's weights where they fit.

    Raises:
        VugenError: as `load_autoencoder`; it was trained on another VLM or has another reducer's settings.
    """
    kept, _, card = load_autoencoder(path, vlm.device)
    vlm.check(card, path)
    mine, theirs = (reducer.recipe.model_dump() for reducer in (module.reducer, kept.reducer))
    if changed := differences(theirs, mine):
        raise VugenError(f"--reducer keeps the reducer of {path}: reducer.{changed[0]} is not possible")
    module.reducer.load_state_dict(kept.reducer.state_dict())
    module.reducer.requires_grad_(False)
    mine, theirs = (a.decoder.recipe.model_dump(exclude=DECODING) for a in (module, kept))
    if mine == theirs:
        module.decoder.load_state_dict(kept.decoder.state_dict())


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
    vae = stored_vae(card["vae"], part(tensors, "vae"), device) if "vae" in card else None
    module = Autoencoder(recipe, card["latents"]["width"], vae)
    load_weights(module, part(tensors, "autoencoder"), path)
    return module.to(device).eval().requires_grad_(False), tensors, card


def load_decoder(
    path: str | Path, autoencoder: Autoencoder, device: torch.device
) -> tuple[Autoencoder, dict[str, Any]]:
    """The autoencoder of another checkpoint, with its card, whose decoder suits the z̃ of this one.

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
    return other, card


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


def stored_images(
    images: ShardedImages, count: int, size: int | None = None, batch_size: int = 64
) -> Iterator[Tensor]:
    """The first `count` images of a split in batches, uint8 [B, 3, S, S]; `size` resizes as training does."""
    pending: list[Tensor] = []
    for pixels, _ in images.in_order(count):
        pending.append(torch.from_numpy(adm_crop(pixels, size or images.size)).permute(2, 0, 1))
        if len(pending) == batch_size:
            yield torch.stack(pending)
            pending.clear()
    if pending:
        yield torch.stack(pending)


@torch.no_grad()
def decode_images(
    vlm: FrozenVLM,
    autoencoder: Autoencoder,
    images: Tensor,
    seed: int,
    steps: int | None = None,
    numbers: Sequence[int] | None = None,
    solver: Solver | None = None,
) -> Tensor:
    """Images decoded from their own z̃: uint8 [B, 3, S, S] -> uint8 of the same shape.

    The noise of an image depends on the seed and its number alone; by default they count from 0.
    """
    latents = autoencoder.encode(vlm, images)
    numbers = range(len(images)) if numbers is None else numbers
    noise = torch.stack([seeded_noise(images.shape[1:], seed, "reconstruct", i) for i in numbers])
    return autoencoder.decoder.decode(latents, noise.to(latents.device), steps, solver)
