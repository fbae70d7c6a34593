"""`vugen inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer


def inspect(
    file: Annotated[Path, typer.Argument(help="A .safetensors checkpoint or a data set folder.")],
) -> Answer:
    """Show the card of a checkpoint, or the manifest of a data set.

    \b
    Examples:
      vugen inspect sampler.safetensors
      vugen inspect data/openmoji
    """
    import yaml

    from vugen_cli.checkpoint import check_whole, read_header
    from vugen_cli.data.manifest import read_manifest

    found = read_manifest(file) if file.is_dir() else read_header(file)
    if file.is_file():
        check_whole(file)
    shown = found.model_dump(mode="json", exclude_unset=True)
    for split in shown.get("splits", {}).values():
        split["shards"] = f"{len(split['shards'])} files"
    typer.echo(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100).rstrip())
    return found
