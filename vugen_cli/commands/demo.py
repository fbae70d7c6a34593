"""`vugen demo`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, DeviceOption


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    device: DeviceOption = None,
) -> Answer:
    """Run every stage for real on the embedded default, in a few minutes on two CPU cores.

    Prepares scenes, trains a reducer and a sampler briefly, draws, reconstructs, scores, and leaves pictures,
    scores.json and a report.html with all of them. Interrupted, the same command goes on where it was.

    \b
    Example:
      vugen demo
    """
    import json

    from vugen_cli.engine.device import pick_device
    from vugen_cli.nano.demo import Demonstrated, run_demo

    page, scores = run_demo(out, pick_device(device)), out / "scores.json"
    typer.echo(f"open {page} for the pictures; the figures are in {scores}")
    return Demonstrated(page=str(page), **json.loads(scores.read_text()))
