"""`vugen reconstruct`."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vugen_cli.commands.options import MAX_STEPS, AllowMismatchOption, Answer, DeviceOption, VlmNowOption

if TYPE_CHECKING:
    from vugen_cli.nano.judges import OfReconstructions
    from vugen_cli.studies.reconstruct import Fidelity


def reconstruct(
    images: Annotated[Path, typer.Option(help="A folder of images, a data set, shards, a zip or an npz.")],
    reducer: Annotated[
        Path, typer.Option(help="Checkpoint of `vugen train-reducer` (a sampler's works too), or nano-128.")
    ] = Path("reducer.safetensors"),
    full: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of the identity reducer: adds a row decoded from all of z."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the grid and the figures.")] = Path("reconstructions"),
    count: Annotated[int | None, typer.Option(min=1, help="At most this many images. [default: all]")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=MAX_STEPS, help="Decoder steps. [default: the checkpoint's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the decoder's noise.")] = 0,
    vlm: VlmNowOption = None,
    allow_vlm_mismatch: AllowMismatchOption = False,
    save_images: Annotated[
        bool, typer.Option("--save-images", help="Also write every original and its reconstruction as PNG.")
    ] = False,
    device: DeviceOption = None,
) -> Answer:
    """Show what survives the reducer: originals above what is decoded from their latents, full and reduced.

    Writes reconstruction.png, and reconstruction.json with PSNR, SSIM, LPIPS where its weights are at hand,
    and the Fréchet distance between the set and its reconstructions on the VLM's features. Of OpenMoji scenes
    two judges (`vugen train-judge`) and the VLM's captions say how often they still show what they should.
    With --save-images, `vugen score --fid` of `decoded` with `originals` as the reference is rFID.

    \b
    Examples:
      vugen reconstruct --reducer reducer.safetensors --images data/openmoji --count 500
      vugen reconstruct --images photos/ --out rec
      vugen reconstruct --images data/openmoji --full identity.safetensors
    """
    from vugen_cli.engine.device import pick_device
    from vugen_cli.files import locked
    from vugen_cli.processes import is_first, join
    from vugen_cli.studies.reconstruct import reconstruct as run

    where = join(pick_device(device))
    judge = scenes_judge(images)
    busy = f"another process writes to {out}: wait for it or choose another --out"
    with locked(out, busy) if is_first() else nullcontext():
        report = run(
            reducer, images, out, count, steps, seed, vlm, where, allow_vlm_mismatch, save_images, full, judge
        )
    if not is_first():
        return None
    for name, found in (("from all of z", report.full), ("from reduced z", report)):
        if found:
            typer.echo(f"{name}: {summary(found)}")
    if judge:
        from vugen_cli.nano.judges import in_short

        typer.echo("\n".join(in_short(report.judges)))
    typer.echo(
        f"over {report.images.count} images, Fréchet distance on {report.features}; "
        f"wrote {out / 'reconstruction.png'}"
    )
    if bad := report.images.bad:
        typer.echo(f"{len(bad)} images could not be read; they are listed in reconstruction.json")
    return report


def scenes_judge(images: Path) -> "OfReconstructions | None":
    """What judges reconstructions of prepared OpenMoji scenes; None for other images."""
    from vugen_cli.data.manifest import read_manifest

    if not (images / "dataset.json").is_file() or read_manifest(images).dataset != "openmoji":
        return None
    from vugen_cli.nano.judges import reconstruction_judge

    return reconstruction_judge(images)


def summary(found: "Fidelity") -> str:
    """The figures of one way of decoding, in a line."""
    psnr = "infinite" if found.psnr is None else f"{found.psnr:.2f} dB"
    parts = [f"PSNR {psnr}", f"SSIM {found.ssim:.4f}"]
    if found.lpips is not None:
        parts.append(f"LPIPS {found.lpips:.4f}")
    if found.frechet is not None:
        parts.append(f"Fréchet distance {found.frechet:.3f}")
    return ", ".join(parts)
