"""Composition on OpenMoji scenes: do pictures show the subject, setting, relation and number asked for?

Two small networks judge that never saw a sampler's picture (`reader`), and beside them the VLM of the
sampler, which captions each picture. No picture can be judged better than a real one, so each judge's own
share on real scenes of the same prompts stands beside every share. The pictures as a set are compared with
those real scenes too, and another set of real scenes beside them: no sampler can come closer.
"""

from pathlib import Path

from PIL import Image

from vugen_cli.data.sample import Sample
from vugen_cli.errors import VugenError
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.report import Report
from vugen_cli.metrics.scores import score_sets
from vugen_cli.nano.caption_judge import GROUPS, group_of
from vugen_cli.nano.conversations import DESCRIBE
from vugen_cli.nano.judges import judges_beside, shares, stacked
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.processes import barrier, is_first
from vugen_cli.sampling.draw import draw, file_stems
from vugen_cli.sampling.sampler import Sampler


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


def score_composition(sampler: Sampler, each: int, out: Path) -> Report:
    """Draw the prompts of `evaluation_scenes`, judge the pictures and the real scenes, and compare both.

    Args:
        sampler: trained on OpenMoji scenes.
        each: prompts of a group.
        out: folder for the pictures, as `vugen sample` writes them; the real scenes of the same prompts go to
            its `real`, those of another seed to its `real-other`.

    Returns:
        A report of the pictures against the real scenes, with shares in percent by group before its scores;
        an empty one on all but the first process of a job.

    Raises:
        VugenError: the sampler was trained on something else, or its VLM cannot be asked.
    """
    if "openmoji" not in sampler.card.data.datasets:
        raise VugenError(
            f"{sampler.path} was trained on {sampler.card.data.dataset}, and composition is asked "
            "of OpenMoji scenes, whose contents are known: take `vugen score prompts`"
        )
    groups = evaluation_scenes(each, sampler.card.image_size)
    samples = [sample for group in groups.values() for sample in group]
    prompts = [sample.captions[0] for sample in samples]
    draw(sampler, prompts, 1, out, study=True)  # by all processes of a job
    report = _compare_with_real(sampler, groups, each, out)
    if not is_first():
        return report
    drawn = stacked([Image.open(out / f"{stem}-0000.png").convert("RGB") for stem in file_stems(prompts)])
    parameters: dict[str, object] = {
        "judge_fingerprint": sampler.vlm.fingerprint,
        "question": DESCRIBE,
        "sampler": str(sampler.path),
        "sampling": sampler.settings().model_dump(mode="json"),
        "seed_of_samples": 0,
    }
    found = shares(
        "composition",
        judges_beside(sampler.vlm),
        drawn,
        stacked([sample.image for sample in samples]),
        [sample.meta["scene"] for sample in samples],
        parameters,
    )
    return report.model_copy(update={"scores": found + report.scores})


def _compare_with_real(sampler: Sampler, groups: dict[str, list[Sample]], each: int, out: Path) -> Report:
    """The drawn set against the real one, with what another real set scores in every score's name."""
    real, other = out / "real", out / "real-other"
    if is_first():
        _save_scenes(groups, real)
        _save_scenes(evaluation_scenes(each, sampler.card.image_size, 1), other)
    barrier("real scenes")
    extractor = vlm_extractor(sampler.vlm)
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
