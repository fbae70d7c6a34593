"""How good a nano run is: what its VLM reads, what survives the reducer, and what its sampler draws.

    python benchmarks/nano_quality.py --sampler sampler.safetensors --data data/openmoji --samples 400

The judge of the samples is the nano VLM itself, captioning each picture; its accuracy on real scenes is
printed beside, because no sample can be judged better than that.
"""

import argparse
import json
from pathlib import Path

import torch

from vugen_cli.data.loader import ShardedImages
from vugen_cli.data.openmoji import evaluation_prompts
from vugen_cli.engine.draw import draw
from vugen_cli.engine.reconstruct import reconstruct
from vugen_cli.engine.sampling import load_sampler
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.scores import score_sets
from vugen_cli.vlm.nano import DESCRIBE, ask, caption_accuracy, mentions


def main() -> None:
    """Print one JSON object of scores and leave the pictures in --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sampler", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path, help="prepared OpenMoji scenes with a val split")
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--out", type=Path, default=Path("nano-quality"))
    options = parser.parse_args()
    sampler = load_sampler(options.sampler)
    images = ShardedImages(options.data, "val")
    scores: dict[str, object] = {"judge": caption_accuracy(sampler.vlm.model, sampler.vlm.processor, images)}
    scores["reconstruction"] = reconstruct(options.sampler, options.data, options.out, count=500)
    for group, held_out in (("seen", False), ("held_out", True)):
        wanted = evaluation_prompts(options.samples // 2, held_out=held_out)
        scores[group] = judged(sampler, wanted, options.guidance)
    prompts = list(dict.fromkeys(p["prompt"] for p in evaluation_prompts(options.samples)))
    draw(sampler, prompts, 1, options.out / "samples", guidance=options.guidance)
    scores["frechet"] = score_sets(
        options.out / "samples",
        options.data,
        vlm_extractor(sampler.vlm, torch.device("cpu")),
        count=len(prompts),
    )["scores"][0]["value"]
    print(json.dumps(scores, indent=1))


def judged(sampler, wanted: list[dict], guidance: float | None) -> dict[str, float]:
    """Share of pictures whose caption names the subject, and the setting, that the prompt asked for."""
    scenes = {p["prompt"]: p["scene"] for p in wanted}
    prompts = list(scenes)
    subject = setting = count = 0
    drawn = list(sampler.sample(prompts, seed=1, guidance=guidance))
    for begin in range(0, len(drawn), 64):
        chunk = drawn[begin : begin + 64]
        captions = ask(
            sampler.vlm.model, sampler.vlm.processor, torch.stack([i for _, _, i in chunk]), DESCRIBE
        )
        for (p, _, _), caption in zip(chunk, captions, strict=True):
            scene = scenes[prompts[p]]
            subject += mentions(caption, scene["subjects"][0]["name"])
            setting += mentions(caption, scene["setting"])
            count += 1
    return {"subject": subject / count, "setting": setting / count, "count": count}


if __name__ == "__main__":
    main()
