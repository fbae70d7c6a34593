"""Who says whether pictures show what they should: two readers of scenes, and the VLM's captions beside.

No picture can be judged better than a real one, so every share of pictures stands beside the same judge's
share of real scenes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vugen_cli.data.loader import ShardedImages
from vugen_cli.data.manifest import read_manifest
from vugen_cli.metrics.bootstrap import resampled_means
from vugen_cli.metrics.prompted_images import score_of
from vugen_cli.metrics.report import Score
from vugen_cli.nano.caption_judge import GROUPS, judge, tally
from vugen_cli.nano.conversations import DESCRIBE
from vugen_cli.nano.reader import JUDGES, load_reader, verdicts
from vugen_cli.nano.vocabulary import Scene
from vugen_cli.vlm.chat import ask
from vugen_cli.vlm.frozen import FrozenVLM

# Pictures uint8 [N, 3, S, S] and the scenes that they should show -> what each gets right.
Judge = Callable[[Tensor, Sequence[Scene]], list[dict[str, bool]]]
# The VLM, originals, reconstructions, and their numbers in their set -> `shares`.
OfReconstructions = Callable[[FrozenVLM, Tensor, Tensor, list[int]], list[Score]]
SAID = {**{name: f"by the {name} judge" for name in JUDGES}, "captions": "by the VLM's captions"}


def judges_beside(vlm: FrozenVLM) -> dict[str, Judge]:
    """The bundled readers, and the VLM, which captions each picture.

    A caption says what it says, so nothing is suggested to the VLM; but it was trained on the same scenes as
    the sampler, and the sampler through it, so it is no independent judge.
    """

    def captions(images: Tensor, scenes: Sequence[Scene]) -> list[dict[str, bool]]:
        said = ask(vlm.model, vlm.processor, images, DESCRIBE, task="caption")
        return [judge(caption, scene) for caption, scene in zip(said, scenes, strict=True)]

    readers = {name: partial(verdicts, load_reader(name).to(vlm.device)) for name in JUDGES}
    return {**readers, "captions": captions}


def shares(
    name: str,
    judges: dict[str, Judge],
    pictures: Tensor,
    real: Tensor,
    scenes: Sequence[Scene],
    parameters: dict[str, object],
) -> list[Score]:
    """How often pictures are right, in percent, by judge, group of scenes and what is asked.

    Args:
        name: what the metrics' names begin with.
        judges: from `judges_beside`.
        pictures, real: uint8 [N, 3, S, S], of the same scenes.
        scenes: N.
        parameters: of every score.
    """
    found = []
    for who, judged in judges.items():
        ours, theirs = (tally(scenes, judged(shown, scenes)) for shown in (pictures, real))
        for group, spoken in GROUPS.items():
            for what, of_real in theirs[group].items():
                right, best = (100 * np.array(of, dtype=float) for of in (ours[group].get(what, []), of_real))
                found.append(
                    score_of(
                        f"{name}_{who}_{group}_{what}",
                        f"{what} right {SAID[who]}, {spoken} (real scenes: {best.mean():.1f})",
                        float(right.mean()) if len(right) else None,
                        resampled_means(right) if len(right) else None,
                        parameters={
                            **parameters,
                            "judge": who,
                            "judge_on_real_scenes": float(best.mean()),
                            "prompts": len(right),
                        },
                        warning=_warning(len(right), float(best.mean())),
                    )
                )
    return found


def _warning(count: int, real: float) -> str | None:
    if not count:
        return "no picture shows the subjects that this is asked of."
    if real < 50:
        return f"the judge is right on {real:.0f}% of real scenes: it says little of drawn ones."
    return None


def reconstruction_judge(images: Path) -> OfReconstructions:
    """What judges reconstructions of prepared OpenMoji scenes."""

    def of_reconstructions(
        vlm: FrozenVLM, originals: Tensor, decoded: Tensor, indices: list[int]
    ) -> list[Score]:
        stored = ShardedImages(images, read_manifest(images).held_out)
        ends = list(accumulate(stored.counts.tolist()))
        scenes = []
        for index in indices:
            shard = int(np.searchsorted(ends, index, side="right"))
            _, meta = stored.read(shard, index - (ends[shard] - int(stored.counts[shard])))
            scenes.append(meta["scene"])
        about: dict[str, object] = {"judge_fingerprint": vlm.fingerprint, "question": DESCRIBE}
        return shares("reconstruction", judges_beside(vlm), decoded, originals, scenes, about)

    return of_reconstructions


def in_short(scores: Sequence[Score]) -> list[str]:
    """A line for each judge: `strict judge: seen_subject 97.0 (real scenes 99.5), ...`, in percent."""
    lines: dict[str, list[str]] = {}
    for score in scores:
        who = str(score.parameters["judge"])
        what = score.metric.split(f"_{who}_", 1)[1]
        value = "–" if score.value is None else f"{score.value:.1f}"
        lines.setdefault(who, []).append(f"{what} {value} ({score.parameters['judge_on_real_scenes']:.1f})")
    return [f"right {SAID[who]}, in % (of real scenes): {', '.join(found)}" for who, found in lines.items()]


def stacked(pictures: Sequence[object]) -> Tensor:
    """PIL pictures of one size as uint8 [N, 3, S, S]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
