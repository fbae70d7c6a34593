"""Composition on OpenMoji scenes: do pictures show the subject, setting, relation and number asked for?

The judge is the VLM of the sampler, which captions each picture; a caption says what it says, so nothing is
suggested to it. No picture can be judged better than a real one, so the judge's own share of right captions
on real scenes of the same prompts stands beside every share. The pictures as a set are compared with those
real scenes too, and another set of real scenes beside them: no sampler can come closer.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vugen_cli.data.sample import Sample
from vugen_cli.errors import VugenError
from vugen_cli.metrics.bootstrap import resampled_means
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.prompted_images import score_of
from vugen_cli.metrics.report import Report
from vugen_cli.metrics.scores import score_sets
from vugen_cli.nano.conversations import DESCRIBE
from vugen_cli.nano.judge import GROUPS, group_of, judge
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.processes import barrier, is_first
from vugen_cli.sampling.draw import draw, file_stem
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.vlm.chat import ask


def evaluation_scenes(each: int, size: int = 64, seed: int = 0) -> dict[str, list[Sample]]:
    """The first scenes of the `val` split with different captions, up to `each` in every group.

    There are only so many different held-out captions (about 150): that group may be smaller.

    Args:
        each: scenes of a group.
        size: pixels a side.
        seed: which `val` split.
    """
    looked_at = 12 * each + 200  # the rarest kind is 15% of the scenes
    scenes = OpenMojiScenes(looked_at, "val", size, seed)
    groups: dict[str, dict[str, Sample]] = {group: {} for group in GROUPS}
    for i in range(looked_at):
        sample = scenes[i]
        found = groups[group_of(sample.meta["scene"])]
        if len(found) < each:
            found.setdefault(sample.captions[0], sample)
        if all(len(found) == each for found in groups.values()):
            break
    return {group: list(found.values()) for group, found in groups.items()}


def score_composition(
    sampler: Sampler, each: int, out: Path, seed: int = 0, guidance: float | None = None
) -> Report:
    """Draw the prompts of `evaluation_scenes`, judge the pictures and the real scenes, and compare both.

    Args:
        sampler: trained on OpenMoji scenes.
        each: prompts of a group.
        out: folder for the pictures, as `vugen sample` writes them; the real scenes of the same prompts go to
            its `real`, those of another seed to its `real-other`.
        seed: of scenes and samples.
        guidance: instead of the sampler's own.

    Returns:
        A report of the pictures against the real scenes, with shares in percent by group before its scores;
        an empty one on all but the first process of a job.

    Raises:
        VugenError: the sampler was trained on something else, or its VLM cannot be asked.
    """
    if sampler.card.data.dataset != "openmoji":
        raise VugenError(
            f"{sampler.path} was trained on {sampler.card.data.dataset}, and composition is asked "
            "of OpenMoji scenes, whose contents are known: take `vugen score prompts`"
        )
    groups = evaluation_scenes(each, sampler.card.image_size, seed)
    samples = [sample for group in groups.values() for sample in group]
    prompts = [sample.captions[0] for sample in samples]
    draw(sampler, prompts, 1, out, seed, guidance=guidance)  # by all processes of a job
    report = _compare_with_real(sampler, groups, each, out, seed)
    if not is_first():
        return report
    drawn = [Image.open(out / f"{file_stem(prompt)}-0000.png").convert("RGB") for prompt in prompts]
    real = [sample.image for sample in samples if isinstance(sample.image, Image.Image)]
    said = {
        "drawn": _captions(sampler, drawn, "judge"),
        "real": _captions(sampler, real, "judge real scenes"),
    }
    shares = []
    for group, spoken in GROUPS.items():
        rows = [i for i, sample in enumerate(samples) if group_of(sample.meta["scene"]) == group]
        verdicts = {
            which: [judge(captions[i], samples[i].meta["scene"]) for i in rows]
            for which, captions in said.items()
        }
        for what in verdicts["real"][0]:
            drawn_right, real_right = (
                100 * np.array([verdict[what] for verdict in verdicts[which]], dtype=float)
                for which in ("drawn", "real")
            )
            shares.append(
                score_of(
                    f"composition_{group}_{what}",
                    f"{what} right, {spoken} (real scenes: {real_right.mean():.1f})",
                    float(drawn_right.mean()),
                    resampled_means(drawn_right, np.ones(len(rows))),
                    parameters={
                        "judge": sampler.vlm.name,
                        "judge_fingerprint": sampler.vlm.fingerprint,
                        "question": DESCRIBE,
                        "judge_on_real_scenes": float(real_right.mean()),
                        "prompts": len(rows),
                        "sampler": str(sampler.path),
                        "sampling": sampler.settings(guidance=guidance).model_dump(mode="json"),
                        "seed_of_samples": seed,
                    },
                    warning=f"the judge is right on {real_right.mean():.0f}% of real scenes: it says "
                    "little of drawn ones."
                    if real_right.mean() < 50
                    else None,
                )
            )
    return report.model_copy(update={"scores": shares + report.scores})


def _compare_with_real(
    sampler: Sampler, groups: dict[str, list[Sample]], each: int, out: Path, seed: int
) -> Report:
    """The drawn set against the real one, with what another real set scores in every score's name."""
    real, other = out / "real", out / "real-other"
    if is_first():
        _save_scenes(groups, real)
        _save_scenes(evaluation_scenes(each, sampler.card.image_size, seed + 1), other)
    barrier("real scenes")
    extractor = vlm_extractor(sampler.vlm, sampler.vlm.device)
    ours, theirs = (score_sets(path, real, extractor, ("fid", "pr", "dc")) for path in (out, other))
    for score, best in zip(ours.scores, theirs.scores, strict=True):
        score.name += f" (another real set: {best.value:.4g})"
        score.parameters = {**score.parameters, "another_real_set": best.value}
    return ours


def _save_scenes(groups: dict[str, list[Sample]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.png"):  # of an earlier call with more prompts
        path.unlink()
    samples = [sample for group in groups.values() for sample in group]
    for number, sample in enumerate(samples):
        assert isinstance(sample.image, Image.Image)
        sample.image.save(folder / f"{number:05d}.png")


def _captions(sampler: Sampler, pictures: Sequence[Image.Image], task: str) -> list[str]:
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    images = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    return ask(sampler.vlm.model, sampler.vlm.processor, images, DESCRIBE, task=task)
