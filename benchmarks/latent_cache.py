"""Sampler training on a latent cache beside training that encodes every image again, in the same run.

    python benchmarks/latent_cache.py --sampler SAMPLER --data data/openmoji --steps 12

Prints the median steps/s of both and their ratio. The runs alternate, so that what else the machine does
falls on both.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import torch

from vugen_cli.checkpoint import read_card
from vugen_cli.engine.device import pick_device
from vugen_cli.files import bundle
from vugen_cli.recipe import parse_recipe
from vugen_cli.stages.latent_cache import write_latents
from vugen_cli.stages.train_sampler import train_sampler


def main() -> None:
    """Two runs of each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sampler", type=Path, default=bundle("sampler.safetensors"), help="default: nano")
    parser.add_argument("--data", type=Path, required=True, help="a data set written by vugen prepare")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    device = pick_device(None)
    card = read_card(options.sampler)
    settings = [f"train_sampler.steps={options.steps}", f"train_sampler.batch_size={options.batch_size}"]
    recipe = parse_recipe(
        card.recipe, str(options.sampler), [*settings, "engine.compile=false", "sampling.steps=1"]
    )
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        write_latents(options.sampler, options.data, cache, device, flip=recipe.data.flip)
        seconds: dict[str, list[float]] = {"live": [], "cached": []}
        for number in range(2):
            for way, data in (("live", options.data), ("cached", cache)):
                out = Path(folder) / f"{way}{number}.safetensors"
                train_sampler(recipe, options.sampler, data, out, device, init=options.sampler)
                rows = map(json.loads, (out.with_suffix(".run") / "metrics.jsonl").read_text().splitlines())
                rates = [row["images_per_s"] for row in rows if "images_per_s" in row]
                seconds[way] += [options.batch_size / rate for rate in rates[2:]]
    rates_of = {way: 1 / statistics.median(times) for way, times in seconds.items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.1f}")
    print(f"live {rates_of['live']:.3f}, cached {rates_of['cached']:.3f} steps/s")
    print(f"cached / live = {rates_of['cached'] / rates_of['live']:.2f}")


if __name__ == "__main__":
    main()
