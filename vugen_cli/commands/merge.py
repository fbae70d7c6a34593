"""`vugen merge`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, DecoderOption
from vugen_cli.errors import VugenError


def merge(
    sampler: Annotated[
        Path, typer.Argument(help="Checkpoint of `vugen train-sampler`, exported folder or hf:user/name.")
    ],
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter, as FILE or FILE:WEIGHT. Repeatable.")
    ] = None,
    decoder: DecoderOption = None,
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")] = Path("merged.safetensors"),
) -> Answer:
    """Write a sampler with adapters added to its weights for good, or with another decoder.

    \b
    Examples:
      vugen merge sampler.safetensors --adapter mine.safetensors --out merged.safetensors
      vugen merge hf:user/bears@v1 --adapter mine.safetensors:0.6 --adapter yours.safetensors:0.4
      vugen merge sampler.safetensors --decoder larger.safetensors
    """
    from vugen_cli.commands.answers import Written
    from vugen_cli.commands.options import require_safetensors
    from vugen_cli.sampling.trained import located
    from vugen_cli.sampling.trained import merge as run

    require_safetensors(out)
    if not adapter and decoder is None:
        raise VugenError("nothing to merge: give --adapter FILE, or --decoder FILE")
    file, vlm = located(sampler)
    run(file, adapter or (), out, vlm, decoder)
    typer.echo(f'wrote {out}; next: vugen sample "a prompt" --sampler {out}')
    return Written(out=str(out))
