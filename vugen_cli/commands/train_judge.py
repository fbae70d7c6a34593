"""`vugen train-judge`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import (
    Answer,
    ChangeOption,
    DeviceOption,
    FirstDataOption,
    FirstRecipeOption,
    LogOption,
    ProfileOption,
    SetOption,
    StepImagesOption,
    StepsOption,
)


def train_judge(
    data: FirstDataOption = None,
    out: Annotated[Path, typer.Option(help="File to write (.safetensors).")] = Path("judge.safetensors"),
    reducer: Annotated[
        Path | None,
        typer.Option(
            help="Train a lenient judge: on what this checkpoint's reducer and decoder make of the scenes "
            "too, and on blurred ones. [default: a strict judge, of real scenes only]",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="A judge to start from: a file, or the bundled `strict` or `lenient`.")
    ] = None,
    recipe: FirstRecipeOption = None,
    steps: StepsOption = None,
    batch_size: StepImagesOption = None,
    set_: SetOption = None,
    device: DeviceOption = None,
    profile: ProfileOption = False,
    change_recipe: ChangeOption = False,
    log: LogOption = None,
) -> Answer:
    """Train a small network that reads OpenMoji scenes: an independent judge of what samplers draw.

    It learns which subjects are there, how many, on which side, in which colour and setting, from real
    scenes, and never sees a sampler's picture. Two of them are bundled; `vugen study composition` asks both.

    \b
    Examples:
      vugen train-judge --data data/openmoji --out strict.safetensors
      vugen train-judge --init strict.safetensors --reducer reducer.safetensors --out lenient.safetensors
    """
    from vugen_cli.commands.answers import Trained, echo_scores
    from vugen_cli.commands.options import one_set, require_safetensors, training_recipe
    from vugen_cli.engine.device import pick_device
    from vugen_cli.engine.stage import RunOptions
    from vugen_cli.nano import train_judge as nano
    from vugen_cli.processes import join

    require_safetensors(out)
    resolved = training_recipe(recipe, "train_judge", steps, batch_size, set_, log=log)
    options = RunOptions(profile, change_recipe)
    scores = nano.train_judge(
        resolved, one_set(resolved, data), out, join(pick_device(device)), options, reducer, init
    )
    typer.echo(f"wrote {out}")
    echo_scores(scores)
    run = str(out.with_suffix(".run"))
    return Trained(out=str(out), run=run, steps=resolved.train_judge.steps, scores=scores)
