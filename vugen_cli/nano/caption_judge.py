"""Whether a caption tells what a scene shows."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vugen_cli.data.loader import ShardedImages
from vugen_cli.nano.conversations import DESCRIBE
from vugen_cli.nano.vocabulary import NUMBERS, OPPOSITES, SETTINGS, SUBJECTS, Scene
from vugen_cli.vlm.chat import ask


def mentions(text: str, words: str) -> bool:
    """Whether a text has these words as words: "a carrot" does not mention a car."""
    return re.search(rf"\b{re.escape(words)}\b", text) is not None


def mentions_setting(text: str, name: str) -> bool:
    """Whether a text names a setting, by its noun or by its adjective ("snow", "a snowy place")."""
    return mentions(text, name) or mentions(text, SETTINGS[name].noun.removeprefix("a "))


@torch.no_grad()
def caption_accuracy(model: Any, processor: Any, images: ShardedImages, count: int = 500) -> dict[str, float]:
    """How often a greedy caption tells what a scene shows, as `judge` judges it.

    Args:
        model: the VLM.
        processor: its processor.
        images: a split of the OpenMoji set (its `meta` says what a scene shows).
        count: scenes to caption, at most, in each group.

    Returns:
        Fractions such as `seen_subject`, `held_out_setting` and `pair_subject` (both of two), and the number
        of scenes in each group; empty when the data set does not say what its scenes show.
    """

    groups: dict[str, list[tuple[Tensor, Scene]]] = {}
    for pixels, meta in images.in_order():
        if scene := meta.get("scene"):
            chosen = groups.setdefault(group_of(scene), [])
            if len(chosen) < count:
                chosen.append((torch.from_numpy(pixels).permute(2, 0, 1), scene))
    scores: dict[str, float] = {}
    for group, chosen in sorted(groups.items()):
        pictures, scenes = zip(*chosen, strict=True)
        answers = ask(model, processor, torch.stack(pictures), DESCRIBE)
        verdicts = [judge(answer, scene) for answer, scene in zip(answers, scenes, strict=True)]
        scores |= {f"{group}_{what}": sum(v[what] for v in verdicts) / len(verdicts) for what in verdicts[0]}
        scores[f"{group}_scenes"] = len(verdicts)
    return scores


GROUPS = {
    "seen": "one subject, pairs seen in training",
    "held_out": "one subject, held-out pairs",
    "pair": "two subjects",
    "count": "two or three of one subject",
}


def group_of(scene: Scene) -> str:
    """The group of `GROUPS` that a scene belongs to."""
    if scene["kind"] == "single":
        return "held_out" if scene["held_out"] else "seen"
    return str(scene["kind"])


def tally(scenes: Sequence[Scene], verdicts: Sequence[dict[str, bool]]) -> dict[str, dict[str, list[bool]]]:
    """By group of scenes and what is asked of them: each verdict."""
    found: dict[str, dict[str, list[bool]]] = {group: {} for group in GROUPS}
    for scene, right in zip(scenes, verdicts, strict=True):
        for what, value in right.items():
            found[group_of(scene)].setdefault(what, []).append(value)
    return found


def judge(caption: str, scene: Scene) -> dict[str, bool]:
    """What a caption gets right of a scene: `subject` (both of two), `setting`, `relation`, `count`.

    Words count as whole words; colours do not matter. A relation may be told from either side.
    """
    subjects = scene["subjects"]
    spoken = [_spoken(subject["name"]) for subject in subjects]
    right = {
        "subject": all(re.search(rf"\b{words}\b", caption) for words in spoken),
        "setting": mentions_setting(caption, scene["setting"]),
    }
    if scene["kind"] == "count":
        number, plural = NUMBERS[subjects[0]["count"]], SUBJECTS[subjects[0]["name"]].plural
        right["count"] = re.search(rf"\b{number} (\w+ )?{re.escape(plural)}\b", caption) is not None
    if scene["kind"] == "pair":
        first, second = spoken
        relation = scene["relation"]
        right["relation"] = any(
            re.search(rf"\b{a} {said} (an?|\w+) (\w+ )?{b}\b", caption)
            for a, said, b in ((first, relation, second), (second, OPPOSITES[relation], first))
        )
    return right


def _spoken(name: str) -> str:
    """A pattern of a subject's name, alone or in the plural."""
    plural = SUBJECTS[name].plural
    return f"(?:{re.escape(plural)}|{re.escape(name)})" if plural else re.escape(name)
