"""Training on two processes beside training on one, each process with the same share of the cores.

    python benchmarks/scaling.py --data data/openmoji [--reducer reducer.safetensors] [--strategy fsdp]

One process has half of the cores; two processes have half each, and twice the batch. They take turns, so that
whatever else the machine does slows both. Prints images/s of both and the efficiency: the two's images/s over
twice the one's. On GPUs a process has a GPU instead.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

ROWS, STEPS, TURNS = 16, 25, 2  # images of each process in a step, steps of a run, runs of each kind


def main() -> None:
    """Run both kinds in turn and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--reducer", type=Path)
    parser.add_argument("--strategy", default="ddp")
    options = parser.parse_args()
    cores = (os.cpu_count() or 2) // 2
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(f"{name}, {cores} of {os.cpu_count()} cores a process, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        reducer = options.reducer or Path(folder) / "r.safetensors"
        if not options.reducer:
            vugen(1, cores, ["train-reducer", "--data", options.data, "--steps", 1, "--out", reducer])
        rates: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(TURNS):
            for count in (1, 2):
                out = Path(folder) / f"{count}-{turn}.safetensors"
                words = ["train-sampler", "--reducer", reducer, "--data", options.data, "--out", out]
                words += ["--steps", STEPS, "--batch-size", ROWS * count]
                words += ["--set", f"engine.strategy={options.strategy}", "--set", "sampling.steps=1"]
                words += ["--set", "train_sampler.optimizer=adamw"]  # the one that takes shares of matrices
                vugen(count, cores, [*words, "--set", "train_sampler.checkpoint_every=100000"])
                rows = out.with_suffix(".run").joinpath("metrics.jsonl").read_text().splitlines()
                rates[count] += [json.loads(row)["images_per_s"] for row in rows[5:]]
    one, two = median(rates[1]), median(rates[2])
    print(
        f"{options.strategy}: one process {one:.0f} images/s, two {two:.0f}; efficiency {two / (2 * one):.2f}"
    )


def vugen(processes: int, cores: int, words: list[object]) -> None:
    """Run a command as a job of some processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [sys.executable, *torchrun, "-m", "vugen_cli", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": str(cores)},
        check=True,
        capture_output=True,
    )


if __name__ == "__main__":
    main()
