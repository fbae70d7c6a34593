"""`vugen train-reducer`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import (
    Answer,
    ChangeOption,
    DeviceOption,
    LogOption,
    ProfileOption,
    RecipeOption,
    SetOption,
    StepImagesOption,
    StepsOption,
    VlmOption,
)
from vugen_cli.errors import VugenError

ImagesOption = Annotated[
    str | None,
    typer.Option(help="Data set written by `vugen prepare`. [default: data/openmoji, or the checkpoint's]"),
]
ReducerOption = Annotated[
    Path | None, typer.Option(help="Keep this checkpoint's reducer as it is and train a decoder for it.")
]
DistillOption = Annotated[
    Path | None,
    typer.Option(help="Train no reducer: teach this checkpoint's decoder to draw in one step."),
]


def train_reducer(
    data: ImagesOption = None,
    vlm: VlmOption = None,
    recipe: RecipeOption = None,
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")] = Path("reducer.safetensors"),
    reducer: ReducerOption = None,
    distill: DistillOption = None,
    steps: StepsOption = None,
    batch_size: StepImagesOption = None,
    set_: SetOption = None,
    device: DeviceOption = None,
    profile: ProfileOption = False,
    change_recipe: ChangeOption = False,
    log: LogOption = None,
) -> Answer:
    """Stage 1: train the reducer and the pixel decoder together, on the frozen VLM's latents.

    Metrics, curves and previews (originals above, decoded below) go to a .run folder beside the checkpoint.
    Stopped or killed, the same command goes on where it was.

    \b
    Examples:
      vugen train-reducer --data data/openmoji
      vugen train-reducer --data data/imagenet --recipe imagenet-256 --vlm path/to/vlm --out r.safetensors
      vugen train-reducer --data data/mine --steps 5000 --set reducer.channels=32
      vugen train-reducer --reducer reducer.safetensors --set decoder.preset=B --out better.safetensors
      vugen train-reducer --distill reducer.safetensors --set decoder.steps=8 --out one-step.safetensors
    """
    from vugen_cli.checkpoint import read_card
    from vugen_cli.commands.answers import Trained
    from vugen_cli.commands.options import (
        at_size_of_data,
        data_of,
        recipe_from_card,
        require_safetensors,
        training_recipe,
    )
    from vugen_cli.engine.device import pick_device
    from vugen_cli.engine.stage import RunOptions
    from vugen_cli.processes import join

    require_safetensors(out)
    given = distill or reducer
    if distill and reducer:
        raise VugenError("--distill and --reducer both name the checkpoint to start from: give one of them")
    if given and given.resolve() == out.resolve():
        raise VugenError(f"--out {out} is the checkpoint to start from: give the new one another name")
    if given:
        card = read_card(given) if distill else at_size_of_data(read_card(given))
        kept = ("reducer", "decoder") if distill else ("reducer",)
        resolved = recipe_from_card(
            card, given, recipe, steps, batch_size, set_, vlm, "train_reducer", kept, log
        )
        source = data_of(resolved, data, card, recipe is not None)
    else:
        resolved = training_recipe(recipe, "train_reducer", steps, batch_size, set_, vlm, log)
        source = data_of(resolved, data)
    where, options = join(pick_device(device)), RunOptions(profile, change_recipe)
    if distill:
        from vugen_cli.stages.distill import distill as teach

        teach(resolved, distill, source, out, where, options)
    else:
        from vugen_cli.stages.train_reducer import train_reducer as run

        run(resolved, source, out, where, reducer, options)
    if given and read_card(out).latents.grid != card.latents.grid:
        typer.echo(f"wrote {out}; next: vugen train-sampler --init SAMPLER --reducer {out}")
    elif given:
        typer.echo(f'wrote {out}; next: vugen sample "a prompt" --sampler SAMPLER --decoder {out}')
    else:
        typer.echo(f"wrote {out}; next: vugen train-sampler --reducer {out}")
    return Trained(out=str(out), run=str(out.with_suffix(".run")), steps=read_card(out).step)
