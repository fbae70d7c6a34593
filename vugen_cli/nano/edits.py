"""Edits of OpenMoji scenes: a scene, what is to be changed in it, and the scene that this makes.

Both are drawn from one seed, so that what is not asked for stays as it is, pixel for pixel wherever nothing
moves: another setting leaves the subjects, another colour everything but the paint.
"""

import copy
import math
import random
from collections.abc import Callable

from PIL import Image

from vugen_cli.data.sample import Sample
from vugen_cli.nano.painting import draw_scene, random_stream
from vugen_cli.nano.scenes import DRAWING, Drawings, definite, describe, held_out, noun_phrase
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

PAIRS = 0.5  # share of the described scenes with two subjects: adding, removing and moving need them
NEAR = 80  # distance in RGB under which two paints have one name
EDITING = 4  # to be raised with every change that gives some edit other pixels or words

Change = tuple[Scene, Scene, list[str]]  # the scene, the changed scene, instructions


def _setting(scene: Scene, rng: random.Random) -> Change:
    changed = scene | {"setting": rng.choice([s for s in SETTING_NAMES if s != scene["setting"]])}
    setting = SETTINGS[changed["setting"]]
    it = "it" if len(scene["subjects"]) == 1 and scene["subjects"][0]["count"] == 1 else "them"
    return (
        scene,
        changed,
        [
            f"put {it} {setting.place}",
            f"change the background to {setting.noun}",
            f"the same {setting.place}",
            f"{setting.noun} instead",
        ],
    )


def _subject(scene: Scene, rng: random.Random) -> Change:
    changed = copy.deepcopy(scene)
    entry = rng.choice(changed["subjects"])
    old = copy.deepcopy(entry)
    present = [subject["name"] for subject in scene["subjects"]]
    many = entry["count"] > 1
    entry |= {
        "name": rng.choice(
            [n for n in SUBJECT_NAMES if n not in present and (SUBJECTS[n].plural or not many)]
        ),
        "color": None,
    }
    new = noun_phrase(entry)
    return (
        scene,
        changed,
        [
            f"replace {definite(old)} with {new}",
            f"turn {definite(old)} into {new}",
            f"{new} instead of {definite(old)}",
            f"make {definite(old)} {new}",
        ],
    )


def natural_color(name: str) -> str | None:
    """The named colour that a subject has unpainted, if it is near one: to ask for that is no edit."""
    fills = SUBJECTS[name].natural or SUBJECTS[name].fills
    distances = {color: math.dist(_rgb(fills[0]), _rgb(light)) for color, (light, _) in COLORS.items()}
    nearest = min(distances, key=lambda color: distances[color])
    return nearest if distances[nearest] < NEAR else None


def _rgb(paint: str) -> tuple[int, int, int]:
    return int(paint[1:3], 16), int(paint[3:5], 16), int(paint[5:7], 16)


def _color(scene: Scene, rng: random.Random) -> Change | None:
    changed = copy.deepcopy(scene)
    entries = [entry for entry in changed["subjects"] if SUBJECTS[entry["name"]].tintable]
    if not entries:
        return None
    entry = rng.choice(entries)
    now = entry["color"] or natural_color(entry["name"])
    entry["color"] = rng.choice([color for color in COLORS if color != now])
    color, it = entry["color"], definite(entry)
    return (
        scene,
        changed,
        [
            f"make {it} {color}",
            f"paint {it} {color}",
            f"change the color of {it} to {color}",
            f"{noun_phrase(entry)} instead",
        ],
    )


def _number(scene: Scene, rng: random.Random) -> Change | None:
    old = scene["subjects"][0]
    if scene["kind"] == "pair" or not SUBJECTS[old["name"]].plural:
        return None
    count = rng.choice([n for n in NUMBERS if n != old["count"]])
    new = old | {"count": count}
    changed = scene | {"kind": "single" if count == 1 else "count", "subjects": [new]}
    words = noun_phrase(new) if count > 1 else f"one {noun_phrase(new).partition(' ')[2]}"
    return (
        scene,
        changed,
        [
            f"make it {words}",
            f"show {words} instead of {NUMBERS[old['count']]}",
            f"change the number of {SUBJECTS[old['name']].plural} to {NUMBERS[count]}",
            f"{words} instead",
        ],
    )


def _side(scene: Scene, rng: random.Random) -> Change | None:
    if scene["kind"] != "pair":
        return None
    sides = RELATIONS[1:3] if scene["subjects"][0]["count"] > 1 else RELATIONS[1:]  # two stand beside only
    now = "to the left of" if scene["relation"] == "next to" else scene["relation"]  # as it is drawn
    relation = rng.choice([side for side in sides if side != now])
    first, second = (definite(subject) for subject in scene["subjects"])
    return (
        scene,
        scene | {"relation": relation},
        [
            f"put {first} {relation} {second}",
            f"move {first} {relation} {second}",
            f"put {second} {OPPOSITES[relation]} {first}",
            f"{second} {OPPOSITES[relation]} {first} instead",
        ],
    )


def _without(scene: Scene, gone: Entry) -> Scene:
    """A scene of two subjects without one of them; `gone` says which place stays empty."""
    (kept,) = (subject for subject in scene["subjects"] if subject is not gone)
    kind = "single" if kept["count"] == 1 else "count"
    return scene | {"kind": kind, "subjects": [kept], "relation": None}


def _add(scene: Scene, _rng: random.Random) -> Change | None:
    if scene["kind"] != "pair":
        return None
    first, second = scene["subjects"]
    new, where = noun_phrase(second), f"{OPPOSITES[scene['relation']]} {definite(first)}"
    return (
        _without(scene, second),
        scene,
        [f"add {new} {where}", f"put {new} {where}", f"with {new} {where}", f"there is {new} {where}"],
    )


def _remove(scene: Scene, rng: random.Random) -> Change | None:
    if scene["kind"] != "pair":
        return None
    gone = rng.choice(scene["subjects"])
    it = definite(gone)
    return (
        scene,
        _without(scene, gone),
        [f"remove {it}", f"take {it} away", f"erase {it}", f"without {it}"],
    )


EDITS: dict[str, Callable[[Scene, random.Random], Change | None]] = {
    "setting": _setting,
    "subject": _subject,
    "color": _color,
    "number": _number,
    "side": _side,
    "add": _add,
    "remove": _remove,
}
# How often each is drawn to train on: what is learned last needs the most examples.
SHARES = {"setting": 2, "subject": 4, "color": 3, "number": 3, "side": 8, "add": 4, "remove": 2}


def choose_kind(split: str, rng: random.Random) -> str:
    """What is to be changed: one of `EDITS`, all alike in "val", as `SHARES` has it in "train"."""
    if split == "train":
        return rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
    return rng.choice(tuple(EDITS))


def is_held_out(scene: Scene) -> bool:
    """Whether training never shows one of the scene's subjects in its setting."""
    return any(held_out(subject["name"], scene["setting"]) for subject in scene["subjects"])


def describe_edit(split: str, kind: str, rng: random.Random) -> Change:
    """Describe scenes until one can be changed in this way; in "train" neither may have a held-out pair."""
    while True:
        change = EDITS[kind](describe(split, rng, PAIRS), rng)
        if change and (split == "val" or not any(is_held_out(scene) for scene in change[:2])):
            before, after, instructions = change
            before, after = (scene | {"held_out": is_held_out(scene)} for scene in (before, after))
            return before, after, rng.sample(instructions, 3)


def draw_change(before: Scene, after: Scene, size: int, seed: object) -> tuple[Image.Image, Image.Image]:
    """Draw both scenes of an edit from one seed, RGB of `size` x `size` each.

    Where one has a subject more, it keeps its place in the other.
    """
    pictures = []
    for scene, other in ((before, after), (after, before)):
        gone = {s["name"] for s in other["subjects"]} - {s["name"] for s in scene["subjects"]}
        if len(other["subjects"]) > len(scene["subjects"]):
            pictures.append(draw_scene(other, size, seed, without=gone.pop()))
        else:
            pictures.append(draw_scene(scene, size, seed))
    return pictures[0], pictures[1]


class OpenMojiEdits(Drawings):
    """A `Source` of drawn edits: edit i depends on (seed, split, i) alone.

    Args:
        count: how many edits. Their kinds are equally frequent in "val"; in "train" as `SHARES` has it.
        split: "train", where neither scene has a held-out pair, or "val", where half of the scenes to be
            changed are of such.
        size: side of the pictures in pixels.
        seed: which set of edits.
    """

    name = "openmoji-edits"

    def __init__(self, count: int, split: str = "train", size: int = 64, seed: int = 0):
        super().__init__(count, split, size, seed)

    @property
    def fingerprint(self) -> str:
        """Tells sets apart that were drawn by other code or from other pictures."""
        return f"{self.origin}, drawing {DRAWING}, editing {EDITING}, seed {self.seed}"

    def __getitem__(self, index: int) -> Sample:
        """Edit `index`, with three instructions, its kind under `edit`, and both scenes' descriptions."""
        if not 0 <= index < self.count:
            raise IndexError(f"edit {index} of {self.count}")
        identity = f"edit/{self.seed}/{self.split}/{index}"
        rng = random_stream("scene", identity)
        kind = choose_kind(self.split, rng)
        before, after, instructions = describe_edit(self.split, kind, rng)
        source, target = draw_change(before, after, self.size, identity)
        return Sample(
            key=f"openmoji-edit-{self.split}-{self.seed}-{index:07d}",
            image=target,
            captions=instructions,
            meta={
                "class": after["subjects"][0]["name"],
                "edit": kind,
                "source_scene": before,
                "scene": after,
            },
            sources=[source],
        )
