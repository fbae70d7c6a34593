"""A training step of each stage beside forward and backward of its bare network, in the same run.

    python benchmarks/training_step.py --data data/openmoji

The stage's step has the loader, the frozen VLM, the loss, clipping, the optimiser, the average and the log.
Prints images/s of both, and the ratio. Goal: 0.90. The frozen VLM's time is part of the method, not
overhead, so it is counted on both sides.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from vugen_cli.data.loader import Batch, ShardedImages, TrainingStream
from vugen_cli.engine.loop import wants_bfloat16
from vugen_cli.engine.train_reducer import Autoencoder, train_reducer
from vugen_cli.engine.train_sampler import train_sampler
from vugen_cli.flow import flow_matching_loss
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.models.pixel_decoder import to_pixels
from vugen_cli.recipe import load_recipe
from vugen_cli.vlm.frozen import load_vlm

STEPS = 30


def main() -> None:
    """Measure both stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    stages = ("train_reducer", "train_sampler")
    recipe = load_recipe(
        "nano",
        [f"{s}.{k}" for s in stages for k in (f"steps={STEPS}", "batch_size=64", "checkpoint_every=1000")],
    )
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        reducer = train_reducer(recipe, options.data, Path(folder) / "r.safetensors", device)
        train_sampler(recipe, reducer, options.data, Path(folder) / "s.safetensors", device)
        for stage in ("r", "s"):
            rows = [json.loads(line) for line in (Path(folder) / f"{stage}.run/metrics.jsonl").open()]
            whole = 64 / median(row["images_per_s"] for row in rows[STEPS // 3 :])
            vlm_time, bare = bare_step(stage, recipe, options.data, device)
            print(
                f"{'reducer' if stage == 'r' else 'sampler'}: step {64 / whole:.0f} images/s, bare network "
                f"{64 / bare:.0f}, with the frozen VLM {64 / (bare + vlm_time):.0f}; "
                f"ratio {(bare + vlm_time) / whole:.2f}"
            )


def bare_step(stage: str, recipe: object, data: Path, device: torch.device) -> tuple[float, float]:
    """Seconds of the frozen VLM, and of forward and backward of the trained network, for one batch of 64."""
    from vugen_cli.recipe import Recipe

    assert isinstance(recipe, Recipe)
    vlm = load_vlm("nano", device)
    batch: Batch = next(iter(TrainingStream(ShardedImages(data), 64, 0)))
    images = batch.images.to(device)
    generator = torch.Generator(device).manual_seed(0)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=wants_bfloat16("auto", device))
    t = torch.rand(64, device=device)
    with autocast:
        z, prefix = vlm.encode(images), vlm.prefix(batch.captions)
    frozen, trained = [], []
    if stage == "r":
        network: nn.Module = Autoencoder(recipe, z.shape[-1]).to(device)
        latents = torch.randn(*z.shape[:3], recipe.reducer.channels, device=device)
        target, step = to_pixels(images), lambda x, t: network.decoder(x, t, latents)
    else:
        network = GenerationExpert(vlm.decoder, recipe.reducer.channels, (8, 8)).to(device)
        target = torch.randn(*z.shape[:3], recipe.reducer.channels, device=device)
        step = lambda x, t: network(x, t, prefix)  # noqa: E731
    for _ in range(STEPS):
        started = time.perf_counter()
        with autocast:
            vlm.encode(images)
            if stage == "s":
                vlm.prefix(batch.captions)
        synchronise(device)
        between = time.perf_counter()
        with autocast:
            loss = flow_matching_loss(step, target, t, generator)
        loss.backward()
        synchronise(device)
        frozen.append(between - started)
        trained.append(time.perf_counter() - between)
    return median(frozen[STEPS // 3 :]), median(trained[STEPS // 3 :])


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
