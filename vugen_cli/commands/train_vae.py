"""`vugen train-vae`."""

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


def train_vae(
    data: FirstDataOption = None,
    out: Annotated[Path, typer.Option(help="Diffusers directory to write.")] = Path("vae"),
    recipe: FirstRecipeOption = None,
    steps: StepsOption = None,
    batch_size: StepImagesOption = None,
    set_: SetOption = None,
    device: DeviceOption = None,
    profile: ProfileOption = False,
    change_recipe: ChangeOption = False,
    log: LogOption = None,
) -> Answer:
    """Train a small AutoencoderKL from scratch, where no pretrained one can be had.

    The LDM decoder (decoder.kind=ldm) diffuses in its latents, and
    reducer.kind=vae samples in them; any other diffusers AutoencoderKL does as well.

    \b
    Examples:
      vugen train-vae --data data/openmoji --out vae
      vugen train-reducer --data data/openmoji --set decoder.kind=ldm --set decoder.vae=vae
    """
    from vugen_cli.commands.answers import Trained
    from vugen_cli.commands.options import data_of, training_recipe
    from vugen_cli.engine.device import pick_device
    from vugen_cli.engine.stage import RunOptions
    from vugen_cli.processes import join
    from vugen_cli.stages.train_vae import train_vae as run

    resolved = training_recipe(recipe, "train_vae", steps, batch_size, set_, log=log)
    run(resolved, data_of(resolved, data), out, join(pick_device(device)), RunOptions(profile, change_recipe))
    typer.echo(f"wrote {out}; next: vugen train-reducer --set decoder.kind=ldm --set decoder.vae={out}")
    return Trained(out=str(out), run=f"{out}.run", steps=resolved.train_vae.steps)
