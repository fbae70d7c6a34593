"""`vugen serve`."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import (
    AllowMismatchOption,
    Answer,
    DecoderOption,
    DeviceOption,
    SamplerOption,
    VlmNowOption,
)
from vugen_cli.commands.sample import AdapterOption, QuantizeOption
from vugen_cli.errors import VugenError

TokenOption = Annotated[
    Path | None,
    typer.Option(help="File of a token that clients must send. [default: $VUGEN_TOKEN; without it, none]"),
]


def serve(
    sampler: SamplerOption = None,
    decoder: DecoderOption = None,
    adapter: AdapterOption = None,
    vlm: VlmNowOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any that is free.")
    ] = 8000,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together at most.")] = 8,
    queue: Annotated[
        int, typer.Option(min=10, help="Pictures that may wait; further requests are told to come back.")
    ] = 64,
    token_file: TokenOption = None,
    allow_vlm_mismatch: AllowMismatchOption = False,
    quantize: QuantizeOption = None,
    device: DeviceOption = None,
) -> Answer:
    """Draw for many, over HTTP: OpenAI's image interface, and a page at /.

    Ctrl-C or a TERM signal ends it when what it has taken is drawn.

    \b
    Examples:
      vugen serve
      vugen serve --sampler sampler.safetensors --host 0.0.0.0 --token-file token.txt
      curl http://127.0.0.1:8000/v1/images/generations -H 'content-type: application/json' \\
        -d '{"prompt": "a bear in a forest", "response_format": "url"}'
    """
    try:
        from vugen_cli.serve.app import Service, make_app
        from vugen_cli.serve.run import address, hosts_of, listen, run
    except ModuleNotFoundError as error:
        raise VugenError(
            f"vugen serve needs the package {error.name}: pip install 'vugen-cli[serve]'"
        ) from error
    from vugen_cli.commands.answers import Served
    from vugen_cli.engine.device import pick_device
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.sampling.trained import load_sampler

    token = _token(token_file)
    listener = listen(host, port)
    given = (vlm, pick_device(device), allow_vlm_mismatch, decoder, adapter or ())
    loaded = load_sampler(pick_sampler(sampler), *given)
    if quantize:
        loaded.quantize()
    service, hosts = Service(loaded, batch, queue), hosts_of(listener)
    if hosts is None and token is None:
        typer.echo("anyone who reaches this machine can draw here: set VUGEN_TOKEN or give --token-file")
    where = address(listener)
    ready = partial(typer.echo, f"{service.name} draws at {where} (Ctrl-C ends it)")
    run(make_app(service, hosts, token), service.drawer, listener, ready)
    return Served(address=where)


def _token(file: Path | None) -> str | None:
    """What clients must show: what a file holds, else $VUGEN_TOKEN.

    Raises:
        VugenError: the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get("VUGEN_TOKEN", "").strip() or None
    try:
        token = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise VugenError(f"--token-file {file}: {reason}") from error
    if not token:
        raise VugenError(f"--token-file {file} is empty: write the token into it")
    return token
