"""`vugen score`: how good a set of images is, by itself, against a reference, or pair by pair."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vugen_cli.commands.options import DeviceOption
from vugen_cli.errors import VugenError
from vugen_cli.metrics.encoders import Features, load_extractor
from vugen_cli.metrics.last_samples import newest_samples, recorded_reference, recorded_vlm
from vugen_cli.metrics.report import finish
from vugen_cli.processes import is_first, join
from vugen_cli.studies.over_training import print_over_training
from vugen_cli.studies.understanding import print_understanding

if TYPE_CHECKING:
    pass


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

    from vugen_cli.engine.device import pick_device
    from vugen_cli.metrics.features import cache_folder
    from vugen_cli.metrics.pairs import score_pairs
    from vugen_cli.metrics.scores import score_sets

    where = join(pick_device(device))
    cache = None if no_cache else cache_folder()
    if understanding:
        if is_first():  # two answers to a question are no work to share out
            print_understanding(_understanding(sampler, images, count or 4, vlm, where), out)
        return
    if over_training:
        from vugen_cli.studies.over_training import kept_checkpoints

        for run in over_training:
            kept_checkpoints(run)  # what is missing is told before a network is loaded
        extractor = load_extractor(features, vlm, clip, dinov2, inception_weights, over_training[0], where)
        print_over_training(over_training, extractor, reference, count or 256, cache, out, where)
        return
    if composition:
        from vugen_cli.nano.composition import score_composition
        from vugen_cli.sampling.draw import pick_sampler
        from vugen_cli.sampling.trained import load_sampler

        loaded = load_sampler(pick_sampler(sampler), vlm, where)
        finish([score_composition(loaded, count or 100, out.parent / "composition")], out)
        return
    given_reference = reference is not None
    if images is None:
        images = newest_samples(Path.cwd())
        typer.echo(f"Scoring the last samples, {images}.")
    if reference is None and (pair_metrics or set(metrics) - {"is"}):
        from vugen_cli.nano.scenes import draw_reference

        reference = recorded_reference(images, draw_reference)
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
    finish(reports, out)


def _understanding(
    sampler: Path | None, images: Path | None, count: int, vlm: str | None, device: Any
) -> dict[str, Any]:
    """The VLM's answers without and with the sampler, on the given images or on held-out scenes."""
    import numpy as np
    import torch

    from vugen_cli.metrics.image_sets import open_images
    from vugen_cli.nano.scenes import OpenMojiScenes
    from vugen_cli.sampling.draw import pick_sampler
    from vugen_cli.studies.understanding import score_understanding

    if images is None:
        scenes = OpenMojiScenes(count, "val", 64)
        pixels = [np.asarray(scenes[i].image).transpose(2, 0, 1) for i in range(count)]
    else:
        pixels = list(open_images(images, limit=count))
    tensors = [torch.from_numpy(np.ascontiguousarray(image)) for image in pixels]
    return score_understanding(pick_sampler(sampler), tensors, vlm, device)
