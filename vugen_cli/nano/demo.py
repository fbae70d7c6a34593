"""`vugen demo`: the whole line on the embedded default, from scenes to scores, and one page about it."""

import html
import os
import shutil
import time
from pathlib import Path
from string import Template
from typing import Any

import torch
from pydantic import Field

from vugen_cli.data.manifest import read_manifest
from vugen_cli.data.writer import write_dataset
from vugen_cli.files import bundle, whole_file, write_json
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.report import Record, Report, Score
from vugen_cli.metrics.scores import score_sets
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.recipe import Expert, load_recipe
from vugen_cli.sampling.draw import draw
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.sampling.trained import load_sampler, new_expert
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.studies.reconstruct import Reconstruction, reconstruct

PAGE = Path(__file__).with_name("report.html")
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
GALLERY = 4  # images of each prompt that the bundled sampler draws
PER_PROMPT = 12  # images of each prompt that are scored
SCENES = {"train": 4000, "val": 500}
# Sized for about five minutes on two CPU cores; the full recipe trains many times longer.
SETTINGS = [
    "train_reducer.steps=260",
    "train_reducer.batch_size=16",
    "train_reducer.ema=0.98",
    "train_sampler.steps=320",
    "train_sampler.batch_size=16",
    "train_sampler.ema=0.98",
    "train_reducer.warmup=30",
    "train_sampler.warmup=30",
    "train_reducer.checkpoint_every=130",
    "train_sampler.checkpoint_every=130",
    "train_reducer.preview_every=130",
    "train_sampler.preview_every=160",
    "sampling.steps=10",
]


class Demonstrated(Record):
    """What `vugen demo` leaves; beside `page`, what `scores.json` holds."""

    page: str = Field(description="the page to open")
    untrained: Report = Field(description="of pictures before training")
    samples: Report = Field(description="of pictures after it")
    reconstruction: Reconstruction = Field(description="of held-out scenes")


def run_demo(out: Path, device: torch.device) -> Path:
    """Run every stage into a folder and return the page about it.

    Args:
        out: made if missing; finished training is not repeated.
        device: where to train and sample.
    """
    started = time.perf_counter()
    recipe = load_recipe("nano", SETTINGS)
    data = out / "data"
    draw(load_sampler(bundle("sampler.safetensors"), device=device), PROMPTS, GALLERY, out / "gallery")
    _say(f"what the bundled sampler draws: {out / 'gallery/grid.png'}; now a new one is trained, for minutes")
    _say(f"1/6 prepare: draw {SCENES['train']:,} scenes to train on and {SCENES['val']:,} to compare with")
    for split, count in SCENES.items():
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
    reports = {name: score_sets(out / name, data, extractor) for name in ("untrained", "samples")}
    written = {name: report.written() for name, report in reports.items()}
    write_json(out / "scores.json", {**written, "reconstruction": reconstruction.written()})
    scores = {name: report.scores[0] for name, report in reports.items()}

    minutes = (time.perf_counter() - started) / 60
    report = out / "report.html"
    with whole_file(report) as temporary:
        temporary.write_text(
            report_page(out, recipe.model_dump(), scores, reconstruction, minutes, device), encoding="utf-8"
        )
    before, after = scores["untrained"].value, scores["samples"].value
    _say(
        f"done in {minutes:.1f} min: Fréchet distance {before:.2f} before training, {after:.2f} after; "
        f"reconstruction {reconstruction.psnr:.1f} dB"
    )
    return report


def _say(line: str) -> None:
    print(line, flush=True)


def _untrained(trained: Sampler) -> Sampler:
    """The same sampler with the generation expert as it was before its first step."""
    torch.manual_seed(0)
    expert = new_expert(trained.vlm, trained.card.latents, Expert())
    return Sampler(trained.vlm, expert.eval(), trained.autoencoder, trained.card, "untrained")


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores" if device.type == "cpu" else device.type


def report_page(
    out: Path,
    recipe: dict[str, Any],
    scores: dict[str, Score],
    reconstruction: Reconstruction,
    minutes: float,
    device: torch.device,
) -> str:
    """The demo's page; it opens from disk, and the pictures it shows lie beside it in `out`."""
    manifest = read_manifest(out / "data")
    for stage in ("reducer", "sampler"):
        shutil.copyfile(out / f"{stage}.run" / "curves.png", out / f"curves-{stage}.png")
    counts = {split: f"{facts.count:,}" for split, facts in manifest.splits.items()}
    steps = {stage: recipe[f"train_{stage}"]["steps"] for stage in ("reducer", "sampler")}
    count, quality = reconstruction.images.count, f"{reconstruction.psnr:.1f} dB"
    cards = [
        (
            "Fréchet distance to held-out scenes",
            f"{scores['untrained'].value:.2f} → {scores['samples'].value:.2f}",
            "before → after training; on VLM features, not FID; lower is better. "
            + (scores["samples"].warning or ""),
        ),
        ("Reconstruction", quality, f"PSNR of {count} held-out scenes; SSIM {reconstruction.ssim:.3f}"),
        ("Time", f"{minutes:.1f} min", f"every stage, on this machine ({device_name(device)})"),
    ]
    figures = [
        (
            "What the bundled sampler draws",
            "gallery/grid.png",
            "One row a prompt, four seeds. It was trained by the same commands, for longer.",
        ),
        (
            "What this demo's sampler draws",
            "samples/grid.png",
            f"The same prompts after {steps['sampler']} steps, made by this machine just now.",
        ),
        (
            "The same prompts before training",
            "untrained/grid.png",
            "Before its first step the expert's velocity is zero, so the decoder is shown pure noise.",
        ),
        (
            "Reconstruction",
            "reconstruction.png",
            "Rows of originals, each above what the pixel decoder makes of its reduced latents.",
        ),
        ("Training the reducer and the pixel decoder", "curves-reducer.png", f"{steps['reducer']} steps."),
        ("Training the sampler", "curves-sampler.png", f"{steps['sampler']} steps."),
    ]
    tiles = [
        f"<div class=card><small>{title}</small><b>{value}</b><small>{about}</small></div>"
        for title, value, about in cards
    ]
    pictures = [
        f"<figure><h2>{title}</h2><a href='{path}'><img src='{path}' alt='{title}'></a>"
        f"<figcaption>{about}</figcaption></figure>"
        for title, path, about in figures
    ]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        tiles="\n".join(tiles),
        pictures="\n".join(pictures),
        train=counts["train"],
        val=counts["val"],
        licence=html.escape(manifest.licence or ""),
        prompts=html.escape("; ".join(PROMPTS)),
    )
