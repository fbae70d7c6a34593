"""`vugen runs`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, in folders within it too.")] = Path("."),
) -> Answer:
    """List training runs with their step, loss, speed, whether they go on, and the time left.

    \b
    Examples:
      vugen runs
      vugen runs experiments --json
    """
    from vugen_cli.runs import as_lines, find_runs

    found = find_runs(folder)
    typer.echo("\n".join(as_lines(found)) if found.runs else f"no runs under {folder}")
    return found
