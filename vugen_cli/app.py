"""The `vugen` command: wires the subcommands and turns errors into one line. Imports nothing heavy."""

import sys
from typing import Annotated

import typer

from vugen_cli import __version__
from vugen_cli.commands.train_vlm import train_vlm
from vugen_cli.errors import VugenError

app = typer.Typer(name="vugen", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("train-vlm")(train_vlm)


@app.callback()
def _main() -> None:
    """x"""


def main() -> None:
    app()


if __name__ == "__main__":
    main()
