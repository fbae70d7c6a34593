"""Options that several commands share, and how they become a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vugen_cli.errors import Stopped, VugenError

if TYPE_CHECKING:
    from vugen_cli.card import Card
    from vugen_cli.recipe import Recipe

# What a command returns: a pydantic model, which `vugen --json` prints; None where another process answers.
# No import, since that would be a heavy one, and typer reads annotations.
Answer = object

FirstDataOption = Annotated[
    str | None,
    typer.Option(help="Data set written by `vugen prepare`. [default: that of the recipe, or data/openmoji]"),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        help="Recipe: a YAML file or the name of a shipped one. "
        "[default: that of the reducer or sampler to start from, else nano]"
    ),
]
FirstRecipeOption = Annotated[
    str | None, typer.Option(help="Recipe: a YAML file or the name of a shipped one. [default: nano]")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a recipe value, as in train_sampler.lr=1e-4. Repeatable."),
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")]
StepImagesOption = Annotated[int | None, typer.Option(min=1, help="Images in a step.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. [default: a GPU if there is one]")
]
ProfileOption = Annotated[
    bool,
    typer.Option("--profile", help="Watch a few steps: print where their time goes and write a trace."),
]
LogOption = Annotated[
    list[str] | None,
    typer.Option(help="Log to tensorboard, wandb or trackio too (an extra each). Repeatable."),
]
ChangeOption = Annotated[
    bool,
    typer.Option(
        "--change-recipe", help="Go on with a stopped run though its recipe, data or VLM has changed."
    ),
]
VlmOption = Annotated[
    str | None,
    typer.Option(
        help="VLM: `nano` (bundled), a Hugging Face directory, or a hub id, also hf:owner/name@revision."
    ),
]
DecoderOption = Annotated[
    Path | None,
    typer.Option(
        help="Draw with the decoder of this checkpoint, made by `train-reducer --reducer` or `--distill`; "
        "nano-128 is bundled: the bundled sampler's pictures at 128 px. [default: the sampler's own]"
    ),
]
VlmNowOption = Annotated[
    str | None, typer.Option(help="Where the VLM is now, if not where the checkpoint says.")
]
AllowMismatchOption = Annotated[
    bool,
    typer.Option("--allow-vlm-mismatch", help="Take a VLM of other weights than the checkpoint's."),
]
ImagesOption = Annotated[
    Path | None, typer.Option(help="Folder, tar, zip or npz of images.", show_default="the last samples")
]
FeaturesOption = Annotated[
    str,
    typer.Option(
        help="What sees the images: inception[:FILE], vlm[:ID], clip:MODEL:PRETRAINED or dinov2:DIRECTORY."
    ),
]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Images a forward pass.", show_default="what is fast")
]
SamplerOption = Annotated[
    Path | None,
    typer.Option(help="Sampler checkpoint; nano is bundled.", show_default="the newest here, else nano"),
]
OutOption = Annotated[Path, typer.Option(dir_okay=False, help="Where the result is written, as JSON.")]


MAX_STEPS = 10_000  # of a solver: more are a slip of the finger
MAX_GUIDANCE = 100  # beyond, pictures are black or noise


def training_recipe(
    recipe: str | None,
    stage: str,
    steps: int | None,
    batch_size: int | None,
    overrides: list[str] | None,
    vlm: str | None = None,
    log: list[str] | None = None,
) -> "Recipe":
    """The recipe of a training command, with its options applied over `--set`."""
    from vugen_cli.recipe import load_recipe

    return on_vlm(vlm, load_recipe(recipe, _overrides(stage, steps, batch_size, overrides, log)))


@contextmanager
def going_on(out: Path) -> Iterator[None]:
    """Says, of a command that Ctrl-C ends while it writes shards, that they are kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(
            f"interrupted: finished shards are kept in {out}, and the same command goes on"
        ) from None


def recipe_from_card(
    card: "Card",
    reducer: Path,
    recipe: str | None,
    steps: int | None,
    batch_size: int | None,
    overrides: list[str] | None,
    vlm: str | None,
    stage: str,
    kept: tuple[str, ...],
    log: list[str] | None = None,
    training: dict[str, Any] | None = None,
) -> "Recipe":
    """The recipe of a stage that starts from a checkpoint: the given one or the checkpoint's, with the
    `kept` networks and the VLM of that checkpoint, and without a given one, with what is said of `training`.

    Raises:
        VugenError: `--set` would change what those networks were trained on.
    """
    from vugen_cli.recipe import DECODING, load_recipe, parse_recipe

    stored = card.recipe
    own = {**stored, stage: {**stored.get(stage, {}), **(training or {})}}
    values = own if recipe is None else load_recipe(recipe).model_dump()
    fixed = {key: stored[key] for key in (*kept, "vlm", "latents", "vlm_size") if key in stored}
    given = _overrides(stage, steps, batch_size, overrides, log)
    unchanged = parse_recipe({**values, **fixed}, str(reducer))
    resolved = parse_recipe({**values, **fixed}, str(reducer), given)
    weightless = {"decoder": DECODING}
    left = set(kept) - {"expert"} if stage == "train_sampler" else set()  # stage 1 tells by itself
    for key in ("latents", "vlm_size", *sorted(left)):
        old, new = (each.model_dump(include={key}, exclude=weightless) for each in (unchanged, resolved))
        if old != new:
            raise VugenError(f"--set cannot change {key}: it is kept as {reducer} has it")
    return on_vlm(vlm, resolved)


def at_size_of(card: "Card", reducer: "Card") -> "Card":
    """The card of a sampler that is trained further on the latents of another checkpoint of its reducer.

    Its own recipe, with how the other's z̃ are made and drawn. Its `flow.shift` grows with the square root of
    the places, as the times should by which as much is left of a picture (arXiv 2403.03206, eq. 23).
    """
    from math import prod

    from vugen_cli.recipe import parse_recipe

    flow = parse_recipe(card.recipe, "the sampler's card").flow
    shift = flow.shift_of(card.latents.grid, card.latents.channels)
    shift *= (prod(reducer.latents.grid) / prod(card.latents.grid)) ** 0.5
    keys = ("reducer", "decoder", "latents", "vlm_size", "vlm_dtype")
    theirs = {key: reducer.recipe[key] for key in keys if key in reducer.recipe}
    recipe = {**card.recipe, **theirs, "flow": {**flow.model_dump(), "shift": shift}}
    return reducer.model_copy(update={"recipe": recipe})


def at_size_of_data(card: "Card") -> "Card":
    """The card of a checkpoint whose decoder is trained further, to draw pictures of the size of the data.

    A `decoder.image_size` that is the size of the data it was trained on says nothing of other data, and what
    of the decoder was trained then nothing of what is to be trained now.
    """
    decoder = {**card.recipe.get("decoder", {}), "trained": "all"}
    if card.image_size == card.data.size:
        decoder["image_size"] = None
    return card.model_copy(update={"recipe": {**card.recipe, "decoder": decoder}})


def data_of(
    resolved: "Recipe", data: str | None, card: "Card | None" = None, own_recipe: bool = True
) -> str | None:
    """What to train on: --data, or the recipe's mixture (None), or what the checkpoint was trained on.

    Args:
        resolved: its mixture is emptied where --data is given, and filled from the card where that has one.
        data: as given.
        card: of the checkpoint to start from.
        own_recipe: the recipe is the user's own, not the checkpoint's.

    Raises:
        VugenError: a checkpoint, which may be a stranger's, names an address.
    """
    from vugen_cli.recipe import MixtureSource

    if data is not None:
        resolved.data.mixture = []
        return data
    if not resolved.data.mixture:
        own_recipe = False
        resolved.data.mixture = [MixtureSource(**source) for source in (card and card.data.mixture) or []]
    named = [source.path for source in resolved.data.mixture] or [card.data.path if card else "data/openmoji"]
    if card is not None and not own_recipe:
        for path in named:
            refuse_address(path)
    return None if resolved.data.mixture else named[0]


def one_set(resolved: "Recipe", data: str | None) -> str:
    """What to train on, as `data_of`, for a command that takes no mixture.

    Raises:
        VugenError: the recipe has one, and no --data is given.
    """
    source = data_of(resolved, data)
    if source is None:
        raise VugenError(
            "the recipe has a data.mixture, and this stage trains on one set: name it with --data"
        )
    return source


def beside(data: Path, ending: str) -> Path:
    """Where to write what is made of a data set, if nobody says: beside it, under its name and an ending."""
    named = data.resolve() if data.name in ("", "..") else data
    return named.with_name(f"{named.name}-{ending}")


def refuse_address(path: str) -> None:
    """Addresses are opened only where the user gives them: a stranger's may lead anywhere.

    Raises:
        VugenError: a checkpoint names a URL as its data.
    """
    if "://" in path:
        raise VugenError(
            f"the checkpoint's data lies elsewhere, which is not opened unless you give it yourself: "
            f"--data '{path}', or a recipe of your own"
        )


def _overrides(
    stage: str,
    steps: int | None,
    batch_size: int | None,
    overrides: list[str] | None,
    log: list[str] | None,
) -> list[str]:
    given = {f"{stage}.steps": steps, f"{stage}.batch_size": batch_size, "log": log or None}
    return [*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value is not None)]


def on_vlm(vlm: str | None, recipe: "Recipe") -> "Recipe":
    """A recipe with the VLM of the command line, if that names one: as it is typed, not as YAML reads it."""
    if vlm is not None and not vlm.strip():
        raise VugenError("--vlm is empty: give nano, a Hugging Face directory or a hub id")
    return recipe if vlm is None else recipe.model_copy(update={"vlm": vlm})


def require_safetensors(out: Path) -> None:
    """Refuse an output name that would not say what the file is, or that a folder has."""
    if out.is_dir():
        raise VugenError(f"--out {out} is a folder: give the name of a file")
    if out.suffix != ".safetensors":
        raise VugenError(
            f"--out {out}: checkpoints are safetensors files; give a name that ends in .safetensors"
        )
