"""Reducers x widths x decoders: what survives, and how soon a sampler draws well in each latent space.

    python benchmarks/reducers_and_decoders.py --data data/openmoji --out experiments/openmoji
    python benchmarks/reducers_and_decoders.py --data data/cifar --out experiments/cifar --widths 16 --no-vae

Every row trains a reducer and a decoder (`--reducer-steps`), reconstructs held-out images, then trains a
sampler (`--sampler-steps`) and scores its samples at each of `--score-at` steps: the paper's Figure 3, in
small. Samples are compared with real images, and with the row's own reconstructions of real images: the
second distance tells how well the latents are drawn, whatever the decoder blurs. A row that is finished is
not repeated, a row that was stopped goes on, so the script can be killed at any time, and `--rows` shares the
rows out. `table.md` and `results.json` in --out are written again after each row, with the table of decoding
in 1, 2, 4 and 8 steps and of a distilled decoder.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vugen_cli.data.loader import ShardedImages
from vugen_cli.engine.device import pick_device
from vugen_cli.files import whole_file, write_json
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.scores import score_sets
from vugen_cli.recipe import Recipe, load_recipe, parse_recipe
from vugen_cli.sampling.draw import draw
from vugen_cli.sampling.trained import load_autoencoder, load_sampler
from vugen_cli.stages.distill import distill
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.stages.train_vae import train_vae
from vugen_cli.studies.reconstruct import reconstruct
from vugen_cli.vlm.frozen import load_vlm


@dataclass(frozen=True)
class Row:
    """One line of the table: a name, and what it sets in the recipe."""

    name: str
    settings: tuple[str, ...]


def main() -> None:
    """Train and measure every row within the budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="prepared, with a val split")
    parser.add_argument("--out", type=Path, default=Path("experiments"))
    parser.add_argument("--vlm", default="nano")
    parser.add_argument("--kinds", nargs="*", default=["linear", "mlp", "attention", "pca"])
    parser.add_argument("--widths", nargs="*", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--decoders", nargs="*", default=["pdd", "ldm"])
    parser.add_argument("--rows", nargs="*", help="only these, as linear-16-pdd; default: all combinations")
    parser.add_argument("--no-vae", action="store_true", help="leave out the VAE: no ldm and no baseline row")
    parser.add_argument("--reducer-steps", type=int, default=1300)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--sampler-steps", type=int, default=2000, help="0: no sampler")
    parser.add_argument("--distill-steps", type=int, default=400, help="0: no student")
    parser.add_argument("--score-at", nargs="*", type=int, default=[500, 1000, 2000])
    parser.add_argument("--images", type=int, default=500, help="reconstructed, and sampled, for each score")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--set", action="append", default=[], help="more recipe overrides, for every row")
    parser.add_argument("--device")
    options = parser.parse_args()
    device = pick_device(options.device)
    vae = None if options.no_vae else options.out / "vae"
    every = rows(options, vae)
    wanted = [row for row in every if not options.rows or row.name in options.rows]
    if vae and not vae.is_dir() and any("decoder.vae" in key for row in wanted for key in row.settings):
        recipe = make_recipe(options, Row("vae", (f"train_vae.steps={options.vae_steps}",)))
        train_vae(recipe, options.data, vae, device)
    steps = ""
    for row in wanted:
        done = options.out / f"{row.name}.json"
        if not done.is_file():
            write_json(done, measure(row, options, device))
        if row == wanted[-1] and options.distill_steps:
            steps = "\n" + decoding_steps(wanted[0], options, device)
        finished = [options.out / f"{row.name}.json" for row in every]
        results = [json.loads(path.read_text()) for path in finished if path.is_file()]
        write_json(options.out / "results.json", results)
        with whole_file(options.out / "table.md") as temporary:
            temporary.write_text(table(results, options) + steps)
        print(table(results, options) + steps, flush=True)


def rows(options: argparse.Namespace, vae: Path | None) -> list[Row]:
    """Every combination; the identity reducer and the baseline come last, without a width to choose."""
    found = []
    for decoder in options.decoders:
        if decoder == "ldm" and vae is None:
            continue
        uses = ("decoder.kind=ldm", f"decoder.vae={vae}") if decoder == "ldm" else ()
        for kind in options.kinds:
            for width in options.widths:
                settings = (f"reducer.kind={kind}", f"reducer.channels={width}", *uses)
                found.append(Row(f"{kind}-{width}-{decoder}", settings))
    found.append(Row("identity-pdd", ("reducer.kind=identity",)))
    if vae:
        found.append(Row("vae-baseline", ("reducer.kind=vae", f"decoder.vae={vae}")))
    return found


def make_recipe(options: argparse.Namespace, row: Row) -> Recipe:
    """The nano recipe with the budget, the row's settings and --set, in this order."""
    stages = ("train_reducer", "train_sampler", "train_vae")
    budget = [f"{s}.batch_size={options.batch_size}" for s in stages]
    budget.append(f"train_reducer.steps={options.reducer_steps}")
    budget += [f"{s}.warmup=50" for s in stages] + [f"{s}.preview_every=1000000" for s in stages]
    return load_recipe("nano", [*budget, f"vlm={options.vlm}", *row.settings, *options.set])


def measure(row: Row, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train one row, as far as it is not trained yet, and measure it."""
    recipe, base = make_recipe(options, row), options.out / row.name
    reducer = base.with_suffix(".safetensors")
    if not reducer.is_file():
        train_reducer(recipe, options.data, reducer, device)
    found = reconstruct(reducer, options.data, base / "rec", options.images, device=device, save_images=True)
    result: dict[str, Any] = {
        "name": row.name,
        **{key: getattr(found, key) for key in ("psnr", "ssim", "frechet")},
        "channels": load_autoencoder(reducer, device)[2].latents.channels,
        "decode_per_s": decoding_speed(reducer, device),
        "effective_rank": json.loads(reducer.with_suffix(".latents.json").read_text())["effective_rank"],
        "sampler": {},
        "sampler_to_decoded": {},
    }
    if row.name == "identity-pdd":  # nobody samples there; it is the ceiling of what can be decoded
        return result
    for steps in sorted({*options.score_at, options.sampler_steps}):
        if 0 < steps <= options.sampler_steps:
            distances = sampler_scores(recipe, reducer, steps, base, options, device)
            result["sampler"][str(steps)], result["sampler_to_decoded"][str(steps)] = distances
    return result


def sampler_scores(
    recipe: Recipe, reducer: Path, steps: int, base: Path, options: argparse.Namespace, device: torch.device
) -> list[float]:
    """Fréchet distances, on the VLM's features, of samples for held-out captions after some training steps.

    The first to real images, the second to the reconstructions of real images.

    Each length is a run of its own with its own falling learning rate: a fair point of the curve, not the
    middle of a longer run.
    """
    recipe = parse_recipe(recipe.model_dump(), "benchmark", [f"train_sampler.steps={steps}"])
    path = base.with_name(f"{base.name}-sampler-{steps}.safetensors")
    if not path.is_file():
        train_sampler(recipe, reducer, options.data, path, device)
    sampler = load_sampler(path, device=device)
    held_out = ShardedImages(options.data).held_out().in_order(options.images)
    prompts = list(dict.fromkeys(meta["captions"][0] for _, meta in held_out if meta["captions"]))
    each = max(1, options.images // len(prompts))
    folder = draw(sampler, prompts, each, base.with_name(path.stem))
    extractor = vlm_extractor(load_vlm(options.vlm, device))
    references = options.data, base / "rec" / "decoded"
    reports = [score_sets(folder, reference, extractor, count=options.images) for reference in references]
    return [value for report in reports if (value := report.scores[0].value) is not None]


def decoding_speed(checkpoint: Path, device: torch.device, steps: int | None = None) -> float:
    """Images/s of decoding alone: the median of five batches of 16 after one to warm up."""
    autoencoder, _, card = load_autoencoder(checkpoint, device)
    grid, channels = card.latents.grid, card.latents.channels
    latents = torch.randn(16, *grid, channels, device=device)
    noise = torch.randn(16, 3, card.image_size, card.image_size, device=device)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        autoencoder.decode(latents, noise, steps).cpu()
        seconds.append(time.perf_counter() - started)
    return 16 / sorted(seconds[1:])[2]


def decoding_steps(row: Row, options: argparse.Namespace, device: torch.device) -> str:
    """Speed and quality of one row's decoder in 1, 2, 4 and 8 steps, and of its one-step student."""
    teacher = options.out / f"{row.name}.safetensors"
    student = options.out / f"{row.name}-one-step.safetensors"
    if not student.is_file():
        more = [
            "decoder.steps=8",
            f"train_reducer.steps={options.distill_steps}",
            "train_reducer.lr=2e-4",
            "decoder.losses.perceptual=0.2",
        ]
        recipe = parse_recipe(make_recipe(options, row).model_dump(), "benchmark", more)
        distill(recipe, teacher, options.data, student, device)
    ways = [(teacher, 1), (teacher, 2), (teacher, 4), (teacher, 8), (student, 1)]
    lines = ["| decoder | steps | images/s | PSNR | SSIM | rFD |", "|---|---|---|---|---|---|"]
    for path, steps in ways:
        found = reconstruct(
            path, options.data, options.out / f"{path.stem}-{steps}", options.images, steps, device=device
        )
        lines.append(
            f"| {'distilled' if path == student else row.name} | {steps} | "
            f"{decoding_speed(path, device, steps):.1f} | {found.psnr:.2f} | {found.ssim:.4f} | "
            f"{found.frechet:.3f} |"
        )
    return "\n".join(lines) + "\n"


def table(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The Markdown table so far."""
    points = sorted({int(step) for result in results for step in result["sampler"]})
    head = ["reducer, c, decoder", "c", "rank", "PSNR", "SSIM", "rFD", "decode img/s"]
    columns = ("sampler", "FD"), ("sampler_to_decoded", "to decoded")
    head += [f"{title} at {step}" for _, title in columns for step in points]
    lines = [
        f"{options.data}: {options.reducer_steps} reducer steps x {options.batch_size} images, "
        f"{options.images} images scored, Fréchet distances on the VLM's features (not FID).",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for r in results:
        cells = [r["name"], str(r["channels"]), f"{r['effective_rank']:.1f}", f"{r['psnr']:.2f}"]
        cells += [f"{r['ssim']:.4f}", f"{r['frechet']:.3f}", f"{r['decode_per_s']:.1f}"]
        cells += [f"{r[key][str(p)]:.3f}" if str(p) in r[key] else "" for key, _ in columns for p in points]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
