"""`vugen caption`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, DeviceOption, SetOption, beside, going_on


def caption(
    data: Annotated[Path, typer.Option(help="Data set written by `vugen prepare`.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="DATA-captioned")] = None,
    vlm: Annotated[str, typer.Option(help="Who describes: nano, a directory, or a hub id.")] = "nano",
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe, of which `caption` says what is asked.", show_default="built in"),
    ] = None,
    overrides: SetOption = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Reading processes.", show_default="all cores")
    ] = None,
    device: DeviceOption = None,
) -> Answer:
    """Write a data set again with captions by a VLM beside its own.

    Asks for a caption by each of the recipe's instructions. Pictures stay byte for byte; a sample's
    `caption_origins` says which caption is whose. Interrupted, the same command goes on where it stopped.

    \b
    Examples:
      vugen caption --data data/coco --vlm Qwen/Qwen3-VL-2B-Instruct --out data/coco-long
      vugen caption --data data/mine --vlm my-vlm --set caption.tokens=96
    """
    from vugen_cli.data.shards import cores
    from vugen_cli.engine.device import pick_device
    from vugen_cli.processes import meet
    from vugen_cli.recipe import load_recipe, parse_recipe
    from vugen_cli.stages.caption import write_captions

    meet()
    # nano was taught one instruction, which its recipe has; another VLM is asked for several lengths.
    named = recipe or ("nano" if vlm == "nano" else None)
    asked = (load_recipe(named, overrides) if named else parse_recipe({}, "--set", overrides)).caption
    out = out or beside(data, "captioned")
    with going_on(out):
        workers = cores() if workers is None else workers
        manifest = write_captions(data, out, vlm, asked, pick_device(device), workers)
    for name, split in manifest.splits.items():
        assert split.captions
        bad = (
            f", {split.skipped_count} skipped (listed in skipped-{name}.jsonl)" if split.skipped_count else ""
        )
        typer.echo(f"{out}: {name}, {split.captions.count} captions of {split.count} images{bad}")
    return manifest
