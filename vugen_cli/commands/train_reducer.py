"""`vugen train-reducer`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import DataOption, DeviceOption, RecipeOption, SetOption, VlmOption


def train_reducer(
    data: DataOption = Path("data/openmoji"),
    vlm: VlmOption = None,
    recipe: RecipeOption = None,
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")] = Path("reducer.safetensors"),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images in a step.")] = None,
    set_: SetOption = None,
    device: DeviceOption = None,
) -> None:
    """Stage 1: train the reducer and the pixel decoder together, on the frozen VLM's latents.

    Metrics, curves and previews (originals above, decoded below) go to a .run folder beside the checkpoint.
    Stopped or killed, the same command goes on where it was.

    \b
    Examples:
      vugen train-reducer --data data/openmoji
      vugen train-reducer --data data/imagenet --recipe imagenet-256 --vlm path/to/vlm --out r.safetensors
      vugen train-reducer --data data/mine --steps 5000 --set reducer.channels=32
    """
    from vugen_cli.commands.options import require_safetensors, training_recipe
    from vugen_cli.engine.loop import pick_device
    from vugen_cli.engine.train_reducer import train_reducer as run

    require_safetensors(out)
    resolved = training_recipe(recipe, "train_reducer", steps, batch_size, set_, vlm)
    run(resolved, data, out, pick_device(device))
    typer.echo(f"wrote {out}; next: vugen train-sampler --reducer {out}")
