"""`vugen plan`."""

from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, SetOption, on_vlm

Vlm = Annotated[
    str | None,
    typer.Option(
        help="VLM: `nano`, a directory with a config.json, that file, a hub id, or hf:owner/name@revision."
    ),
]


# torchtitan reports 33% (eager) and 39% (compiled) for an 8 B language model on 8 H100, lmms-engine 30 to 40%
# for VLMs. None is published for a model like this; docs/scaling.md has vugen's own on one H100, 33 to 37%.
MFU = 0.35


def plan(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file or the name of a shipped recipe. [default: nano]")
    ] = None,
    vlm: Vlm = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of all nodes together.")] = 8,
    gpu: Annotated[str, typer.Option(help="b200, h200, h100, a100-80, a100-40, l40s, l4 or 4090.")] = "h100",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines with equally many GPUs. [default: one for 8 GPUs]")
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak that training reaches.")
    ] = MFU,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Images of the data set. [default: of the mixture, if it is here]"),
    ] = None,
    set_: SetOption = None,
) -> Answer:
    """Say what a recipe would take on given GPUs, before they are paid for.

    Parameters, memory, FLOPs, time and disk of each stage, and what will not work, from configs alone: no
    weight is downloaded or allocated, and no GPU is needed.

    \b
    Examples:
      vugen plan imagenet-256 --vlm google/gemma-3-4b-it --gpus 64 --gpu h100
      vugen plan my.yaml --vlm my-model/config.json --gpus 8 --set engine.accumulate=4 --json
    """
    from vugen_cli.recipe import load_recipe
    from vugen_cli.studies.plan import Machine, as_lines, make_plan

    machine = Machine(gpu, gpus, nodes or -(-gpus // 8), mfu)
    made = make_plan(on_vlm(vlm, load_recipe(recipe, set_)), machine, images)
    typer.echo("\n".join(as_lines(made)))
    return made
