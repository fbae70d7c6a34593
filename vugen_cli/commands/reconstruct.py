"""`vugen reconstruct`."""

from pathlib import Path
from typing import Annotated

import typer

from vugen_cli.commands.options import AllowMismatchOption, DeviceOption


def reconstruct(
    images: Annotated[Path, typer.Option(help="A folder of images, a data set, shards, a zip or an npz.")],
    reducer: Annotated[
        Path, typer.Option(help="Checkpoint of `vugen train-reducer` (a sampler's works too).")
    ] = Path("reducer.safetensors"),
    out: Annotated[Path, typer.Option(help="Folder for the grid and the figures.")] = Path("reconstructions"),
    count: Annotated[int | None, typer.Option(min=1, help="At most this many images. [default: all]")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Decoder steps. [default: the checkpoint's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the decoder's noise.")] = 0,
    vlm: Annotated[
        str | None, typer.Option(help="Where the VLM is now, if not where the checkpoint says.")
    ] = None,
    allow_vlm_mismatch: AllowMismatchOption = False,
    save_images: Annotated[
        bool, typer.Option("--save-images", help="Also write every original and its reconstruction as PNG.")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Show what survives the reducer: originals beside what is decoded from their reduced latents.

    Writes reconstruction.png and reconstruction.json with PSNR and SSIM. With --save-images, `vugen score`
    can tell more: rFID is --fid, and LPIPS --lpips, of `decoded` with `originals` as the reference.

    \b
    Examples:
      vugen reconstruct --reducer reducer.safetensors --images data/openmoji --count 500
      vugen reconstruct --images photos/ --out rec
    """
    from vugen_cli.engine.loop import pick_device
    from vugen_cli.engine.reconstruct import reconstruct as run

    report = run(
        reducer, images, out, count, steps, seed, vlm, pick_device(device), allow_vlm_mismatch, save_images
    )
    typer.echo(
        f"PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f} over {report['images']['count']} images; "
        f"wrote {out / 'reconstruction.png'}"
    )
    if report["images"]["bad"]:
        typer.echo(
            f"{len(report['images']['bad'])} images could not be read; they are listed in reconstruction.json"
        )
