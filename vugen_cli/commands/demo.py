"""`vugen demo`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import DeviceOption


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    device: DeviceOption = None,
) -> None:
    """Run every stage for real on the embedded default, in a few minutes on two CPU cores.

    Prepares scenes, trains a reducer and a sampler briefly, draws, reconstructs, scores, and leaves pictures,
    scores.json and a report.html with all of them. Interrupted, the same command goes on where it was.

    \b
    Example:
      vugen demo
    """
    from vugen_cli.engine.device import pick_device
    from vugen_cli.nano.demo import run_demo

    report = run_demo(out, pick_device(device))
    typer.echo(f"open {report} for the pictures; the figures are in {out / 'scores.json'}")
