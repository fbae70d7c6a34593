"""`vugen score`: how good images are: as a set, against a reference, in pairs, or against their prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vugen_cli.commands.options import (
    Answer,
    BatchOption,
    DeviceOption,
    ImagesOption,
    OutOption,
)
from vugen_cli.errors import VugenError
from vugen_cli.processes import join

if TYPE_CHECKING:
    from vugen_cli.metrics.image_sets import ImageSet

app = typer.Typer(invoke_without_command=True, subcommand_metavar="[prompts ...]")

ReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="Such images, a prepared data set or statistics (.npz).", show_default="the samples' data"
    ),
]
CountOption = Annotated[
    int | None, typer.Option(min=2, help="Only this many images of each set.", show_default=False)
]
StatsOption = Annotated[
    Path | None, typer.Option(help="Also write the reference's statistics (.npz).", show_default=False)
]
SeveralFeaturesOption = Annotated[
    list[str],
    typer.Option(
        "--features",
        help="What sees the images: inception[:FILE], vlm[:ID], clip:MODEL:PRETRAINED or dinov2:DIRECTORY. "
        "Repeatable.",
        show_default="inception",
    ),
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Neither read nor keep features in $VUGEN_CACHE.")
]
IN_PAIRS = "Of each image and its reference, in pairs."


def _asked(metric: str, meaning: str) -> Any:
    return typer.Option(f"--{metric}", help=meaning)


@app.callback()
def score(
    context: typer.Context,
    fid: Annotated[bool, _asked("fid", "Fréchet distance; FID on Inception features.")] = False,
    kid: Annotated[bool, _asked("kid", "Kernel distance; KID on Inception features.")] = False,
    cmmd: Annotated[bool, _asked("cmmd", "CMMD, on CLIP features.")] = False,
    inception_score: Annotated[bool, _asked("is", "Inception Score; needs no reference.")] = False,
    sfid: Annotated[bool, _asked("sfid", "FID on spatial Inception features.")] = False,
    pr: Annotated[bool, _asked("pr", "Precision and recall.")] = False,
    dc: Annotated[bool, _asked("dc", "Density and coverage.")] = False,
    psnr: Annotated[bool, _asked("psnr", IN_PAIRS)] = False,
    ssim: Annotated[bool, _asked("ssim", IN_PAIRS)] = False,
    lpips: Annotated[bool, _asked("lpips", IN_PAIRS)] = False,
    images: ImagesOption = None,
    reference: ReferenceOption = None,
    features: SeveralFeaturesOption = ["inception"],  # noqa: B006 - typer reads it and nobody changes it
    count: CountOption = None,
    batch_size: BatchOption = None,
    save_stats: StatsOption = None,
    no_cache: NoCacheOption = False,
    out: OutOption = Path("scores.json"),
    device: DeviceOption = None,
) -> Answer:
    """Score a set of images: any of the metrics together, over features that are extracted once.

    Prints a table and writes the numbers, with how they were obtained, as JSON. `vugen score prompts` scores
    images against their prompts, `vugen study` asks more of a sampler.

    \b
    Examples:
      vugen score --fid
      vugen score --fid --pr --features vlm
      vugen score --fid --kid --is --sfid --pr --dc --images drawn --reference data/imagenet
      vugen score --fid --images batch.npz --reference VIRTUAL_imagenet256_labeled.npz
      vugen score --fid --features inception --features dinov2:dinov2-large --images drawn --reference photos
      vugen score --cmmd --features clip:ViT-L-14-336:openai --images drawn --reference photos
      vugen score --fid --psnr --ssim --images rec/decoded --reference rec/originals
    """
    if context.invoked_subcommand:
        _refuse_options_before(context)
        return None
    of_sets = {"fid": fid, "kid": kid, "cmmd": cmmd, "is": inception_score, "sfid": sfid, "pr": pr, "dc": dc}
    metrics, pair_metrics = _wanted(of_sets, {"psnr": psnr, "ssim": ssim, "lpips": lpips})
    from vugen_cli.engine.device import pick_device
    from vugen_cli.metrics.features import cache_folder
    from vugen_cli.metrics.image_sets import open_image_set
    from vugen_cli.metrics.pairs import score_pairs
    from vugen_cli.metrics.report import finish, joined
    from vugen_cli.metrics.samples import pick_images
    from vugen_cli.metrics.scores import compare_over

    compared = bool(pair_metrics) or metrics != ["is"]
    if reference and not compared:
        raise VugenError("--reference: the Inception Score is of the images alone; leave it out.")
    if not metrics and features != ["inception"]:
        raise VugenError("--features: pairs are compared by their pixels and LPIPS; leave it out.")
    where = join(pick_device(device))
    ours = open_image_set(pick_images(images), count)
    theirs = _reference(ours, reference, count) if compared else None
    reports = []
    if pair_metrics and theirs:  # first: sets that do not pair up show at once
        reports.append(score_pairs(ours, theirs, pair_metrics, device=where))
    if metrics or save_stats:
        cache = None if no_cache else cache_folder()
        report = compare_over(ours, theirs, features, metrics, where, batch_size, save_stats, cache)
        reports.insert(0, report)
    return finish(joined(reports), out)


def _refuse_options_before(context: typer.Context) -> None:
    """`vugen score --images x prompts` would leave its options unread."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source and source.name == "COMMANDLINE":
            command = context.invoked_subcommand
            raise VugenError(f"{option.opts[0]} stands before {command}: give options after it.")


def _wanted(of_sets: dict[str, bool], of_pairs: dict[str, bool]) -> tuple[list[str], list[str]]:
    metrics, pair_metrics = ([name for name, asked in of.items() if asked] for of in (of_sets, of_pairs))
    if not (metrics or pair_metrics):
        names = ", ".join(f"--{name}" for name in (*of_sets, *of_pairs))
        raise VugenError(f"no metric was asked for: add one or several of {names}.")
    return metrics, pair_metrics


def _reference(ours: "ImageSet", given: Path | None, count: int | None) -> "ImageSet":
    """What is compared with: as given, or what the samples' sampler was trained on."""
    from vugen_cli.metrics.image_sets import open_image_set
    from vugen_cli.metrics.samples import recorded_reference

    def draw_missing(out: Path) -> None:
        from vugen_cli.nano.scenes import draw_reference

        first = next(iter(ours), None)
        draw_reference(out, 64 if first is None else min(first.shape[1:]))

    return open_image_set(given or recorded_reference(ours, draw_missing), count)


@app.command()
def prompts(
    clip_score: Annotated[bool, _asked("clip-score", "CLIPScore; needs --clip.")] = False,
    vqa_score: Annotated[bool, _asked("vqa-score", "Whether --vlm says that images show them.")] = False,
    dpg_bench: Annotated[
        Path | None, typer.Option(help="DPG-Bench: the folder of its files. --vlm answers.")
    ] = None,
    geneval: Annotated[
        Path | None,
        typer.Option(help="GenEval: its evaluation_metadata.jsonl. Needs --detector and --clip."),
    ] = None,
    geneval2: Annotated[
        Path | None, typer.Option(help="GenEval 2: its geneval2_data.jsonl. --vlm answers.")
    ] = None,
    detector: Annotated[Path | None, typer.Option(help="Directory of the detector of --geneval.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="Each image is a 2x2 grid, as DPG-Bench's.")] = False,
    images: ImagesOption = None,
    vlm: Annotated[
        str | None,
        typer.Option(help="Answers: nano, a directory or a hub id.", show_default="the samples', or nano"),
    ] = None,
    clip: Annotated[str | None, typer.Option(help="MODEL:PRETRAINED or MODEL:FILE of open_clip.")] = None,
    count: CountOption = None,
    out: OutOption = Path("prompt-scores.json"),
    device: DeviceOption = None,
) -> Answer:
    """Score images against the prompts they were drawn for.

    \b
    Examples:
      vugen score prompts --vqa-score
      vugen score prompts --clip-score --clip ViT-L-14:openai --vqa-score --images drawn
      vugen score prompts --geneval evaluation_metadata.jsonl --detector mask2former --clip ViT-L-14:openai
      vugen score prompts --dpg-bench dpg_bench --images drawn --vlm my-vlm
      vugen score prompts --geneval2 geneval2_data.jsonl --images drawn --vlm Qwen/Qwen3-VL-8B-Instruct
    """
    if not (clip_score or vqa_score or dpg_bench or geneval or geneval2):
        raise VugenError("no metric was asked for: `vugen score prompts --help` lists them.")
    if detector and not geneval:
        raise VugenError("--detector is for --geneval: ask for that, or leave it out.")
    if vlm and not (vqa_score or dpg_bench or geneval2):
        raise VugenError(
            "--vlm answers --vqa-score, --dpg-bench and --geneval2: ask for one, or leave it out."
        )
    if clip and not (clip_score or geneval):
        raise VugenError("--clip is for --clip-score and --geneval: ask for one, or leave it out.")
    from vugen_cli.engine.device import pick_device
    from vugen_cli.metrics.image_sets import open_image_set
    from vugen_cli.metrics.prompt_scores import score_prompts
    from vugen_cli.metrics.report import finish
    from vugen_cli.metrics.samples import pick_images, recorded_vlm

    where = join(pick_device(device))
    ours = open_image_set(pick_images(images), count)
    report = score_prompts(
        ours,
        clip_score=clip_score,
        vqa_score=vqa_score,
        dpg_bench=dpg_bench,
        geneval=geneval,
        geneval2=geneval2,
        clip=clip,
        vlm=vlm or recorded_vlm(ours),
        detector=detector,
        grid=grid,
        device=where,
    )
    return finish(report, out)
