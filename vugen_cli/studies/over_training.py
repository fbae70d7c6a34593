"""Scores of the checkpoints that training runs kept (the paper's Figure 3): how soon do samples get good?"""

import hashlib
import json
from pathlib import Path

import torch
from pydantic import Field, TypeAdapter, ValidationError

from vugen_cli.checkpoint import read_card
from vugen_cli.data.loader import ShardedImages
from vugen_cli.data.manifest import read_manifest
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import whole_file, write_json
from vugen_cli.metrics.features import Extractor
from vugen_cli.metrics.report import Record
from vugen_cli.metrics.scores import score_sets
from vugen_cli.processes import broadcast, is_first
from vugen_cli.sampling.draw import draw
from vugen_cli.sampling.trained import load_sampler

SEED = 0  # of the samples


class Point(Record):
    """The samples of one kept checkpoint, scored."""

    key: str = Field(description="hash of the checkpoint and of all that the score depends on")
    step: int = Field(description="optimiser steps taken")
    images: int = Field(description="training images seen")
    metric: str = Field(description="as in a score")
    name: str = Field(description="as in a score")
    value: float = Field(description="the score")
    warning: str | None = Field(None, description="as in a score")


class OverTraining(Record):
    """What `vugen study training` writes."""

    over_training: dict[str, list[Point]] = Field(description="by run: its kept checkpoints in order of step")


def kept_checkpoints(run: Path) -> list[Path]:
    """The sampler checkpoints that `train_sampler.keep_every` left in a run's folder, in order of step.

    Raises:
        VugenError: there are none, or they are of another stage.
    """
    found = sorted(run.glob("step-*.safetensors"))
    if not found:
        raise VugenError(
            f"{run} holds no kept checkpoints (step-*.safetensors): train with "
            "--set train_sampler.keep_every=500"
        )
    for path in found:
        if (stage := read_card(path).stage) != "sampler":
            raise VugenError(f"{path} is a {stage} checkpoint: give runs of `vugen train-sampler`")
    return found


def score_over_training(
    runs: list[Path],
    extractor: Extractor,
    *,
    reference: Path | None = None,
    count: int = 256,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> dict[str, list[Point]]:
    """Fréchet distance of every kept checkpoint's samples, at the same prompts and seeds.

    Prompts are the first captions of the reference's held-out images. What was scored is in
    `over-training.json` of each run and is not scored again unless the settings or the checkpoint changed;
    the samples lie beside it.

    Args:
        runs: folders of sampler training, `<out>.run`.
        extractor: the features.
        reference: a prepared data set; default: that of each run.
        count: prompts, one sample of each.
        device: where to sample.
        cache: folder of cached features.

    Returns:
        For each run, by name, a point for each checkpoint.

    Raises:
        VugenError: as `kept_checkpoints`, or a reference that cannot be read or has no captions.
    """
    curves = {}
    for run, checkpoints in [(run, kept_checkpoints(run)) for run in runs]:
        listing = run / "over-training.json"
        known = {point.key: point for point in _read_points(listing)}
        curve = []
        for path in checkpoints:
            card = read_card(path)
            data = reference or Path(card.data.path)
            seen_by = [extractor.label, extractor.identity, extractor.resize]
            asked = [read_manifest(data).sha256, count, SEED, *seen_by]
            digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
            digest.update(path.read_bytes())
            key = digest.hexdigest()
            if broadcast(key not in known):
                samples = run / "over-training" / path.stem
                _draw(path, device, _captions(data, count), samples)
                report = score_sets(samples, data, extractor, ("fid",), count=count, cache=cache)
                score, warning = broadcast((report.scores[0], report.warning) if is_first() else (None, None))
                known[key] = Point(
                    key=key,
                    step=card.step,
                    images=card.step * card.recipe["train_sampler"]["batch_size"],
                    metric=score.metric,
                    name=score.name,
                    value=score.value,
                    warning=" ".join(filter(None, (score.warning, warning))) or None,
                )
                if is_first():
                    write_json(listing, [point.written() for point in known.values()])
            curve.append(known[key])
        curves[str(run)] = curve
    return curves


def _read_points(listing: Path) -> list[Point]:
    if not listing.is_file():
        return []
    try:
        return TypeAdapter(list[Point]).validate_json(listing.read_bytes())
    except ValidationError as error:
        raise VugenError(
            f"{listing} is no list of scored checkpoints ({first_line(error)}): delete it to score them again"
        ) from error


def plot_over_training(curves: dict[str, list[Point]], path: Path) -> None:
    """A PNG of the metric against training steps and against images seen, all runs on the same axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, by, label in zip(axes, ("step", "images"), ("training step", "images seen"), strict=True):
        for run, curve in curves.items():
            axis.plot(
                [getattr(point, by) for point in curve],
                [point.value for point in curve],
                marker="o",
                label=run,
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(next(iter(curves.values()))[0].name)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _draw(path: Path, device: torch.device | str, captions: list[str], out: Path) -> None:
    """Draw what captions say, cut as in training; sampler and VLM are gone before the next are loaded."""
    sampler = load_sampler(path, device=device)
    draw(sampler, list(dict.fromkeys(map(sampler.vlm.prompts.cut, captions))), 1, out, SEED, study=True)


def _captions(data: Path, count: int) -> list[str]:
    held_out = ShardedImages(data, read_manifest(data).held_out).in_order()  # COCO is often val alone
    captions = [meta["captions"][0] for _, meta in held_out if meta["captions"]]
    different = list(dict.fromkeys(captions))[:count]
    if not different:
        raise VugenError(f"{data} has no captions: a study of training draws what held-out images show")
    return different
