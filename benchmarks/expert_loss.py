"""Both experts on the same latents: validation flow loss and time of a step, for the same steps and data.

    vugen prepare --dataset openmoji --count 12000
    vugen prepare --dataset openmoji --split val --count 1000
    vugen prepare --latents vugen_cli/bundles/nano/sampler.safetensors --data data/openmoji --out latents
    OMP_NUM_THREADS=1 python benchmarks/expert_loss.py --data latents [--steps 300] [--seeds 3] \
        --arm "lr=2.4e-3 init=fresh" --arm "lr=2.4e-3 kind=dit depth=4 mlp=505" \
        --arm "lr=2.4e-3 optimizer=muon muon_lr=6e-3"

An arm is a learning rate, an optimiser, and settings of the recipe's `expert`. Each trains an expert for the
bundled nano VLM as `vugen train-sampler` does (warm-up, cool-down, a tenth of the prompts dropped, bfloat16),
arms in turn within a seed. The loss is the velocity's mean squared error over six times and 512 held-out
latents.
The first two arms above have 4,980,760 parameters each.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

from vugen_cli.card import LatentsCard
from vugen_cli.data.loader import ShardedImages, training_batches
from vugen_cli.engine.optimizer import learning_rate, make_optimizer, set_rate
from vugen_cli.flow import draw_times, flow_matching_loss
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.recipe import SamplerTraining, load_recipe
from vugen_cli.sampling.trained import new_expert
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm

BATCH, TIMES = 32, (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)


def main() -> None:
    """Train every arm with every seed; print a line for each run, then the means."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="a latent cache of the bundled reducer")
    parser.add_argument("--arm", required=True, action="append", help="lr=RATE, optimizer, muon_lr, expert's")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    vlm = load_vlm("nano")
    found: dict[str, list[tuple[float, float]]] = {arm: [] for arm in options.arm}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in options.arm:
            loss, seconds, parameters = run(vlm, options.data, arm, options.steps, seed)
            found[arm].append((loss, seconds))
            print(
                f"{arm}: seed {seed}, {parameters:,} parameters, {1000 * seconds:.0f} ms, {loss:.4f}",
                flush=True,
            )
    for arm, results in found.items():
        losses, times = zip(*results, strict=True)
        spread = f"{min(losses):.4f} to {max(losses):.4f}"
        print(f"{arm}: {mean(losses):.4f} ({spread}), {1000 * median(times):.0f} ms")


def run(vlm: FrozenVLM, data: Path, arm: str, steps: int, seed: int) -> tuple[float, float, int]:
    """Validation loss of one run, the median processor seconds of its step, and its parameters."""
    words = dict(word.split("=") for word in arm.split())
    optimisation = {key: words.pop(key) for key in ("lr", "optimizer", "muon_lr") if key in words}
    recipe = load_recipe(
        "nano", ["data.workers=0", f"seed={seed}", *(f"expert.{k}={v}" for k, v in words.items())]
    )
    settings = SamplerTraining.model_validate(
        {"steps": steps, "batch_size": BATCH, "warmup": steps // 4, **optimisation}
    )
    images, held_out = ShardedImages(data, latents=True), ShardedImages(data, "val", latents=True)
    made = images.manifest.latents
    assert made  # opened as latents
    torch.manual_seed(seed)
    latents = LatentsCard(channels=made.channels, grid=made.grid, width=0)
    expert = new_expert(vlm, latents, recipe.expert).train()
    if isinstance(expert, GenerationExpert):
        expert.decoder.set_attn_implementation("eager")  # as `train_sampler` does on a CPU
    optimizer = make_optimizer(expert, settings)
    generator, autocast = torch.Generator(), torch.autocast("cpu", torch.bfloat16)

    def loss_of(batch: torch.Tensor, prompts: Sequence[str], t: torch.Tensor) -> torch.Tensor:
        prefix = vlm.prefix(prompts, hidden=expert.reads)
        return flow_matching_loss(lambda x, t: expert(x, t, prefix), batch.float(), t, generator)

    seconds, stream = [], training_batches(images, recipe, BATCH, False)(0)
    for step in range(steps):
        batch = next(stream)
        started = time.process_time()
        set_rate(optimizer, learning_rate(step, settings))
        generator.manual_seed(seed * 1_000_003 + step)
        dropped = torch.rand(BATCH, generator=generator) < settings.prompt_dropout
        prompts = ["" if drop else text for text, drop in zip(batch.captions, dropped.tolist(), strict=True)]
        with autocast:
            loss = loss_of(batch.images, prompts, draw_times(BATCH, "logit-normal", 1.0, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(expert.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - started)
    losses, stream = [], training_batches(held_out, load_recipe("nano", ["data.workers=0"]), 64, False)(0)
    for number in range(8):
        batch = next(stream)
        for place, t in enumerate(TIMES):
            generator.manual_seed(1000 * number + place)
            with torch.no_grad(), autocast:
                losses.append(float(loss_of(batch.images, batch.captions, torch.full((64,), t))))
    return mean(losses), median(seconds), sum(p.numel() for p in expert.parameters())


if __name__ == "__main__":
    main()
