"""`vugen score`: how good a set of images is, by itself, against a reference, or pair by pair."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vugen_cli.commands.options import DeviceOption
from vugen_cli.errors import VugenError
from vugen_cli.processes import from_first, is_first, join

if TYPE_CHECKING:
    from vugen_cli.metrics.features import Extractor

REFERENCE_SCENES = 2000  # what is drawn where the embedded data set is named as reference but is not on disk


class Features(StrEnum):
    """The network that images are compared by."""

    inception = "inception"
    vlm = "vlm"
    clip = "clip"
    dinov2 = "dinov2"


def score(
    fid: Annotated[
        bool, typer.Option("--fid", help="Fréchet distance to the reference; FID on Inception features.")
    ] = False,
    kid: Annotated[
        bool, typer.Option("--kid", help="Kernel distance to the reference; KID on Inception features.")
    ] = False,
    inception_score: Annotated[
        bool, typer.Option("--is", help="Inception Score; needs no reference.")
    ] = False,
    sfid: Annotated[bool, typer.Option("--sfid", help="FID on spatial Inception features.")] = False,
    pr: Annotated[bool, typer.Option("--pr", help="Precision and recall.")] = False,
    dc: Annotated[bool, typer.Option("--dc", help="Density and coverage.")] = False,
    psnr: Annotated[bool, typer.Option("--psnr", help="Of each image and its reference, in pairs.")] = False,
    ssim: Annotated[bool, typer.Option("--ssim", help="Of each image and its reference, in pairs.")] = False,
    lpips: Annotated[
        bool, typer.Option("--lpips", help="Of each image and its reference, in pairs.")
    ] = False,
    understanding: Annotated[
        bool,
        typer.Option("--understanding", help="Whether the VLM of --sampler still answers bit for bit alike."),
    ] = False,
    diversity: Annotated[
        bool, typer.Option("--diversity", help="How much the images of one prompt differ, over its seeds.")
    ] = False,
    over_training: Annotated[
        list[Path] | None,
        typer.Option(
            help="Score every checkpoint that a sampler's .run folder kept. Repeatable.", show_default=False
        ),
    ] = None,
    composition: Annotated[
        bool,
        typer.Option(
            "--composition",
            help="Subject, setting, relation, number in OpenMoji scenes by --sampler; --count of each kind.",
        ),
    ] = False,
    clip_score: Annotated[
        bool, typer.Option("--clip-score", help="CLIPScore of images and their prompts; needs --clip.")
    ] = False,
    vqa_score: Annotated[
        bool, typer.Option("--vqa-score", help="Whether --vlm says that images show their prompts.")
    ] = False,
    dpg_bench: Annotated[
        Path | None,
        typer.Option(help="DPG-Bench: the folder of its files. --vlm answers.", show_default=False),
    ] = None,
    geneval: Annotated[
        Path | None,
        typer.Option(
            help="GenEval: its evaluation_metadata.jsonl. Needs --detector and --clip.", show_default=False
        ),
    ] = None,
    detector: Annotated[
        Path | None, typer.Option(help="Directory of the detector of --geneval.", show_default=False)
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Each image is a 2x2 grid of four, as DPG-Bench has them.")
    ] = False,
    sampler: Annotated[
        Path | None,
        typer.Option(help="Of --understanding and --composition.", show_default="the newest one here"),
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
        Features | None,
        typer.Option(help="The network that sees the images.", show_default="inception"),
    ] = None,
    vlm: Annotated[
        str | None,
        typer.Option(
            help="VLM of --features vlm, or that answers: nano, a directory, a hub id; or --sampler's.",
            show_default="the samples', or nano",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="CLIP of --features clip or of scores on prompts: MODEL:PRETRAINED or MODEL:FILE.",
            show_default=False,
        ),
    ] = None,
    dinov2: Annotated[
        Path | None, typer.Option(help="Directory of --features dinov2.", show_default=False)
    ] = None,
    inception_weights: Annotated[
        Path | None,
        typer.Option(help="Inception weights, instead of $TORCH_HOME or a download.", show_default=False),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, help="Only this many images of each set.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images a forward pass.", show_default="what is fast")
    ] = None,
    save_stats: Annotated[
        Path | None, typer.Option(help="Also write the reference's statistics (.npz).", show_default=False)
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither read nor keep features in $VUGEN_CACHE.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where the scores are written.")] = Path("scores.json"),
    device: DeviceOption = None,
) -> None:
    """Score a set of images: any of the metrics together, over features that are extracted once.

    Prints a table and writes the numbers, with how they were obtained, as JSON.

    \b
    Examples:
      vugen score --fid
      vugen score --fid --pr --features vlm
      vugen score --fid --kid --is --sfid --pr --dc --images drawn --reference data/imagenet
      vugen score --fid --images batch.npz --reference VIRTUAL_imagenet256_labeled.npz
      vugen score --fid --dinov2 dinov2-large --images drawn --reference photos
      vugen score --fid --psnr --ssim --images rec/decoded --reference rec/originals
      vugen score --diversity --features vlm --images samples
      vugen score --clip-score --clip ViT-L-14:openai --vqa-score --images drawn
      vugen score --geneval evaluation_metadata.jsonl --detector mask2former --clip ViT-L-14:openai
      vugen score --dpg-bench dpg_bench --images drawn --vlm my-vlm
      vugen score --understanding --sampler sampler.safetensors
      vugen score --composition --sampler sampler.safetensors --count 500
      vugen score --over-training sampler.run --over-training baseline-sampler.run --features vlm
    """
    asked = {"fid": fid, "kid": kid, "is": inception_score, "sfid": sfid, "pr": pr, "dc": dc}
    metrics = [name for name, wanted in asked.items() if wanted]
    asked_of_pairs = {"psnr": psnr, "ssim": ssim, "lpips": lpips}
    pair_metrics = [name for name, wanted in asked_of_pairs.items() if wanted]
    asked_of_prompts = {
        "clip-score": clip_score, "vqa-score": vqa_score, "dpg-bench": dpg_bench, "geneval": geneval
    }  # fmt: skip
    prompt_metrics = [name for name, wanted in asked_of_prompts.items() if wanted]
    asked_alone = {"composition": composition, "understanding": understanding, "over-training": over_training}
    alone = [name for name, wanted in asked_alone.items() if wanted]
    others = [*metrics, *pair_metrics, *prompt_metrics, *(["diversity"] if diversity else [])]
    if not (alone or others):
        every = (*asked, *asked_of_pairs, *asked_of_prompts, "diversity", *asked_alone)
        names = ", ".join(f"--{name}" for name in every)
        raise VugenError(f"no metric was asked for: add one or several of {names}.")
    if alone and len(alone + others) > 1:
        rest = " and ".join(f"--{name}" for name in (alone + others)[1:])
        raise VugenError(f"--{alone[0]} draws its own pictures or none: ask for {rest} in another call.")
    if save_stats is not None and save_stats.suffix != ".npz":
        raise VugenError(f"--save-stats {save_stats}: statistics are written as .npz.")

    from vugen_cli.engine.loop import pick_device
    from vugen_cli.metrics.features import cache_folder
    from vugen_cli.metrics.pairs import score_pairs
    from vugen_cli.metrics.scores import score_sets

    where = join(pick_device(device))
    cache = None if no_cache else cache_folder()
    if understanding:
        if is_first():  # two answers to a question are no work to share out
            _print_understanding(_understanding(sampler, images, count or 4, vlm, where), out)
        return
    if over_training:
        from vugen_cli.metrics.over_training import kept_checkpoints

        for run in over_training:
            kept_checkpoints(run)  # what is missing is told before a network is loaded
        extractor = load_extractor(features, vlm, clip, dinov2, inception_weights, over_training[0], where)
        _over_training(over_training, extractor, reference, count or 256, cache, out, where)
        return
    if composition:
        from vugen_cli.engine.draw import pick_sampler
        from vugen_cli.engine.sampling import load_sampler
        from vugen_cli.metrics.composition import score_composition

        loaded = load_sampler(pick_sampler(sampler), vlm, where)
        _finish([score_composition(loaded, count or 100, out.parent / "composition")], out)
        return
    given_reference = reference is not None
    if images is None:
        images = newest_samples(Path.cwd())
        typer.echo(f"Scoring the last samples, {images}.")
    if reference is None and (pair_metrics or set(metrics) - {"is"}):
        reference = recorded_reference(images)
    reports = []
    if pair_metrics and reference is not None:  # first: sets that do not pair up show at once
        reports.append(score_pairs(images, reference, pair_metrics, count=count, device=where))
    if prompt_metrics:
        from vugen_cli.metrics.prompt_scores import score_prompts

        report = score_prompts(
            images,
            clip_score=clip_score,
            vqa_score=vqa_score,
            dpg_bench=dpg_bench,
            geneval=geneval,
            clip=clip,
            vlm=vlm or recorded_vlm(images),
            detector=detector,
            grid=grid,
            count=count,
            device=where,
        )
        reports.append(report)
        # --vlm and --clip were for these, unless --features says that they are for both.
        vlm = vlm if features is Features.vlm else None
        clip = clip if features is Features.clip else None
    if metrics or diversity or save_stats is not None:
        extractor = load_extractor(features, vlm, clip, dinov2, inception_weights, images, where)
    if diversity:
        from vugen_cli.metrics.diversity import score_diversity

        real = reference if given_reference else None
        picture = out.with_name("diversity.png")
        report = score_diversity(
            images,
            extractor,
            reference=real,
            count=count,
            batch_size=batch_size,
            cache=cache,
            picture=picture,
        )
        reports.insert(0, report)
    if metrics or save_stats is not None:
        report = score_sets(
            images,
            reference,
            extractor,
            metrics,
            count=count,
            batch_size=batch_size,
            save_stats=save_stats,
            cache=cache,
        )
        reports.insert(0, report)
    _finish(reports, out)


def _finish(reports: list[dict[str, Any]], out: Path) -> None:
    """Print reports, then write them: an unwritable file should not cost an hour's result."""
    if not is_first():
        return
    from vugen_cli.files import write_json

    _print(reports)
    how = {key: value for report in reversed(reports) for key, value in report.items()}
    write_json(out, {**how, "scores": [score for report in reports for score in report["scores"]]})
    typer.echo(f"Written to {out}.")


def _over_training(
    runs: list[Path],
    extractor: "Extractor",
    reference: Path | None,
    count: int,
    cache: Path | None,
    out: Path,
    device: Any,
) -> None:
    """Score kept checkpoints, print a line each, and leave `out` and a picture of the same name."""
    from vugen_cli.files import write_json
    from vugen_cli.metrics.over_training import plot_over_training, score_over_training

    curves = score_over_training(
        runs, extractor, reference=reference, count=count, device=device, cache=cache
    )
    if not is_first():
        return
    for name, curve in curves.items():
        for row in curve:
            typer.echo(f"{name}  step {row['step']:>8,}  {row['images']:>10,} images  {row['value']:.4f}")
    write_json(out, {"over_training": curves})
    plot_over_training(curves, out.with_suffix(".png"))
    typer.echo(f"{next(iter(curves.values()))[0]['name']}: {out} and {out.with_suffix('.png')}.")


def _understanding(
    sampler: Path | None, images: Path | None, count: int, vlm: str | None, device: Any
) -> dict[str, Any]:
    """The VLM's answers without and with the sampler, on the given images or on held-out scenes."""
    import numpy as np
    import torch

    from vugen_cli.data.openmoji import OpenMojiScenes
    from vugen_cli.engine.draw import pick_sampler
    from vugen_cli.metrics.image_sets import open_images
    from vugen_cli.metrics.understanding import score_understanding

    if images is None:
        scenes = OpenMojiScenes(count, "val", 64)
        pixels = [np.asarray(scenes[i].image).transpose(2, 0, 1) for i in range(count)]
    else:
        pixels = list(open_images(images, limit=count))
    tensors = [torch.from_numpy(np.ascontiguousarray(image)) for image in pixels]
    return score_understanding(pick_sampler(sampler), tensors, vlm, device)


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
    features: Features | None,
    vlm: str | None,
    clip: str | None,
    dinov2: Path | None,
    inception_weights: Path | None,
    images: Path,
    device: Any,
) -> "Extractor":
    """The feature extractor that the options name, on `device` (a torch.device).

    Raises:
        VugenError: the options contradict each other, or its weights cannot be had.
    """
    from vugen_cli.metrics.encoders import clip_extractor, dinov2_extractor, vlm_extractor
    from vugen_cli.metrics.inception import inception_extractor

    # A network's own option says which features are meant; --features is needed only to take its default.
    options = {
        Features.vlm: ("--vlm", vlm),
        Features.clip: ("--clip", clip),
        Features.dinov2: ("--dinov2", dinov2),
        Features.inception: ("--inception-weights", inception_weights),
    }
    given = [kind for kind, (_, value) in options.items() if value is not None]
    features = features or (given[0] if given else Features.inception)
    if others := [options[kind][0] for kind in given if kind is not features]:
        raise VugenError(f"{' and '.join(others)} goes with other features than {features.value}: drop one.")
    if features is Features.inception:
        return inception_extractor(inception_weights, device)
    if features is Features.clip:
        if clip is None:
            raise VugenError("--features clip: say which with --clip MODEL:PRETRAINED or --clip MODEL:FILE.")
        return clip_extractor(clip, device)
    if features is Features.dinov2:
        if dinov2 is None:
            raise VugenError("--features dinov2: say where it is with --dinov2 DIRECTORY.")
        return dinov2_extractor(dinov2, device)

    from vugen_cli.vlm.frozen import load_vlm

    if vlm is None:
        vlm = recorded_vlm(images)
        typer.echo(f"Features of the VLM {vlm}.")
    return vlm_extractor(load_vlm(vlm, device=device), device)


def recorded_vlm(images: Path) -> str:
    """The VLM of the sampler that drew these images, as `samples.jsonl` names it; `nano` if nothing does."""
    from vugen_cli.metrics.image_sets import read_jsonl

    listing = images / "samples.jsonl"
    row = next(read_jsonl(listing), {}) if listing.is_file() else {}
    return str(row.get("vlm") or "nano")


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
    # One answer for all processes of a job: they draw what is missing together.
    found = from_first(next((candidate for candidate in candidates if candidate.exists()), None))
    if found is not None:
        return found
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


def _print(reports: list[dict[str, Any]]) -> None:
    """One table of all the scores, what they were taken from, and every warning."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    entries = [entry for report in reports for entry in report["scores"]]
    columns = {
        "metric": [entry["name"] for entry in entries],
        "value": [_number(entry["value"]) or "–" for entry in entries],
        "±": [_number(entry.get("std")) for entry in entries],
        "95% interval": [" to ".join(map(_number, entry.get("interval") or [])) for entry in entries],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table(*columns)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console.print(table)
    first = reports[0]
    for role in ("images", "reference"):
        if first[role]:
            count = "statistics" if first[role]["kind"] == "statistics" else f"{first[role]['count']:,}"
            console.print(Text(f"{role:9} {count} · {first[role]['path']}"))
    if "features" in first:
        console.print(Text(f"{'features':9} {first['features']}"))
    lines = [first.get("warning")]
    for report in reports:
        lines += [f"{entry['name']}: {entry['warning']}" for entry in report["scores"] if entry["warning"]]
    for line in filter(None, lines):
        console.print(f"Warning: {line}", style="yellow", markup=False, highlight=False)
    for role in ("images", "reference"):
        if first[role] and (bad := first[role]["bad"]):
            console.print(
                f"{len(bad)} of the {role} could not be read, the first {bad[0]}",
                style="yellow",
                markup=False,
                highlight=False,
            )


def _number(value: float | None) -> str:
    """Four decimals, or four digits where that would show fewer than two; a KID is often 0.0002."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) >= 0.01 or not value else f"{value:.3g}"
