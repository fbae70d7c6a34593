"""`vugen score`: how far a set of images is from a reference."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vugen_cli.errors import VugenError

if TYPE_CHECKING:
    from vugen_cli.metrics.frechet import Extractor

REFERENCE_SCENES = 2000  # what is drawn where the embedded data set is named as reference but is not on disk


class Features(StrEnum):
    """What the Fréchet distance is taken on."""

    inception = "inception"
    vlm = "vlm"


def score(
    fid: Annotated[
        bool,
        typer.Option("--fid", help="Fréchet distance to the reference; FID if the features are Inception's."),
    ] = False,
    understanding: Annotated[
        bool,
        typer.Option("--understanding", help="Whether the VLM of --sampler still answers bit for bit alike."),
    ] = False,
    sampler: Annotated[
        Path | None, typer.Option(help="The sampler of --understanding.", show_default="the newest one here")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder, tar, zip or npz of images.", show_default="the last samples"),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Such images, a prepared data set or statistics (.npz).",
            show_default="the samples' data",
        ),
    ] = None,
    features: Annotated[
        Features, typer.Option(help="The network that sees the images.")
    ] = Features.inception,
    vlm: Annotated[
        str | None,
        typer.Option(
            help="The VLM of --features vlm: nano, a directory or a hub id; or where that of --sampler is.",
            show_default="nano, or the sampler's",
        ),
    ] = None,
    inception_weights: Annotated[
        Path | None,
        typer.Option(help="Inception weights, instead of $TORCH_HOME or a download.", show_default=False),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="At most this many images of each set.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass.")] = 64,
    save_stats: Annotated[
        Path | None, typer.Option(help="Also write the reference's statistics (.npz).", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the scores are written.")] = Path("scores.json"),
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ...", show_default="cuda if there is one"),
    ] = None,
) -> None:
    """Score a set of images against a reference.

    Examples:

        vugen score --fid

        vugen score --fid --features vlm

        vugen score --fid --images samples --reference data/imagenet --save-stats imagenet.npz

        vugen score --fid --images batch.npz --reference VIRTUAL_imagenet256_labeled.npz

        vugen score --understanding --sampler sampler.safetensors
    """
    if understanding:
        _print_understanding(_understanding(sampler, images, count or 4, vlm, device), out)
        return
    if not fid:
        raise VugenError("no metric was asked for: add --fid (the Fréchet distance) or --understanding.")
    if save_stats is not None and save_stats.suffix != ".npz":
        raise VugenError(f"--save-stats {save_stats}: statistics are written as .npz.")

    from vugen_cli.engine.loop import pick_device
    from vugen_cli.files import write_json
    from vugen_cli.metrics.frechet import score_sets

    if images is None:
        images = newest_samples(Path.cwd())
        typer.echo(f"Scoring the last samples, {images}.")
    if reference is None:
        reference = recorded_reference(images)
    extractor = load_extractor(features, vlm or "nano", inception_weights, pick_device(device))
    result = score_sets(
        images, reference, extractor, count=count, batch_size=batch_size, save_stats=save_stats
    )
    _print_table([result])  # before it is written: an unwritable file should not cost an hour's result
    write_json(out, {"scores": [result]})
    typer.echo(f"Written to {out}.")


def _understanding(
    sampler: Path | None, images: Path | None, count: int, vlm: str | None, device: str | None
) -> dict[str, Any]:
    """The VLM's answers without and with the sampler, on the given images or on held-out scenes."""
    import numpy as np
    import torch

    from vugen_cli.data.openmoji import OpenMojiScenes
    from vugen_cli.engine.draw import pick_sampler
    from vugen_cli.engine.loop import pick_device
    from vugen_cli.metrics.image_sets import batches, open_images
    from vugen_cli.metrics.understanding import score_understanding

    if images is None:
        scenes = OpenMojiScenes(count, "val", 64)
        pixels = [np.asarray(scenes[i].image).transpose(2, 0, 1) for i in range(count)]
    else:
        pixels = [image for chunk in batches(open_images(images, limit=count), 8) for image in chunk]
    tensors = [torch.from_numpy(np.ascontiguousarray(image)) for image in pixels]
    return score_understanding(pick_sampler(sampler), tensors, vlm, pick_device(device))


def _print_understanding(result: dict[str, Any], out: Path) -> None:
    from vugen_cli.files import write_json

    verdict = "preserved, bit for bit" if result["preserved"] else "CHANGED"
    typer.echo(f"understanding of {result['vlm']} with {result['sampler']}: {verdict}")
    same = "equal" if result["weights_before"] == result["weights_after"] else "DIFFERENT"
    typer.echo(f"  weights   {same} (sha256 {result['weights_before'][:16]})")
    typer.echo(f"  logits    {result['logits_that_differ']} of {result['logits_compared']} differ")
    for question, answers in zip(result["questions"], result["answers_after"], strict=True):
        typer.echo(f"  asked     {question}\n  answered  {answers[0]}")
    write_json(out, {"scores": [result]})
    typer.echo(f"Written to {out}.")
    if not result["preserved"]:
        raise VugenError(
            f"{result['vlm']} does not answer as it did: its weights were changed on disk or here"
        )


def load_extractor(
    features: Features | str, vlm: str, inception_weights: Path | None, device: Any
) -> "Extractor":
    """The feature extractor that the options name, on `device` (a torch.device).

    Raises:
        VugenError: its weights cannot be had.
    """
    from vugen_cli.metrics.frechet import vlm_extractor
    from vugen_cli.metrics.inception import inception_extractor

    if Features(features) is Features.inception:
        return inception_extractor(inception_weights, device)

    from vugen_cli.vlm.frozen import load_vlm

    return vlm_extractor(load_vlm(vlm, device=device), device)


def newest_samples(directory: Path) -> Path:
    """The folder, at most two below `directory`, whose `samples.jsonl` was written last.

    Raises:
        VugenError: there is none.
    """
    depths = ("samples.jsonl", "*/samples.jsonl", "*/*/samples.jsonl")
    listings = [path for pattern in depths for path in directory.glob(pattern) if path.is_file()]
    if not listings:
        raise VugenError(f"no samples under {directory}: draw some with `vugen sample`, or give --images.")
    return max(listings, key=lambda path: path.stat().st_mtime_ns).parent


def recorded_reference(images: Path) -> Path:
    """The data set that the sampler of these samples was trained on, drawn first if it is the embedded one.

    `samples.jsonl` names it ("reference"), or names the sampler whose card does ("sampler").

    Args:
        images: a folder that `vugen sample` wrote.

    Raises:
        VugenError: the samples do not say, or the data set they name is not on disk and cannot be drawn.
    """
    from vugen_cli.metrics.image_sets import read_jsonl

    listing = images / "samples.jsonl"
    if not listing.is_file():
        raise VugenError(f"{images} does not say what it should be compared with: give --reference.")
    row = next(read_jsonl(listing), {})
    recorded = row.get("reference") or _reference_of_sampler(row.get("sampler"))
    if not isinstance(recorded, str):
        raise VugenError(f"{listing} names no reference data set: give --reference.")
    # A relative path was relative to where `vugen sample` ran, which is most often here or above the samples.
    candidates = [Path(recorded), images / recorded, images.parent / recorded]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if row.get("dataset") != "openmoji":
        raise VugenError(
            f"the samples' data set {recorded} is not on disk: prepare it again, or give --reference."
        )
    _draw_reference(Path(recorded), images)
    return Path(recorded)


def _reference_of_sampler(sampler: Any) -> Any:
    if not isinstance(sampler, str) or not Path(sampler).is_file():
        return None
    from vugen_cli.engine.checkpoint import read_card

    data = read_card(Path(sampler)).get("data")
    return data.get("path") if isinstance(data, dict) else None


def _draw_reference(out: Path, images: Path) -> None:
    """Prepare scenes of the embedded data set's validation split, as large as the samples."""
    import os

    from vugen_cli.data.openmoji import OpenMojiScenes
    from vugen_cli.data.writer import write_dataset
    from vugen_cli.metrics.image_sets import open_images

    first = next(iter(open_images(images, limit=1)), None)
    size = 64 if first is None else min(first.shape[1:])
    typer.echo(
        f"The reference {out} is not on disk: drawing {REFERENCE_SCENES:,} scenes of {size} px into it."
    )
    scenes = OpenMojiScenes(REFERENCE_SCENES, split="val", size=size)
    write_dataset(scenes, out, split="val", size=size, workers=os.cpu_count() or 1)


def _print_table(scores: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", "images", "reference")
    for entry in scores:
        sides = [_side(entry[role]) for role in ("images", "reference")]
        table.add_row(entry["name"], f"{entry['value']:.4f}", *sides)
    console = Console()
    console.print(table)
    for entry in scores:
        if entry["warning"]:
            console.print(f"Warning: {entry['warning']}", style="yellow", markup=False, highlight=False)
        for role in ("images", "reference"):
            if bad := entry[role]["bad"]:
                console.print(
                    f"{len(bad)} of the {role} could not be read, the first {bad[0]}",
                    style="yellow",
                    markup=False,
                    highlight=False,
                )


def _side(record: dict[str, Any]) -> Any:
    from rich.text import Text

    count = "statistics" if record["count"] is None else f"{record['count']:,}"
    return Text(f"{count} · {record['path']}")
