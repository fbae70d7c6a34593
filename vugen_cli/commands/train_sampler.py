"""`vugen train-sampler`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import (
    AllowMismatchOption,
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

ReducerOption = Annotated[
    Path | None,
    typer.Option(help="Checkpoint of `vugen train-reducer`.", show_default="reducer.safetensors"),
]
TrainedOnOption = Annotated[
    str | None, typer.Option(help="Data set. [default: the one the checkpoint was trained on]")
]
InitOption = Annotated[
    Path | None,
    typer.Option(
        help="Instead: a sampler to train further, on other images for example; also hf:user/name. With "
        "--reducer: on its latents, which keep the sampler's reducer and are of another size."
    ),
]
AdapterOption = Annotated[
    int | None,
    typer.Option(
        "--adapter",
        min=1,
        help="Train an adapter of this rank on --init instead, for a new subject or style; 16 is plenty.",
    ),
]


def train_sampler(
    reducer: ReducerOption = None,
    init: InitOption = None,
    adapter: AdapterOption = None,
    data: TrainedOnOption = None,
    vlm: VlmOption = None,
    recipe: RecipeOption = None,
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")] = Path("sampler.safetensors"),
    steps: StepsOption = None,
    batch_size: StepImagesOption = None,
    set_: SetOption = None,
    allow_vlm_mismatch: AllowMismatchOption = False,
    device: DeviceOption = None,
    profile: ProfileOption = False,
    change_recipe: ChangeOption = False,
    log: LogOption = None,
) -> Answer:
    """Stage 2: train the generation expert to sample the reduced latents for a prompt, or an adapter to it.

    VLM, data and recipe come from the reducer's card unless given. Metrics, curves and sample grids go to a
    .run folder beside the checkpoint. Stopped or killed, the same command goes on where it was.

    \b
    Examples:
      vugen train-sampler --reducer ckpt.safetensors
      vugen train-sampler --reducer ckpt.safetensors --data data/coco --out coco.safetensors --steps 20000
      vugen train-sampler --init sampler.safetensors --data data/mine --out mine.safetensors --steps 2000
      vugen train-sampler --init sampler.safetensors --reducer reducer-512.safetensors --out 512.safetensors
      vugen train-sampler --adapter 16 --data data/mine --out mine.safetensors
    """
    from vugen_cli.checkpoint import read_card
    from vugen_cli.commands.answers import Trained
    from vugen_cli.commands.options import at_size_of, data_of, recipe_from_card, require_safetensors
    from vugen_cli.engine.device import pick_device
    from vugen_cli.engine.stage import RunOptions
    from vugen_cli.processes import join
    from vugen_cli.recipe import ADAPTER_TRAINING
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.sampling.trained import located
    from vugen_cli.stages.train_sampler import train_sampler as run

    require_safetensors(out)
    if reducer and adapter:
        raise VugenError("--adapter is for a sampler as it draws: give --init alone, without --reducer")
    init = pick_sampler(init) if adapter else init
    start, vlm = located(init or reducer or Path("reducer.safetensors"), vlm)
    if out.resolve() in {path.resolve() for path in (start, reducer) if path}:
        raise VugenError(f"--out {out} is the checkpoint to start from: give the new one another name")
    card = at_size_of(read_card(start), read_card(reducer)) if init and reducer else read_card(start)
    kept = ("reducer", "decoder", "expert") if init else ("reducer", "decoder")
    if adapter:
        kept = (*kept, "instruction")  # it is drawn with in the words of its sampler
    # The head of REPA is new: it would pull at layers that know more than it does.
    training = ADAPTER_TRAINING if adapter else {"repa": 0.0} if init else None
    given = (recipe, steps, batch_size, set_, vlm, "train_sampler", kept, log, training)
    resolved, options = recipe_from_card(card, start, *given), RunOptions(profile, change_recipe)
    images, where = data_of(resolved, data, card, recipe is not None), join(pick_device(device))
    further = start if init else None
    run(resolved, reducer or start, images, out, where, allow_vlm_mismatch, further, options, adapter)
    how = f"--adapter {out}" if adapter else f"--sampler {out}"
    typer.echo(f'wrote {out}; next: vugen sample "a prompt" {how}')
    return Trained(out=str(out), run=str(out.with_suffix(".run")), steps=resolved.train_sampler.steps)
