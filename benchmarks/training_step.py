"""A training step of each stage beside forward and backward of its bare network, in the same run.

    python benchmarks/training_step.py --data data/openmoji [--threads 1]

The stage's step has the loader, the frozen VLM, the loss, clipping, the optimiser, the average and the log.
Four such steps and four of the bare network take turns, so that whatever else the machine does slows both.
Prints the medians, and the ratio. Goal: 0.92. The frozen VLM's time is part of the method, not overhead, so
it is counted on both sides. On a CPU that other work shares, the ratio of the training process's processor
time tells more than that of wall time, which also has the loader's process competing for the cores.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from vugen_cli.data.loader import Batch, ShardedImages, TrainingStream
from vugen_cli.engine.precision import wants_bfloat16
from vugen_cli.flow import flow_matching_loss
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.models.pixel_decoder import to_pixels
from vugen_cli.recipe import Recipe, load_recipe
from vugen_cli.stages import train_reducer, train_sampler
from vugen_cli.vlm.frozen import load_vlm

BATCH, TURN, TURNS = 32, 4, 5  # images, steps in a turn, turns of each; the first turn warms up


def main() -> None:
    """Measure both stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    sizes = (f"steps={TURN * TURNS}", f"batch_size={BATCH}", "checkpoint_every=1000")
    recipe = load_recipe("nano", [f"{s}.{k}" for s in ("train_reducer", "train_sampler") for k in sizes])
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"{name}, {options.threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        reducer, sampler = Path(folder) / "r.safetensors", Path(folder) / "s.safetensors"
        with turns(train_reducer, bare_step("reducer", recipe, options.data, device), device) as times:
            train_reducer.train_reducer(recipe, options.data, reducer, device)
        report("reducer", times)
        with turns(train_sampler, bare_step("sampler", recipe, options.data, device), device) as times:
            train_sampler.train_sampler(recipe, reducer, options.data, sampler, device)
        report("sampler", times)


Times = list[tuple[float, ...]]


class turns:
    """Within this context a stage's stream of batches runs the bare network between the stage's steps.

    Gives two lists of seconds, wall and processor: of the stage's steps, and of the bare ones.
    """

    def __init__(self, stage: Any, bare: Callable[[], None], device: torch.device):
        self.stage, self.bare, self.device = stage, bare, device
        self.batches = stage.training_batches
        self.whole: Times = []
        self.bares: Times = []

    def __enter__(self) -> tuple[Times, Times]:
        self.stage.training_batches = lambda *a, **k: lambda step: self.stream(self.batches(*a, **k)(step))
        return self.whole, self.bares

    def __exit__(self, *_: object) -> None:
        self.stage.training_batches = self.batches

    def stream(self, source: Iterator[Batch]) -> Iterator[Batch]:
        """Batches; what passes from asking for one to asking for the next is a step."""
        while True:
            for _ in range(TURN):
                wall, processor = self.now()
                yield next(source)
                self.whole.append(tuple(b - a for a, b in zip((wall, processor), self.now(), strict=True)))
            for _ in range(TURN):
                wall, processor = self.now()
                self.bare()
                self.bares.append(tuple(b - a for a, b in zip((wall, processor), self.now(), strict=True)))

    def now(self) -> tuple[float, float]:
        """Wall and processor time when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


def report(stage: str, times: tuple[Times, Times]) -> None:
    """Print the medians of both and their ratio, without the first turn."""
    for number, kind in enumerate(("wall", "processor")):
        whole, bare = (median(pair[number] for pair in seconds[TURN:]) for seconds in times)
        print(
            f"{stage}, {kind} time: step {1000 * whole:.0f} ms, bare network with the frozen VLM "
            f"{1000 * bare:.0f} ms; ratio {bare / whole:.2f}",
            flush=True,
        )


def bare_step(stage: str, recipe: Recipe, data: Path, device: torch.device) -> Callable[[], None]:
    """The frozen VLM on one batch, then forward and backward of the trained network."""
    vlm = load_vlm("nano", device)
    batch: Batch = next(iter(TrainingStream(ShardedImages(data), BATCH, 0)))
    images, t = batch.images.to(device), torch.rand(BATCH, device=device)
    generator = torch.Generator(device).manual_seed(0)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=wants_bfloat16("auto", device))
    with autocast:
        shape, channels = vlm.encode(images).shape, recipe.reducer.channels
    latents = torch.randn(*shape[:3], channels, device=device)
    network: nn.Module
    if stage == "reducer":
        network = Autoencoder(recipe, shape[-1]).to(device)
    else:
        network = GenerationExpert(vlm.decoder, channels, (shape[1], shape[2])).to(device)
        if device.type == "cpu":
            network.decoder.set_attn_implementation("eager")

    def step() -> None:
        with autocast:
            vlm.encode(images)
            if stage == "reducer":
                loss = flow_matching_loss(
                    lambda x, t: network.decoder(x, t, latents), to_pixels(images), t, generator
                )
            else:
                prefix = vlm.prefix(batch.captions)
                loss = flow_matching_loss(lambda x, t: network(x, t, prefix), latents, t, generator)
        network.zero_grad(set_to_none=True)
        loss.backward()

    return step


if __name__ == "__main__":
    main()
