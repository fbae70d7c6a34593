"""`vugen study`: what a trained sampler can do, and what it leaves as it was."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vugen_cli.commands.options import (
    MAX_GUIDANCE,
    Answer,
    BatchOption,
    DeviceOption,
    FeaturesOption,
    ImagesOption,
    OutOption,
    SamplerOption,
    VlmOption,
)
from vugen_cli.errors import VugenError
from vugen_cli.processes import is_first, join

if TYPE_CHECKING:
    import torch

    from vugen_cli.studies.over_training import Point
    from vugen_cli.studies.understanding import Understanding

app = typer.Typer(no_args_is_help=True, help="Ask more of a sampler than one score: each study is a command.")
GuidanceOption = Annotated[float | None, typer.Option(min=0, max=MAX_GUIDANCE, help="By the instruction.")]
ImageGuidanceOption = Annotated[
    float | None, typer.Option(min=0, max=MAX_GUIDANCE, help="By the source picture.")
]


@app.command()
def composition(
    sampler: SamplerOption = None,
    count: Annotated[int, typer.Option(min=2, help="Prompts of each kind.")] = 100,
    vlm: VlmOption = None,
    out: OutOption = Path("composition.json"),
    device: DeviceOption = None,
) -> Answer:
    """Whether pictures show the subject, setting, relation and number asked for, in OpenMoji scenes.

    Draws held-out prompts and asks two judges that never saw a sampler's picture (`vugen train-judge`), then
    the VLM's captions, about the pictures and about real scenes of the same prompts. The strict judge
    learned from real scenes only, the lenient one from reconstructions too. The pictures stay in the folder
    `composition` beside the result.

    \b
    Examples:
      vugen study composition --count 500
      vugen study composition --sampler sampler.safetensors --out nano.json
    """
    from vugen_cli.engine.device import pick_device
    from vugen_cli.metrics.report import finish
    from vugen_cli.nano.composition import score_composition
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.sampling.trained import load_sampler

    loaded = load_sampler(pick_sampler(sampler), vlm, join(pick_device(device)))
    return finish(score_composition(loaded, count, out.parent / "composition"), out)


@app.command()
def edits(
    sampler: SamplerOption = None,
    count: Annotated[int, typer.Option(min=2, help="Held-out edits.")] = 500,
    guidance: GuidanceOption = None,
    image_guidance: ImageGuidanceOption = None,
    vlm: VlmOption = None,
    out: OutOption = Path("edits.json"),
    device: DeviceOption = None,
) -> Answer:
    """Whether edits of OpenMoji scenes make the change that was asked for, and keep the rest.

    Beside every share stand the source left as it is and the real target. The pictures and a page of them
    stay in the folder `edits` beside the result.

    \b
    Examples:
      vugen study edits --sampler editor.safetensors
      vugen study edits --sampler editor.safetensors --count 100 --guidance 4 --image-guidance 1.5
    """
    from vugen_cli.engine.device import pick_device
    from vugen_cli.metrics.report import finish
    from vugen_cli.nano.edit_study import score_edits
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.sampling.trained import load_sampler

    loaded = load_sampler(pick_sampler(sampler), vlm, join(pick_device(device)))
    drawn = out.parent / "edits"
    report = score_edits(loaded, count, drawn, guidance=guidance, image_guidance=image_guidance)
    return finish(report, out)


@app.command(name="edit-benchmark")
def edit_benchmark(
    benchmark: Annotated[
        Path, typer.Argument(help="ImgEdit's singleturn.json, or GEdit-Bench's parquet files.")
    ],
    sampler: SamplerOption = None,
    judge: Annotated[str | None, typer.Option(help="VLM that judges. [default: the sampler's]")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Only the first edits.")] = None,
    language: Annotated[str, typer.Option(help="Of GEdit-Bench's instructions, en or cn.")] = "en",
    vlm: VlmOption = None,
    out: OutOption = Path("edit-benchmark.json"),
    device: DeviceOption = None,
) -> Answer:
    """Edits of photographs from ImgEdit or GEdit-Bench, judged by a VLM.

    Published figures have another judge, GPT-4.1: do not set these beside them.

    \b
    Examples:
      vugen study edit-benchmark ImgEdit/Benchmark/singleturn --judge Qwen/Qwen3-VL-8B-Instruct
      vugen study edit-benchmark GEdit-Bench/data --judge models/judge --count 50
    """
    from vugen_cli.engine.device import pick_device
    from vugen_cli.metrics.report import finish
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.sampling.trained import load_sampler
    from vugen_cli.studies.edit_benchmarks import asks, read_benchmark, score_benchmark
    from vugen_cli.vlm.frozen import load_model

    cases = read_benchmark(benchmark, language)
    cases.cases = cases.cases[:count]
    where = join(pick_device(device))
    loaded = load_sampler(pick_sampler(sampler), vlm, where)
    ask = asks(loaded.vlm.model, loaded.vlm.processor)
    if judge and is_first():  # which alone asks
        ask = asks(*load_model(judge, where, "bfloat16" if where.type == "cuda" else "float32"))
    folder = out.parent / "edit-benchmark"
    return finish(score_benchmark(loaded, cases, ask, judge or loaded.vlm.name, folder), out)


@app.command()
def understanding(
    sampler: SamplerOption = None,
    images: Annotated[
        Path | None, typer.Option(help="What is asked about.", show_default="held-out OpenMoji scenes")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 4,
    vlm: VlmOption = None,
    out: OutOption = Path("understanding.json"),
    device: DeviceOption = None,
) -> Answer:
    """Whether the VLM still answers bit for bit as it did before there was a sampler beside it.

    \b
    Examples:
      vugen study understanding
      vugen study understanding --sampler sampler.safetensors --images photos --count 16
    """
    from vugen_cli.engine.device import pick_device
    from vugen_cli.files import write_json
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.studies.understanding import UnderstandingReport, score_understanding

    where = join(pick_device(device))
    if not is_first():  # two answers to a question are no work to share out
        return None
    result = score_understanding(pick_sampler(sampler), _pictures(images, count), vlm, where)
    _tell(result)
    report = UnderstandingReport(scores=[result])
    write_json(out, report.written())
    typer.echo(f"Written to {out}.")
    if not result.preserved:
        raise VugenError(f"{result.vlm} does not answer as it did: its weights were changed on disk or here")
    return report


def _pictures(images: Path | None, count: int) -> "list[torch.Tensor]":
    """The first images of a set, or held-out scenes, as uint8 [3, H, W] each."""
    import numpy as np
    import torch

    from vugen_cli.metrics.image_sets import open_image_set

    if images is not None:
        found = open_image_set(images, count)
        if pictures := [torch.from_numpy(image) for image in found]:
            return pictures
        raise VugenError(f"--images {images} holds no picture that can be read ({', '.join(found.bad[:2])})")
    from vugen_cli.nano.scenes import OpenMojiScenes

    scenes = OpenMojiScenes(count, "val", 64)
    pixels = (np.asarray(scenes[i].image).transpose(2, 0, 1) for i in range(count))
    return [torch.from_numpy(np.ascontiguousarray(image)) for image in pixels]


def _tell(result: "Understanding") -> None:
    verdict = "preserved, bit for bit" if result.preserved else "CHANGED"
    typer.echo(f"understanding of {result.vlm} with {result.sampler}: {verdict}")
    same = "equal" if result.weights_before == result.weights_after else "DIFFERENT"
    typer.echo(f"  weights   {same} (sha256 {result.weights_before[:16]})")
    typer.echo(f"  logits    {result.logits_that_differ} of {result.logits_compared} differ")
    for question, answers in zip(result.questions, result.answers_after, strict=True):
        typer.echo(f"  asked     {question}\n  answered  {answers[0]}")


@app.command()
def training(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `vugen train-sampler` left, `<out>.run`.")],
    features: FeaturesOption = "inception",
    reference: Annotated[
        Path | None, typer.Option(help="A prepared data set.", show_default="each run's own")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Prompts, one sample of each.")] = 256,
    out: OutOption = Path("training.json"),
    device: DeviceOption = None,
) -> Answer:
    """How soon samples get good: the Fréchet distance of every checkpoint that runs have kept.

    Checkpoints are kept by `--set train_sampler.keep_every=1000`; each is scored once. Beside the result
    stands a picture of all runs, against steps and against images seen.

    \b
    Examples:
      vugen study training sampler.run --features vlm
      vugen study training sampler.run baseline-sampler.run --features vlm --count 1000
    """
    from vugen_cli.checkpoint import read_card
    from vugen_cli.engine.device import pick_device
    from vugen_cli.files import write_json
    from vugen_cli.metrics.encoders import load_extractor
    from vugen_cli.metrics.features import cache_folder
    from vugen_cli.studies.over_training import (
        OverTraining,
        kept_checkpoints,
        plot_over_training,
        score_over_training,
    )

    where = join(pick_device(device))
    kept = [kept_checkpoints(run) for run in runs]  # what is missing is told before a network is loaded
    extractor = load_extractor(features, read_card(kept[0][0]).vlm.name, where)
    curves = score_over_training(
        runs, extractor, reference=reference, count=count, device=where, cache=cache_folder()
    )
    if not is_first():
        return None
    report = OverTraining(over_training=curves)
    write_json(out, report.written())
    plot_over_training(curves, out.with_suffix(".png"))
    _tell_curves(curves, out)
    return report


def _tell_curves(curves: "dict[str, list[Point]]", out: Path) -> None:
    for run, curve in curves.items():
        for point in curve:
            typer.echo(f"{run}  step {point.step:>8,}  {point.images:>10,} images  {point.value:.4f}")
    for warning in dict.fromkeys(
        point.warning for curve in curves.values() for point in curve if point.warning
    ):
        typer.echo(f"note: {warning}")
    typer.echo(f"{next(iter(curves.values()))[0].name}: {out} and {out.with_suffix('.png')}.")


@app.command()
def diversity(
    images: ImagesOption = None,
    reference: Annotated[
        Path | None, typer.Option(help="Real images with captions, measured beside.", show_default=False)
    ] = None,
    features: FeaturesOption = "inception",
    count: Annotated[
        int | None, typer.Option(min=2, help="Only this many images.", show_default=False)
    ] = None,
    batch_size: BatchOption = None,
    out: OutOption = Path("diversity.json"),
    device: DeviceOption = None,
) -> Answer:
    """How much the pictures of one prompt differ, over its seeds.

    Beside the result stands a picture of the prompt with the most images.

    \b
    Examples:
      vugen study diversity --features vlm
      vugen study diversity --features vlm --images samples --reference data/coco
    """
    from vugen_cli.engine.device import pick_device
    from vugen_cli.metrics.diversity import score_diversity
    from vugen_cli.metrics.encoders import load_extractor
    from vugen_cli.metrics.features import cache_folder
    from vugen_cli.metrics.image_sets import open_image_set
    from vugen_cli.metrics.prompted_images import prompted_images
    from vugen_cli.metrics.report import finish
    from vugen_cli.metrics.samples import pick_images, recorded_vlm

    where = join(pick_device(device))
    drawn = prompted_images(open_image_set(pick_images(images), count))
    real = prompted_images(open_image_set(reference)) if reference else None
    report = score_diversity(
        drawn,
        load_extractor(features, recorded_vlm(drawn.images), where),
        reference=real,
        batch_size=batch_size,
        cache=cache_folder(),
        picture=out.with_suffix(".png"),
    )
    return finish(report, out)
