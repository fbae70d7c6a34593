r"""z̃ or VAE latents? The paper's comparison in small: equal budgets, several seeds, rates swept for both.

    vugen train-reducer --data data/openmoji --out z.safetensors
    vugen train-vae --data data/openmoji --out vae
    vugen train-reducer --data data/openmoji --set reducer.kind=vae --set decoder.vae=vae \
        --out vae.safetensors
    python benchmarks/vae_baseline.py --data data/openmoji --arm z.safetensors --arm vae.safetensors \
        --steps 750 --seeds 0 --rates 0.5 1 2
    python benchmarks/vae_baseline.py --data data/openmoji --arm z.safetensors --steps 250 750 2250

An arm is a checkpoint of stage 1. Each run trains a sampler on its latents, with the same VLM, expert, data,
batches and steps, draws held-out prompts at every --guidance, and asks the strict judge, which has seen real
scenes only and shares nothing with the VLM, what is right; the Fréchet distances (not FID) are on its
features, times 1,000: to the real scenes, and to the arm's reconstructions of them, which tells how well the
latents are drawn, whatever the decoder blurs. Each length is a run of its own whose rate falls to zero. A run
that is finished is not repeated and one that was stopped goes on, so the script can be killed at any time and
called again with other arms, rates and seeds. `table.md` in --out has all of them, and what the arms'
reconstructions of real scenes score. A run draws at the guidance interval of its own card: compare only
runs that were trained with the same `sampling`.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from PIL import Image

from vugen_cli.checkpoint import read_card
from vugen_cli.data.sample import Sample
from vugen_cli.engine.device import pick_device
from vugen_cli.files import whole_file, write_json
from vugen_cli.metrics.frechet import frechet_distance
from vugen_cli.moments import Moments
from vugen_cli.nano.caption_judge import group_of
from vugen_cli.nano.composition import evaluation_scenes
from vugen_cli.nano.judges import stacked
from vugen_cli.nano.reader import load_reader, verdicts
from vugen_cli.recipe import load_recipe, parse_recipe
from vugen_cli.sampling.draw import draw, file_stems
from vugen_cli.sampling.trained import decode_images, load_autoencoder, load_sampler
from vugen_cli.stages.latent_cache import write_latents
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.vlm.frozen import load_vlm


def main() -> None:
    """Train and judge every run that is not there yet, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="OpenMoji scenes")
    parser.add_argument("--arm", required=True, action="append", type=Path, help="a checkpoint of stage 1")
    parser.add_argument("--out", type=Path, default=Path("experiments"))
    parser.add_argument("--vlm", default="nano")
    parser.add_argument("--steps", nargs="+", type=int, default=[250, 750, 2250])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0], help="times the recipe's")
    parser.add_argument("--guidance", nargs="+", type=float, default=[3.0, 5.0])
    parser.add_argument("--count", type=int, default=40, help="prompts of each kind")
    parser.add_argument("--set", action="append", default=[], help="more recipe overrides, for every run")
    parser.add_argument("--device")
    options = parser.parse_args()
    device = pick_device(options.device)
    for arm in options.arm:
        reference(arm, options, device)
    for steps in options.steps:  # all seeds of a short budget before a longer one
        for seed in options.seeds:
            for rate in options.rates:
                for arm in options.arm:
                    run(arm, steps, seed, rate, options, device)
                    print(table(options.out), flush=True)


def latents_of(arm: Path, options: argparse.Namespace, device: torch.device) -> Path:
    """An arm's latents, made where they are not there yet."""
    kept: Path = options.out / f"{arm.stem}-latents"
    write_latents(arm, options.data, kept, device, options.vlm)
    return kept


def run(
    arm: Path, steps: int, seed: int, rate: float, options: argparse.Namespace, device: torch.device
) -> None:
    """Train a sampler and judge what it draws at every guidance."""
    path = options.out / f"{arm.stem}-{steps}-{rate:g}-{seed}.safetensors"
    settings = [
        f"vlm={options.vlm}",
        f"seed={seed}",
        "expert.adaptive_norms=true",
        f"train_sampler.steps={steps}",
        "train_sampler.warmup=50",
        "train_sampler.ema=0.99",
        "train_sampler.cooldown=0.9",
        "train_sampler.preview_every=1000000",
        *options.set,
    ]
    recipe = load_recipe("nano", settings)
    stage_1 = parse_recipe(read_card(arm).recipe, str(arm))
    recipe = recipe.model_copy(update={"reducer": stage_1.reducer, "decoder": stage_1.decoder})
    training = recipe.train_sampler
    muon = training.muon_lr or training.lr
    rates = {"lr": rate * training.lr, "muon_lr": rate * muon}
    recipe = recipe.model_copy(update={"train_sampler": training.model_copy(update=rates)})
    if not path.is_file():
        # REPA reads z, which latents do not tell.
        data = options.data if training.repa else latents_of(arm, options, device)
        train_sampler(recipe, arm, data, path, device)
    prompts = [sample.captions[0] for sample in held_out(options.count)]
    decoded: torch.Tensor | None = None
    for guidance in options.guidance:
        found = path.with_name(f"{path.stem}-g{guidance:g}.json")
        if found.is_file():
            continue
        folder = path.with_suffix("") / f"g{guidance:g}"
        draw(load_sampler(path, device=device), prompts, 1, folder, seed, guidance=guidance)
        pictures = [Image.open(folder / f"{stem}-0000.png").convert("RGB") for stem in file_stems(prompts)]
        about = {"arm": arm.stem, "steps": steps, "seed": seed, "rate": rate, "guidance": guidance}
        if decoded is None:
            decoded = reconstructed(arm, options, device)
        write_json(found, {**about, **judged(stacked(pictures), decoded, options.count)})


def reconstructed(arm: Path, options: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """The real scenes of the prompts as an arm reduces and decodes them, uint8 [N, 3, 64, 64]."""
    autoencoder, _, _ = load_autoencoder(arm, device)
    return decode_images(load_vlm(options.vlm, device), autoencoder, real_pictures(options.count), 0)


def reference(arm: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Judge an arm's reconstructions of the real scenes: no sampler of it can do better for long."""
    found = options.out / f"{arm.stem}-reconstructed.json"
    if found.is_file():
        return
    decoded, latents = reconstructed(arm, options, device), read_card(arm).latents
    error = (decoded.float() - real_pictures(options.count).float()).square().mean((1, 2, 3))
    psnr = float((10 * (255**2 / error).log10()).mean())
    about = {"arm": arm.stem, "numbers": prod(latents.grid) * latents.channels, "psnr": psnr}
    write_json(found, {**about, **judged(decoded, decoded, options.count)})


@cache
def held_out(count: int) -> list[Sample]:
    """The scenes of the prompts, drawn once."""
    return [sample for group in evaluation_scenes(count).values() for sample in group]


def real_pictures(count: int) -> torch.Tensor:
    """The real scenes of the prompts, uint8 [N, 3, 64, 64]."""
    return stacked([sample.image for sample in held_out(count)])


def judged(pictures: torch.Tensor, decoded: torch.Tensor, count: int) -> dict[str, float]:
    """Percent that the strict judge finds right, and Fréchet distances on its features."""
    reader, real = load_reader("strict"), real_pictures(count)
    scenes = [sample.meta["scene"] for sample in held_out(count)]
    said = verdicts(reader, pictures, scenes)
    kinds = [group_of(scene) for scene in scenes]

    def right(what: str, *groups: str) -> float:
        answers = [v[what] for v, kind in zip(said, kinds, strict=True) if kind in groups and what in v]
        return 100 * mean(answers) if answers else 0.0

    with torch.no_grad():
        features = [reader.trunk(i.float() / 127.5 - 1).mean((2, 3)) for i in (pictures, real, decoded)]
    seen, of_real, of_decoded = (Moments(rows.numpy()) for rows in features)
    return {
        "subject": right("subject", "seen", "held_out"),
        "both": right("subject", "pair"),
        "side": right("side", "pair"),
        "number": right("count", "count"),
        "frechet": 1000 * frechet_distance(seen, of_real),
        "to decoded": 1000 * frechet_distance(seen, of_decoded),
    }


COLUMNS = ("subject", "both", "side", "number", "frechet", "to decoded")


def table(out: Path) -> str:
    """The Markdown table of every result so far, seeds joined: mean, and lowest to highest."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*-g[0-9]*.json"))]
    results.sort(key=lambda r: (r["steps"], r["arm"], r["rate"], r["guidance"]))
    joined: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    for r in results:
        joined[r["steps"], r["arm"], f"{r['rate']:g}", f"{r['guidance']:g}"].append(r)
    head = ["steps", "arm", "rate", "guidance", "seeds", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for path in sorted(out.glob("*-reconstructed.json")):
        r = json.loads(path.read_text())
        cells = ["", f"{r['arm']}, {r['numbers']} numbers, {r['psnr']:.2f} dB, reconstructed", "", "", ""]
        lines.append("| " + " | ".join([*cells, *(f"{r[c]:.1f}" for c in COLUMNS)]) + " |")
    for key, rows in joined.items():
        cells = [*map(str, key), str(len(rows)), *(spread(r[c] for r in rows) for c in COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    with whole_file(out / "table.md") as temporary:
        temporary.write_text(text)
    return text


def spread(values: Iterable[float]) -> str:
    """Mean, lowest and highest."""
    given = list(values)
    if len(given) == 1:
        return f"{given[0]:.1f}"
    return f"{mean(given):.1f} ({min(given):.1f} to {max(given):.1f})"


if __name__ == "__main__":
    main()
