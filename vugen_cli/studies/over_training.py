"""Scores of the checkpoints that training runs kept (the paper's Figure 3): how soon do samples get good?"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import typer

from vugen_cli.checkpoint import read_card
from vugen_cli.data.loader import ShardedImages
from vugen_cli.data.manifest import read_manifest
from vugen_cli.errors import VugenError
from vugen_cli.files import whole_file, write_json
from vugen_cli.metrics.features import Extractor
from vugen_cli.metrics.scores import score_sets
from vugen_cli.processes import from_first, is_first
from vugen_cli.sampling.draw import draw
from vugen_cli.sampling.trained import load_sampler

Curve = list[dict[str, Any]]


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
        if (stage := read_card(path).get("stage")) != "sampler":
            raise VugenError(f"{path} is a {stage} checkpoint: --over-training draws with samplers")
    return found


def score_over_training(
    runs: list[Path],
    extractor: Extractor,
    *,
    reference: Path | None = None,
    count: int = 256,
    seed: int = 0,
    vlm: str | None = None,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> dict[str, Curve]:
    """Fréchet distance of every kept checkpoint's samples, at the same prompts and seeds.

    Prompts are the first captions of the reference's held-out images. What was scored is in
    `over-training.json` of each run and is not scored again unless the settings or the checkpoint changed;
    the samples lie beside it.

    Args:
        runs: folders of sampler training, `<out>.run`.
        extractor: the features.
        reference: a prepared data set; default: that of each run.
        count: prompts, one sample of each.
        seed: of the samples.
        vlm: where the VLM is now, if not where the cards say.
        device: where to sample.
        cache: folder of cached features.

    Returns:
        For each run, by name: rows of `step`, `images` seen, `metric`, `name` and `value`.

    Raises:
        VugenError: as `kept_checkpoints`, or a reference that cannot be read or has no captions.
    """
    curves = {}
    for run, checkpoints in [(run, kept_checkpoints(run)) for run in runs]:
        listing = run / "over-training.json"
        rows: Curve = json.loads(listing.read_text()) if listing.is_file() else []
        known = {row["key"]: row for row in rows}
        curve = []
        for path in checkpoints:
            card = read_card(path)
            data = reference or Path(card["data"]["path"])
            asked = [read_manifest(data), count, seed, extractor.label, extractor.identity]
            digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
            digest.update(path.read_bytes())
            key = digest.hexdigest()
            if from_first(key not in known):
                samples = run / "over-training" / path.stem
                sampler = load_sampler(path, vlm, device)
                draw(sampler, _captions(data, count), 1, samples, seed)
                report = score_sets(samples, data, extractor, ("fid",), count=count, cache=cache)
                score = from_first(report and report["scores"][0])
                known[key] = {
                    "key": key,
                    "step": card["step"],
                    "images": card["step"] * card["recipe"]["train_sampler"]["batch_size"],
                    **{name: score[name] for name in ("metric", "name", "value")},
                }
                if is_first():
                    write_json(listing, list(known.values()))
            curve.append(known[key])
        curves[str(run)] = curve
    return curves


def plot_over_training(curves: dict[str, Curve], path: Path) -> None:
    """A PNG of the metric against training steps and against images seen, all runs on the same axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, by, label in zip(axes, ("step", "images"), ("training step", "images seen"), strict=True):
        for run, curve in curves.items():
            axis.plot([row[by] for row in curve], [row["value"] for row in curve], marker="o", label=run)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(next(iter(curves.values()))[0]["name"])
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _captions(data: Path, count: int) -> list[str]:
    captions = [
        meta["captions"][0] for _, meta in ShardedImages(data).held_out().in_order() if meta["captions"]
    ]
    different = list(dict.fromkeys(captions))[:count]
    if not different:
        raise VugenError(f"{data} has no captions: --over-training draws what its held-out images show")
    return different


def print_over_training(
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
