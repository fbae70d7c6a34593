"""`vugen chat`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import Answer, DeviceOption
from vugen_cli.errors import VugenError


def chat(
    image: Annotated[Path, typer.Argument(help="Picture to ask about.", show_default=False)],
    question: Annotated[str, typer.Argument(help="What to ask.")] = "describe the picture",
    sampler: Annotated[
        Path | None, typer.Option(help="Ask the VLM inside this sampler, loaded as `vugen sample` loads it.")
    ] = None,
    vlm: Annotated[
        str | None,
        typer.Option(help="VLM: `nano`, a directory, or a hub id. [default: the sampler's, else nano]"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    device: DeviceOption = None,
) -> Answer:
    """Ask the VLM about a picture: it understands as it did before it learned to draw.

    \b
    Examples:
      vugen chat samples/grid.png "what is in the picture?"
      vugen chat photo.jpg "how many people are there?" --sampler sampler.safetensors
    """
    if not image.is_file():
        raise VugenError(f"no picture at {image}")

    import torch

    from vugen_cli.commands.answers import Asked
    from vugen_cli.data.images import decode
    from vugen_cli.engine.device import pick_device
    from vugen_cli.sampling.trained import load_sampler
    from vugen_cli.vlm.chat import ask
    from vugen_cli.vlm.frozen import load_vlm

    try:
        pixels = torch.from_numpy(decode(image.read_bytes()).copy()).permute(2, 0, 1)
    except ValueError as error:
        raise VugenError(f"{image}: {error}") from error
    where = pick_device(device)
    model = load_sampler(sampler, vlm, where).vlm if sampler else load_vlm(vlm or "nano", where)
    answer = ask(model.model, model.processor, pixels[None], question, tokens)[0]
    typer.echo(answer)
    return Asked(image=str(image), question=question, answer=answer, vlm=model.name)
