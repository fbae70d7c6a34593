"""Steps while a state is being written beside steps while none is.

    python benchmarks/saving.py --data data/openmoji [--reducer reducer.safetensors]

A sampler is trained; states are asked for every fifth step, and every sampler step is one of two kinds: from
the one that hands a state over until the state is on disk, or the rest. Prints the medians and their ratio.
Goal: at most 1.2.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from vugen_cli.card import StateCard
from vugen_cli.engine import loop, state
from vugen_cli.recipe import load_recipe
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler


def main() -> None:
    """Train, watching the writer, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--reducer", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    recipe = load_recipe(
        "nano",
        [
            "train_reducer.steps=1",
            f"train_sampler.steps={options.steps}",
            "train_sampler.checkpoint_every=5",
            "train_sampler.preview_every=100000",
        ],
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.device}")
    free: list[float] = []
    saving: list[float] = []
    last = [0.0, False]  # when the step before ended, and whether a state was being written since then

    class Watched(state.StateWriter):
        """The writer, which also sees every step: the loop asks it for errors once in each."""

        handing = False

        def check(self) -> None:
            super().check()
            if self.handing:  # `write` looks for errors too
                return
            now, busy = time.perf_counter(), bool(self.thread and self.thread.is_alive())
            if last[0]:
                (saving if last[1] or busy else free).append(now - last[0])
            last[:] = now, busy

        def write(self, tensors: dict[str, torch.Tensor], card: StateCard) -> None:
            self.handing = True
            super().write(tensors, card)
            self.handing = False
            last[1] = True

    with tempfile.TemporaryDirectory() as folder:
        reducer = options.reducer or train_reducer(
            recipe, options.data, Path(folder) / "r.safetensors", device
        )
        loop.StateWriter = Watched  # type: ignore[attr-defined]
        train_sampler(recipe, reducer, options.data, Path(folder) / "s.safetensors", device)
        size = max(path.stat().st_size for path in Path(folder).glob("s.run/state-*")) / 1e6
    slow, fast = median(saving[1:]), median(free[5:])
    print(
        f"a state of {size:.0f} MB; steps while saving {1000 * slow:.0f} ms ({len(saving)}), others "
        f"{1000 * fast:.0f} ms ({len(free)}); ratio {slow / fast:.2f}"
    )


if __name__ == "__main__":
    main()
