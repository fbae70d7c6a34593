"""`vugen demo`: the whole line on the embedded default, from scenes to scores, and one page about it."""

import html
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from vugen_cli.data.loader import read_manifest
from vugen_cli.data.openmoji import OpenMojiScenes
from vugen_cli.data.writer import write_dataset
from vugen_cli.engine.draw import draw
from vugen_cli.engine.reconstruct import reconstruct
from vugen_cli.engine.sampling import Sampler, load_sampler
from vugen_cli.engine.train_reducer import train_reducer
from vugen_cli.engine.train_sampler import train_sampler
from vugen_cli.files import whole_file, write_json
from vugen_cli.metrics.frechet import score_sets, vlm_extractor
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.recipe import load_recipe

PROMPTS = [
    "a bear in a forest",
    "a rocket in space",
    "a penguin in the snow",
    "a red car in a city at night",
    "a whale in the sea",
    "a cow in a meadow",
    "an apple on a beach",
    "a snake in a desert",
]
PER_PROMPT = 16  # images of each prompt that are scored
# Sized for about six minutes on two CPU cores; the full recipe trains many times longer.
SETTINGS = [
    "train_reducer.steps=350",
    "train_reducer.batch_size=32",
    "train_reducer.ema=0.99",
    "train_sampler.steps=600",
    "train_sampler.batch_size=32",
    "train_sampler.ema=0.99",
    "train_reducer.warmup=30",
    "train_sampler.warmup=30",
    "train_reducer.checkpoint_every=100",
    "train_sampler.checkpoint_every=100",
    "train_reducer.preview_every=100",
    "train_sampler.preview_every=200",
    "sampling.steps=10",
]


def run_demo(out: Path, device: torch.device) -> Path:
    """Run every stage into a folder and return the page about it.

    Args:
        out: made if missing; finished training is not repeated.
        device: where to train and sample.
    """
    started = time.perf_counter()
    recipe = load_recipe("nano", SETTINGS)
    data = out / "data"
    _say("1/6 prepare: draw 4,000 scenes to train on and 500 to compare with")
    for split, count in (("train", 4000), ("val", 500)):
        write_dataset(OpenMojiScenes(count, split, 64), data, split, 64, workers=2)

    _say("2/6 train-reducer: what of the VLM's latents is kept, and how to draw it")
    reducer = train_reducer(recipe, data, out / "reducer.safetensors", device)

    _say("3/6 train-sampler: a velocity field in that space, given a prompt")
    trained = load_sampler(
        train_sampler(recipe, reducer, data, out / "sampler.safetensors", device), device=device
    )

    _say("4/6 sample: before training and after")
    for name, sampler in (("untrained", _untrained(trained)), ("samples", trained)):
        draw(sampler, PROMPTS, PER_PROMPT, out / name)

    _say("5/6 reconstruct: held-out scenes through the reducer and back")
    reconstruction = reconstruct(reducer, data, out, count=64, device=device)

    _say("6/6 score: Fréchet distance to held-out scenes, on the VLM's own features")
    extractor = vlm_extractor(trained.vlm, device)
    scores = {name: score_sets(out / name, data, extractor) for name in ("untrained", "samples")}
    write_json(out / "scores.json", {"scores": list(scores.values()), "reconstruction": reconstruction})

    minutes = (time.perf_counter() - started) / 60
    report = out / "report.html"
    with whole_file(report) as temporary:
        temporary.write_text(
            report_page(out, recipe.model_dump(), scores, reconstruction, minutes), encoding="utf-8"
        )
    before, after = scores["untrained"]["value"], scores["samples"]["value"]
    _say(
        f"done in {minutes:.1f} min: Fréchet distance {before:.2f} before training, {after:.2f} after; "
        f"reconstruction {reconstruction['psnr']:.1f} dB"
    )
    return report


def _say(line: str) -> None:
    print(line, flush=True)


def _untrained(trained: Sampler) -> Sampler:
    """The same sampler with the generation expert as it was before its first step."""
    torch.manual_seed(0)
    latents = trained.card["latents"]
    decoder = trained.vlm.decoder
    expert = GenerationExpert(decoder.config, latents["channels"], tuple(latents["grid"]), decoder)
    expert = expert.to(trained.vlm.device).eval()
    return Sampler(trained.vlm, expert, trained.decoder, trained.card, "untrained")


def report_page(
    out: Path,
    recipe: dict[str, Any],
    scores: dict[str, dict[str, Any]],
    reconstruction: dict[str, Any],
    minutes: float,
) -> str:
    """The demo's page: pictures beside it in `out`, no script, no network, light and dark, wide and narrow."""
    manifest = read_manifest(out / "data")
    for stage in ("reducer", "sampler"):
        shutil.copyfile(out / f"{stage}.run" / "curves.png", out / f"curves-{stage}.png")
    before, after = scores["untrained"], scores["samples"]
    counts = {split: facts["count"] for split, facts in manifest["splits"].items()}
    cards = [
        (
            "Fréchet distance to held-out scenes",
            f"{before['value']:.2f} → {after['value']:.2f}",
            "before → after training; on VLM features, not FID; lower is better",
        ),
        (
            "Reconstruction",
            f"{reconstruction['psnr']:.1f} dB",
            f"PSNR of {reconstruction['images']['count']} held-out scenes from z̃; SSIM {reconstruction['ssim']:.3f}",
        ),
        ("Time", f"{minutes:.1f} min", "every stage, on this machine"),
    ]
    figures = [
        (
            "Samples after training",
            "samples/grid.png",
            "The first prompts, one row each. This sampler trained for minutes; the bundled one behind <code>vugen sample</code> trained for longer.",
        ),
        (
            "The same prompts before training",
            "untrained/grid.png",
            "The expert's velocity is zero, so the decoder is shown pure noise.",
        ),
        (
            "Reconstruction",
            "reconstruction.png",
            "Rows of originals, each above what the pixel decoder makes of its reduced latents.",
        ),
        (
            "Reducer and pixel decoder: training",
            "curves-reducer.png",
            f"{recipe['train_reducer']['steps']} steps of {recipe['train_reducer']['batch_size']} images.",
        ),
        (
            "Sampler: training",
            "curves-sampler.png",
            f"{recipe['train_sampler']['steps']} steps of {recipe['train_sampler']['batch_size']} images.",
        ),
    ]
    tiles = "".join(
        f"<div class=card><small>{html.escape(a)}</small><b>{html.escape(b)}</b><small>{html.escape(c)}</small></div>"
        for a, b, c in cards
    )
    pictures = "".join(
        f"<figure><h2>{html.escape(title)}</h2><a href='{path}'><img src='{path}' alt='{html.escape(title)}'></a><figcaption>{text}</figcaption></figure>"
        for title, path, text in figures
    )
    return PAGE.format(
        tiles=tiles,
        pictures=pictures,
        train=f"{counts['train']:,}",
        val=f"{counts['val']:,}",
        licence=html.escape(manifest["licence"]),
        prompts=html.escape("; ".join(PROMPTS)),
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>vugen demo</title>
<style>
:root {{ color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --page: #fbfbfc; --tile: #fff; --line: #e3e5e9; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #edeef0; --soft: #a5abb5; --page: #111317; --tile: #1a1d22; --line: #2e333b; }} }}
body {{ margin: 0 auto; max-width: 1080px; padding: 2rem 1rem; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }}
h1 {{ font-size: 1.9rem; margin: 0 0 .3rem; }} h2 {{ font-size: 1.1rem; margin: 0 0 .6rem; }} p, figcaption, small {{ color: var(--soft); }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 1rem; margin: 1.5rem 0; }}
.card, figure {{ background: var(--tile); border: 1px solid var(--line); border-radius: 12px; padding: 1rem; margin: 0; }}
.card b {{ display: block; font-size: 1.6rem; }}
figure {{ margin: 0 0 1rem; }} img {{ width: 100%; height: auto; border-radius: 6px; background: #fff; }}
</style></head><body>
<h1>vugen demo</h1>
<p>A vision-language model, frozen, made to draw: its own embeddings were reduced, a copy of its decoder learned to sample
them for a prompt, and a pixel decoder turned them into pictures. {train} scenes to train on, {val} held out.</p>
<div class="cards">{tiles}</div>
{pictures}
<p>Prompts: {prompts}. Pictures: {licence}.</p>
</body></html>
"""
