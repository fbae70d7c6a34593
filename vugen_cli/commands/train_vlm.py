"""`vugen train-vlm`."""

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


def train_vlm(
    data: FirstDataOption = None,
    out: Annotated[Path, typer.Option(help="Hugging Face directory to write.")] = Path("nano-vlm"),
    init: Annotated[
        str | None,
        typer.Option(
            help="A VLM made by this command, or `nano`, whose language side is trained further; its vision "
            "encoder is kept, and reducers trained on it still fit."
        ),
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
    """Train the small embedded vision-language model, from scratch or further.

    It learns captions, questions and matching from captioned shards, and is saved as a Hugging Face directory
    that every other command takes as --vlm. This is how the bundled model is made.

    \b
    Examples:
      vugen train-vlm --data data/openmoji --out nano-vlm
      vugen train-vlm --data data/mine --out my-vlm --set nano_vlm.width=384 --set nano_vlm.vision_steps=1000
      vugen train-vlm --init nano --data data/openmoji --out better --steps 4000
    """
    from vugen_cli.commands.answers import Trained, echo_scores
    from vugen_cli.commands.options import one_set, training_recipe
    from vugen_cli.engine.device import pick_device
    from vugen_cli.engine.stage import RunOptions
    from vugen_cli.nano import train_vlm as nano
    from vugen_cli.processes import join

    resolved = training_recipe(recipe, "train_vlm", steps, batch_size, set_, log=log)
    options = RunOptions(profile, change_recipe)
    scores = nano.train_vlm(resolved, one_set(resolved, data), out, join(pick_device(device)), options, init)
    typer.echo(f"wrote {out}")
    if init is None and resolved.nano_vlm.vision_steps >= resolved.train_vlm.steps:
        typer.echo(f"its language side is untrained (nano_vlm.vision_steps): go on with --init {out}")
    echo_scores(scores)
    return Trained(out=str(out), run=f"{out}.run", steps=resolved.train_vlm.steps, scores=scores)
