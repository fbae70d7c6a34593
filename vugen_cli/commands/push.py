"""`vugen push`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer
from vugen_cli.errors import VugenError


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of `vugen export`.")],
    name: Annotated[str, typer.Argument(help="Repository on the hub: user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Only you may see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and stop.")] = False,
) -> Answer:
    """Put an exported sampler on the model hub, where `--sampler hf:user/name` finds it.

    \b
    Examples:
      vugen push bears user/bears --dry-run
      vugen push bears user/bears --private
    """
    from vugen_cli.commands.answers import Pushed
    from vugen_cli.hub import NAME, to_push
    from vugen_cli.hub import push as run

    if not re.fullmatch(NAME, name):
        raise VugenError(f"{name} is no name of a repository: give user/name")
    files = to_push(folder)
    for path, size in files:
        typer.echo(f"{size / 1e6:10.3f} MB  {path}")
    total = f"{len(files)} files, {sum(size for _, size in files) / 1e6:.1f} MB"
    if dry_run:
        typer.echo(f"{total} would go to {name}")
        return Pushed(name=name, files=dict(files))
    address = run(folder, name, private)
    typer.echo(f"pushed {total} to {address}; draw with --sampler hf:{name}")
    return Pushed(name=name, files=dict(files), address=address)
