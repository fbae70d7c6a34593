"""Single-step distillation: a decoder that lands in one call where its teacher (SSDD) lands in many.

The teacher's ODE is deterministic: noise and z̃ fix the picture. The student, a copy of the teacher's decoder,
learns that map by regression from t = 0. The reducer is not touched, so every sampler that was trained on the
teacher's z̃ can draw with the student.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor

from vugen_cli.card import Card, Distilled
from vugen_cli.checkpoint import fingerprint
from vugen_cli.data.loader import Batch, held_out_images, training_batches
from vugen_cli.data.mixture import open_dataset
from vugen_cli.engine.loop import train
from vugen_cli.engine.stage import RunOptions, Stage
from vugen_cli.engine.state import differences
from vugen_cli.errors import VugenError
from vugen_cli.models.vae import VAEDecoder
from vugen_cli.pictures import save_grid
from vugen_cli.processes import barrier, is_first
from vugen_cli.recipe import Recipe
from vugen_cli.sampling.trained import decode_images, load_autoencoder, save_autoencoder
from vugen_cli.seeds import random_rows
from vugen_cli.stages.losses import picture_losses
from vugen_cli.vlm.frozen import load_vlm

# What of the decoder's recipe may differ from the teacher's.
MAY_DIFFER = {"steps", "solver", "noise", "losses", "smoothing"}


def distill(
    recipe: Recipe,
    teacher: Path,
    data: str | Path | None,
    out: Path,
    device: torch.device,
    options: RunOptions = RunOptions(),
) -> Path:
    """Train a one-step student of a checkpoint's decoder and write it with the teacher's own reducer.

    Args:
        recipe: the teacher's, with the `train_reducer` section of this run; `decoder.steps` and `.solver` are
            the teacher's way to decode, and weights in `decoder.losses` add their terms to the regression.
        teacher: checkpoint of a reducer or a sampler.
        data: a prepared data set; None: the recipe's mixture.
        out: the `.safetensors` file to write; the run is kept in `<out without suffix>.run`.
        device: where to train.
        options: of the command line.

    Raises:
        VugenError: bad data, VLM or checkpoint; a recipe with other networks; a loss that is not finite.
    """
    autoencoder, _, card = load_autoencoder(teacher, device)
    expert, size = autoencoder.decoder, card.image_size
    if isinstance(expert, VAEDecoder):
        raise VugenError(f"{teacher} decodes with a VAE, in one call already: nothing to distill")
    steps, solver = recipe.decoder.steps, recipe.decoder.solver
    mine, theirs = (d.model_dump(exclude=MAY_DIFFER) for d in (recipe.decoder, expert.recipe))
    if changed := differences(theirs, mine):
        raise VugenError(f"--distill keeps the networks of {teacher}: decoder.{changed[0]} is not possible")
    if steps == 1:
        raise VugenError(f"{teacher} decodes in one step: nothing to distill; try --set decoder.steps=8")
    images = open_dataset(data, recipe)
    vlm = load_vlm(recipe.vlm, device, recipe)
    vlm.check(card, teacher)
    autoencoder.check_shapes(vlm, images.shapes)
    pictures = picture_losses(recipe.decoder.losses, vlm, size, device)
    student = copy.deepcopy(expert).requires_grad_(True)
    student.recipe = expert.recipe.model_copy(
        update={
            "steps": 1,
            "solver": "euler",
            "losses": recipe.decoder.losses,
            "smoothing": recipe.decoder.smoothing,
        }
    )
    settings = recipe.train_reducer

    def loss(batch: Batch, generator: torch.Generator, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            z = autoencoder.z(vlm, batch.images)
            latents, _ = autoencoder.reducer.noisy(z, recipe.decoder.noise, generator)
            noise = random_rows(torch.randn, batch.images.shape, generator)
            target = expert.integrate(latents, noise, steps, solver)
        reached = student.integrate(latents, noise, 1, "euler")
        values = {"regression": (reached - target).square().mean()}
        total = values["regression"]
        for name, (weight, picture_loss) in pictures.items():
            values[name] = picture_loss(reached, target, z)
            total = total + weight * values[name]
        return total, values if pictures else {}

    shown = held_out_images(images, size)

    def preview(path: Path) -> None:
        rows = [shown]
        for decoder, count, way in ((expert, steps, solver), (student, 1, "euler")):
            autoencoder.decoder = decoder
            rows.append(decode_images(vlm, autoencoder, shown, recipe.seed, count, solver=way))
        save_grid(torch.cat(rows), path, columns=len(shown))

    card = Card(
        stage="reducer",
        step=settings.steps,
        recipe=recipe.model_dump(mode="json") | {"decoder": student.recipe.model_dump(mode="json")},
        vlm=card.vlm,
        data=images.card(),
        latents=card.latents,
        image_size=size,
        distilled=Distilled(teacher=str(teacher), steps=steps, solver=solver),
    )
    resolved = card.facts("vlm", "data", "latents", "image_size") | {
        "teacher": {
            "fingerprint": fingerprint(autoencoder, "autoencoder."),
            "calls": steps,  # not `steps`, which a run may change
            "solver": solver,
        },
        "recipe": recipe.model_dump(mode="json", include={"seed", "data", "decoder", "train_reducer"}),
    }
    run = out.with_suffix(".run")
    stream = training_batches(images, recipe, settings.batch_size, recipe.data.flip, size)
    train(Stage("decoder", student, loss, preview, resolved), stream, settings, recipe, run, device, options)
    autoencoder.decoder = student
    if is_first():
        save_autoencoder(autoencoder, out, card)
    barrier("written")  # the others may read it from here on
    return out
