"""Stage 1: the reducer and the pixel decoder, trained together on the frozen VLM's latents."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vugen_cli.card import Card, LatentsCard
from vugen_cli.checkpoint import fingerprint, read_card
from vugen_cli.data.loader import Batch, ShardedImages, held_out_images, stored_images, training_batches
from vugen_cli.data.mixture import open_dataset
from vugen_cli.engine.compiling import compile_forward, wants_compile
from vugen_cli.engine.distributed import batch_statistics, shard_frozen, shards_vlm
from vugen_cli.engine.loop import train
from vugen_cli.engine.profiling import mark
from vugen_cli.engine.stage import RunOptions, Stage
from vugen_cli.engine.state import differences
from vugen_cli.errors import VugenError
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.pixel_decoder import PixelDecoder, enlarged, fit_last_layer
from vugen_cli.pictures import save_grid
from vugen_cli.processes import barrier, is_first, world_size
from vugen_cli.recipe import DECODING, USE_OF_VLM, Recipe
from vugen_cli.sampling.trained import decode_images, load_autoencoder, load_vae, save_autoencoder
from vugen_cli.stages.latent_report import describe_latents, save_latent_report
from vugen_cli.stages.losses import Alignment, picture_losses, reducer_loss
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm
from vugen_cli.vlm.latents import check_grid

STATISTICS_IMAGES = 10_000  # enough for a per-channel mean and deviation to three digits
FITTED_PLACES = 768_000  # many times what a last layer reads at each
REPORT_IMAGES = 1_000


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
            decoder that is trained here. The decoder goes on from the checkpoint's, if it has the same sizes,
            or patches that are larger by a whole factor.
        options: of the command line.

    Raises:
        VugenError: bad data, VLM, checkpoint or recipe; a loss that is not finite.
    """
    images = open_dataset(data, recipe)
    size = recipe.decoder.image_size or images.size
    vlm = frozen_vlm(recipe, device)
    shown = held_out_images(images, size)
    module, latents = new_autoencoder(recipe, vlm, shown, device, reducer)
    check_shapes(images, module, vlm, recipe)
    if recipe.decoder.trained == "outer" and reducer and read_card(reducer).image_size != size:
        # Before anything is compiled: what a layer is given cannot be looked at in a compiled network.
        assert isinstance(module.decoder, PixelDecoder)
        seen = stored_images(images, max(16, FITTED_PLACES // (size // recipe.decoder.patch) ** 2), size)
        fit_last_layer(module.decoder, ((module.encode(vlm, batch), batch) for batch in seen), recipe.seed)
    settings = recipe.train_reducer
    if wants_compile(recipe.engine, device, settings.steps, on_cpu=False):
        compile_forward([module.decoder], must=recipe.engine.compile is True, shapes=len(images.shapes))
    pictures = picture_losses(recipe.decoder.losses, vlm, size, device)
    if recipe.decoder.losses.repa:
        module.alignment = Alignment(recipe.decoder.channels[-1], latents.width).to(device)

    def loss(batch: Batch, generator: torch.Generator, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        z = module.z(vlm, batch.images)
        mark("frozen VLM")
        return reducer_loss(module, z, batch.images, recipe, generator, pictures)

    card = Card(
        stage="reducer",
        step=settings.steps,
        recipe=recipe.model_dump(mode="json"),
        vlm=vlm.card(),
        data=images.card(),
        latents=latents,
        image_size=size,
    )

    def preview(path: Path) -> None:
        decoded = decode_images(vlm, module, shown, recipe.seed)
        save_grid(torch.cat([shown, decoded]), path, columns=len(shown))

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
        card.step = 0
    else:

        def save(path: Path, step: int) -> None:  # with the latents' running statistics
            if is_first():
                save_autoencoder(module, path, card.model_copy(update={"step": step}))

        resolved = resumed_with(recipe, card, module, kept=reducer is not None)
        stage = Stage("reducer", module, loss, preview, resolved, save=save)
        train(stage, stream, settings, recipe, run, device, options)
    if module.reducer.trained:
        module.reducer.fit_statistics(z_of(STATISTICS_IMAGES))
    with torch.no_grad():
        report = describe_latents(map(module.reducer, z_of(REPORT_IMAGES)))
    if is_first():
        save_latent_report(report, out)
        save_autoencoder(module, out, card)
    barrier("written")  # the others may read it from here on
    return out


def resumed_with(recipe: Recipe, card: Card, module: Autoencoder, kept: bool) -> dict[str, object]:
    """What a run that is taken up again must still have.

    Args:
        recipe, card, module: of the run.
        kept: whether its reducer is another checkpoint's.
    """
    used = {*USE_OF_VLM, "seed", "data", "reducer", "decoder", "flow", "train_reducer"}
    facts = card.facts("vlm", "data", "latents", "image_size")
    facts["recipe"] = recipe.model_dump(mode="json", include=used)
    if kept:
        facts["reducer"] = fingerprint(module.reducer, "autoencoder.reducer.")
    if module.vae:
        facts["vae"] = fingerprint(module.vae.model)
    if recipe.engine.accumulate > 1 and module.reducer.trained:  # z̃ is normalised within each part of a batch
        facts["accumulate"] = recipe.engine.accumulate
    return facts


def frozen_vlm(recipe: Recipe, device: torch.device) -> FrozenVLM:
    """The recipe's VLM, its weights shared out where the job does that.

    Raises:
        VugenError: it cannot be used, in stage 2 either: that must not cost hours first.
    """
    sharded = shards_vlm(recipe.engine)
    vlm = load_vlm(recipe.vlm, "cpu" if sharded else device, recipe)
    if sharded:
        shard_frozen(vlm.model, recipe.engine, device)
        vlm.device = device
    vlm.prefix([""], hidden=[0] if recipe.expert.kind == "dit" else None)
    return vlm


def new_autoencoder(
    recipe: Recipe, vlm: FrozenVLM, shown: Tensor, device: torch.device, reducer: Path | None
) -> tuple[Autoencoder, LatentsCard]:
    """Reducer and decoder for a VLM as the run begins, and the shape of their latents.

    Args:
        recipe: of the run.
        vlm: whose z is reduced.
        shown: some images, uint8 [B, 3, S, S].
        device: where they train.
        reducer: as of `train_reducer`.

    Raises:
        VugenError: a bad VAE, checkpoint or size; z is not a grid of places.
    """
    vae, size = load_vae(recipe.decoder.vae, device) if recipe.decoder.vae else None, shown.shape[-1]
    if recipe.reducer.kind == "vae" and vae:
        d, height, width = vae.encode(shown[:1].to(device)).shape[1:]
    else:
        check_grid(vlm, size)
        height, width, d = vlm.encode(shown[:1]).shape[1:]
    torch.manual_seed(recipe.seed)
    module = Autoencoder(recipe, d, vae).to(device)
    if world_size() > 1:
        module.reducer.statistics = batch_statistics
    if reducer:
        keep_reducer(module, reducer, vlm, size)
    elif recipe.decoder.trained == "outer":
        raise VugenError("decoder.trained=outer leaves the other layers as --reducer has them: give that too")
    if size % module.decoder.multiple:
        raise VugenError(
            f"images of {size} px: the decoder of this recipe needs a multiple of {module.decoder.multiple}"
        )
    grid = height // recipe.reducer.merge, width // recipe.reducer.merge
    return module, LatentsCard(channels=module.reducer.channels, grid=grid, width=d)


def check_shapes(images: ShardedImages, module: Autoencoder, vlm: FrozenVLM, recipe: Recipe) -> None:
    """See that pictures of several shapes can be trained on, where they are.

    Raises:
        VugenError: a shape does not suit the VLM, the reducer or the decoder, or losses are for squares.
    """
    if recipe.decoder.image_size not in (None, images.size):
        images.refuse_shapes(
            f"which decoder.image_size={recipe.decoder.image_size} cannot resize: leave it out"
        )
    if recipe.decoder.losses.perceptual:
        images.refuse_shapes("which decoder.losses.perceptual does not see: set it to 0")
    module.check_shapes(vlm, images.shapes)
    if recipe.reducer.kind != "vae" and len(images.shapes) > 1:
        for shape in images.shapes:
            check_grid(vlm, shape)


def keep_reducer(module: Autoencoder, path: Path, vlm: FrozenVLM, size: int) -> None:
    """Take the reducer of a checkpoint, for good, and its decoder's weights where they fit.

    Args:
        module: whose reducer and decoder they become.
        path: of the checkpoint.
        vlm: that it must have been trained on.
        size: pixels a side of what is trained on.

    Raises:
        VugenError: as `load_autoencoder`; it was trained on another VLM or has another reducer's settings, or
            a decoder whose other layers do not fit, where the outer ones alone are to be trained.
    """
    kept, _, card = load_autoencoder(path, vlm.device)
    vlm.check(card, path)
    mine, theirs = (reducer.recipe.model_dump() for reducer in (module.reducer, kept.reducer))
    if changed := differences(theirs, mine):
        raise VugenError(f"--reducer keeps the reducer of {path}: reducer.{changed[0]} is not possible")
    module.reducer.load_state_dict(kept.reducer.state_dict())
    module.reducer.requires_grad_(False)
    new, old = module.decoder.recipe, kept.decoder.recipe
    sizes, earlier = (r.model_dump(exclude=DECODING | {"patch", "preset"}) for r in (new, old))
    factor, rest = divmod(new.patch, old.patch)
    weights = kept.decoder.state_dict()
    painter = isinstance(module.decoder, PixelDecoder)  # the LDM has no patches
    fits = sizes == earlier and not rest and (factor == 1 or painter)
    if fits:
        module.decoder.load_state_dict(enlarged(weights, old.patch, factor) if factor > 1 else weights)
    if new.trained == "outer":
        if not (fits and isinstance(module.decoder, PixelDecoder)):
            raise VugenError(
                f"decoder.trained=outer: the decoder of {path} is no pdd, or differs in more than its patch: "
                "--set decoder.trained=all trains the whole"
            )
        if size != factor * card.image_size:
            raise VugenError(
                f"decoder.trained=outer: the decoder of {path} draws {factor * card.image_size} px with "
                f"decoder.patch={new.patch}, and the images have {size}"
            )
        module.decoder.requires_grad_(False)
        for layer in module.decoder.outer:
            layer.requires_grad_(True)
