"""Scores of images against their prompts: what was asked for is opened, judged and reported together."""

from pathlib import Path

import torch

from vugen_cli.errors import VugenError
from vugen_cli.metrics.clip_score import clip_scores
from vugen_cli.metrics.detectors import load_detector
from vugen_cli.metrics.dpg_bench import dpg_bench_scores, match_items, read_dpg_bench
from vugen_cli.metrics.encoders import load_clip
from vugen_cli.metrics.geneval import check_geneval, geneval_scores, read_geneval
from vugen_cli.metrics.geneval2 import geneval2_scores, read_geneval2
from vugen_cli.metrics.image_sets import ImageSet
from vugen_cli.metrics.prompted_images import prompted_images
from vugen_cli.metrics.report import Report, Score, versions
from vugen_cli.metrics.vqa import YesNoJudge, vqa_scores


def score_prompts(
    images: ImageSet,
    *,
    clip_score: bool = False,
    vqa_score: bool = False,
    dpg_bench: Path | None = None,
    geneval: Path | None = None,
    geneval2: Path | None = None,
    clip: str | None = None,
    vlm: str = "nano",
    detector: Path | None = None,
    grid: bool = False,
    device: torch.device | str = "cpu",
) -> Report:
    """Scores of images against the prompts they were drawn for.

    Args:
        images: a set with prompts; see `prompted_images`.
        clip_score, vqa_score: whether CLIPScore and VQAScore are wanted.
        dpg_bench: folder of DPG-Bench's files; images without other prompts may be named after its items.
        geneval: GenEval's `evaluation_metadata.jsonl`.
        geneval2: GenEval 2's `geneval2_data.jsonl`.
        clip: MODEL:PRETRAINED of open_clip, for CLIPScore and GenEval's colours.
        vlm: who answers VQAScore, DPG-Bench and GenEval 2, in bfloat16 on a GPU.
        detector: directory of the detector of GenEval.
        grid: each image is a 2x2 grid of four.
        device: where the networks run.

    Returns:
        A report, whose scores each say by what they were judged.

    Raises:
        VugenError: something needed is missing or in another layout; told before any image is looked at where
            it can be.
    """
    if (clip_score or geneval) and clip is None:
        asking = "--clip-score" if clip_score else "--geneval"
        raise VugenError(
            f"{asking} needs a CLIP: give --clip MODEL:PRETRAINED or MODEL:FILE, as ViT-L-14:openai."
        )
    if geneval and detector is None:
        raise VugenError(
            "--geneval needs a detector: give --detector DIRECTORY, such as a Mask2Former on COCO."
        )
    items = read_dpg_bench(dpg_bench) if dpg_bench else []
    asked = read_geneval(geneval) if geneval else {}
    atoms = read_geneval2(geneval2) if geneval2 else {}
    pairs = prompted_images(images, grid, {item.id: item.prompts[-1] for item in items})
    if dpg_bench:
        match_items(pairs, items, dpg_bench)
    if geneval2:
        pairs.refuse_others(atoms, geneval2, "FILE")
    scores: list[Score] = []
    loaded_clip = load_clip(clip, device) if clip is not None and (clip_score or geneval) else None
    found = load_detector(detector, device) if geneval and detector else None
    if geneval and found:
        check_geneval(asked, pairs, geneval, found)
    if clip_score and loaded_clip:
        scores += clip_scores(pairs, loaded_clip)
    if geneval and found and loaded_clip:
        scores += geneval_scores(pairs, asked, found, loaded_clip)
    if vqa_score or dpg_bench or geneval2:
        judge = YesNoJudge(vlm, device)
        if vqa_score:
            scores += vqa_scores(pairs, judge)
        if dpg_bench:
            scores += dpg_bench_scores(pairs, items, dpg_bench, judge)
        if geneval2:
            scores += geneval2_scores(pairs, atoms, judge)
    return Report(
        scores=scores,
        images=pairs.images.describe(),
        prompts=pairs.describe(),
        reference=None,
        versions=versions(),
        warning=None,
    )
