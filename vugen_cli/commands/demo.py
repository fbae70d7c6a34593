"""`vugen demo`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, DeviceOption


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    device: DeviceOption = None,
) -> Answer:
    """Teach the bundled sampler a thing that it never saw, in a few minutes on two CPU cores.

    Draws, prepares pictures, trains an adapter (pip install 'vugen-cli[adapters]'), draws again, scores, and
    leaves pictures, scores.json and a report.html with all of them. Interrupted, the same command goes on.

    \b
    Example:
      vugen demo
    """
    import json

    from vugen_cli.engine.device import pick_device
    from vugen_cli.nano.demo import Demonstrated, run_demo

    page, scores = run_demo(out, pick_device(device)), out / "scores.json"
    typer.echo(f"open {page} for the pictures; the figures are in {scores}")
    return Demonstrated(page=str(page), **json.loads(scores.read_text(encoding="utf-8")))
