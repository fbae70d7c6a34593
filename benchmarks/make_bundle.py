"""Put a finished nano run into the package, in half precision.

    python benchmarks/make_bundle.py --sampler sampler.safetensors --decoder decoder.safetensors

Bundled weights must stay under 50 MB together.
"""

import argparse
import shutil
from pathlib import Path

import torch

from vugen_cli.checkpoint import load_checkpoint, save_checkpoint
from vugen_cli.files import bundle
from vugen_cli.recipe import parse_recipe
from vugen_cli.sampling.trained import drawing_checkpoint


def in_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights, not latent statistics, as float16."""
    return {n: t if n.endswith((".mean", ".std")) else t.half() for n, t in tensors.items()}


def main() -> None:
    """Copy the VLM directory, and the sampler with its weights (not its latent statistics) as float16."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vlm", type=Path)
    parser.add_argument("--sampler", type=Path)
    parser.add_argument(
        "--decoder", type=Path, help="checkpoint whose decoder takes the place of the sampler's"
    )
    parser.add_argument(
        "--large", type=Path, help="reducer whose decoder draws at 128 px, trained with decoder.trained=outer"
    )
    parser.add_argument("--strict", type=Path, help="judges of `vugen train-judge`: of real scenes only, and")
    parser.add_argument("--lenient", type=Path, help="of reconstructions too")
    parser.add_argument("--set", action="append", default=[], help="change the card's recipe: a.b=value")
    options = parser.parse_args()
    if options.vlm:
        shutil.rmtree(bundle("vlm"), ignore_errors=True)
        shutil.copytree(options.vlm, bundle("vlm"))
    if options.sampler:
        tensors, card = drawing_checkpoint(options.sampler, options.decoder)
        card.decoder = None
        card.recipe = parse_recipe(card.recipe, str(options.sampler), options.set).model_dump(mode="json")
        card.vlm.name = card.recipe["vlm"]  # for `--set vlm=nano`: in training it had another
        # Where users have scenes to compare it with and to train it further on; not where they lay here.
        # The name stays: the studies ask a sampler of what it has learned, of edits too.
        elsewhere = {"path": "data/openmoji", "mixture": None, "sha256": None, "train_sha256": None}
        card.data = card.data.model_copy(update=elsewhere)
        card.recipe["data"]["mixture"] = []
        save_checkpoint(bundle("sampler.safetensors"), in_half(tensors), card)
    if options.large:
        tensors, card = load_checkpoint(options.large, "reducer")
        card.vlm.name = "nano"
        card.data = card.data.model_copy(
            update={"path": "data/openmoji-128", "sha256": None, "train_sha256": None}
        )
        shared, _ = load_checkpoint(bundle("sampler.safetensors"))
        own = {
            name: tensor
            for name, tensor in in_half(tensors).items()
            if tensor.shape != shared[name].shape or not tensor.equal(shared[name])
        }
        save_checkpoint(bundle("decoder-128.safetensors"), own, card)
    for name, judge in (("strict", options.strict), ("lenient", options.lenient)):
        if judge:
            shutil.copyfile(judge, bundle(f"judge-{name}.safetensors"))
    size = sum(f.stat().st_size for f in bundle("").rglob("*") if f.is_file()) / 1e6
    print(f"{bundle('')}: {size:.1f} MB")


if __name__ == "__main__":
    main()
