"""`vugen export`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, DecoderOption, DeviceOption, VlmNowOption


def export(
    sampler: Annotated[
        Path | None,
        typer.Argument(help="Sampler checkpoint.", show_default="the newest here, else the bundled"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("exported"),
    prompt: Annotated[
        list[str] | None, typer.Option(help="Draw four pictures of it for the model card. Repeatable.")
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="Scores for the model card, a JSON of `vugen score`. Repeatable."),
    ] = None,
    licence: Annotated[
        str, typer.Option(help="Of the weights, as hubs write it: apache-2.0, cc-by-sa-4.0, ...")
    ] = "other",
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter to add for good, as FILE or FILE:WEIGHT. Repeatable.")
    ] = None,
    decoder: DecoderOption = None,
    vlm: VlmNowOption = None,
    device: DeviceOption = None,
) -> Answer:
    """Write a sampler with its VLM as a diffusers folder with a model card, to share.

    \b
    Examples:
      vugen export sampler.safetensors --out bears --prompt "a bear in a forest" --prompt "a bear in space"
      vugen export sampler.safetensors --out bears --scores scores.json --licence cc-by-sa-4.0
    """
    from vugen_cli.commands.answers import Written
    from vugen_cli.engine.device import pick_device
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.sampling.export import export as run
    from vugen_cli.sampling.trained import load_sampler

    file = pick_sampler(sampler)
    loaded = load_sampler(file, vlm, pick_device(device), decoder=decoder, adapters=adapter or ())
    run(loaded, out, prompt or [], scores or [], licence)
    typer.echo(f"wrote {out}/; draw with --sampler {out}, or share it: vugen push {out} USER/NAME --dry-run")
    return Written(out=str(out))
