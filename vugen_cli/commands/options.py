"""Options that several commands share, and how they become a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vugen_cli.recipe import Recipe

DataOption = Annotated[Path, typer.Option(help="Data set written by `vugen prepare`.")]
RecipeOption = Annotated[
    str | None, typer.Option(help="Recipe: a YAML file or the name of a shipped one. [default: nano]")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe value, as in train_sampler.lr=1e-4. Repeatable.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. [default: a GPU if there is one]")]
VlmOption = Annotated[
    str | None, typer.Option(help="VLM: `nano` (bundled), a Hugging Face directory, or a hub id. [default: nano]")
]


def training_recipe(
    recipe: str | None, stage: str, steps: int | None, batch_size: int | None, overrides: list[str] | None
) -> "Recipe":
    """The recipe of a training command, with its `--steps` and `--batch-size` applied to that stage."""
    from vugen_cli.recipe import load_recipe

    given = [f"{stage}.{key}={value}" for key, value in (("steps", steps), ("batch_size", batch_size)) if value]
    return load_recipe(recipe, [*(overrides or []), *given])
