"""`vugen inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    file: Annotated[Path, typer.Argument(help="A .safetensors checkpoint or a data set folder.")],
) -> None:
    """Show the card of a checkpoint, or the manifest of a data set.

    \b
    Examples:
      vugen inspect sampler.safetensors
      vugen inspect data/openmoji
    """
    from vugen_cli.checkpoint import read_header
    from vugen_cli.data.manifest import read_manifest

    if not file.is_dir():
        _show(read_header(file).model_dump(mode="json", exclude_none=True))
        return
    manifest = read_manifest(file)
    shown = manifest.plain()
    for split in shown["splits"].values():
        split["shards"] = f"{len(split['shards'])} files"
    _show(shown)


def _show(values: dict[str, Any]) -> None:
    import yaml

    typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100).rstrip())
