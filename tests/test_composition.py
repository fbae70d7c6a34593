"""Composition: what captions get right of a scene, and the command that draws and judges."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.nano.caption_judge import GROUPS, group_of, judge
from vugen_cli.nano.composition import evaluation_scenes

WHAT = ("seen_subject", "held_out_setting", "pair_subject", "count_count")


def scene(kind: str, *subjects: tuple[str, int], relation: str | None = None) -> dict[str, Any]:
    entries = [{"name": name, "count": count, "color": None} for name, count in subjects]
    return {
        "kind": kind, "subjects": entries, "relation": relation, "setting": "forest", "held_out": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("a cat above a red car in a forest", {"subject": True, "setting": True, "relation": True}),
        ("in the forest there is a car below the cat", {"subject": True, "setting": True, "relation": True}),
        ("a car above a cat in a forest", {"subject": True, "setting": True, "relation": False}),
        ("a cat above a carrot on a beach", {"subject": False, "setting": False, "relation": False}),
    ],
)
def test_two_subjects_and_their_relation_may_be_told_from_either_side(
    caption: str, right: dict[str, bool]
) -> None:
    assert judge(caption, scene("pair", ("cat", 1), ("car", 1), relation="above")) == right


def test_a_number_counts_with_its_own_subject_only() -> None:
    asked = scene("count", ("apple", 3))
    assert judge("three red apples in a forest", asked) == {"subject": True, "setting": True, "count": True}
    assert not judge("two apples in a forest", asked)["count"]
    assert not judge("an apple next to three cats in a forest", asked)["count"]


def test_every_group_has_as_many_different_prompts_and_knows_its_real_scenes() -> None:
    groups = evaluation_scenes(12)
    assert list(groups) == list(GROUPS)
    for group, samples in groups.items():
        assert len({sample.captions[0] for sample in samples}) == 12
        for sample in samples:
            assert group_of(sample.meta["scene"]) == group
            assert all(judge(sample.captions[0], sample.meta["scene"]).values())


def test_a_group_with_fewer_captions_than_asked_for_ends_the_search() -> None:
    sizes = {group: len(samples) for group, samples in evaluation_scenes(160, size=8).items()}
    assert sizes["pair"] == sizes["seen"] == sizes["count"] == 160 and 77 <= sizes["held_out"] < 160


def test_the_command_draws_judges_and_sets_the_judge_beside(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["study", "composition", "--sampler", str(trained / "sampler.safetensors"), "--count", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    report = json.loads((tmp_path / "composition.json").read_text())
    names = {entry["metric"] for entry in report["scores"]}
    assert {f"composition_{who}_{what}" for who in ("strict", "lenient") for what in WHAT} <= names
    assert {"composition_captions_seen_subject", "composition_captions_pair_relation"} <= names
    shares = [entry for entry in report["scores"] if entry["metric"].startswith("composition")]
    assert [e["parameters"]["judge"] for e in shares] == sorted(
        (e["parameters"]["judge"] for e in shares), key=["strict", "lenient", "captions"].index
    )
    assert all(0 <= (e["value"] or 0) <= 100 and "judge_on_real_scenes" in e["parameters"] for e in shares)
    assert len(list((tmp_path / "composition").glob("*.png"))) == 4 * 2 + 1


def test_the_command_compares_the_set_with_real_scenes_and_those_with_others(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["study", "composition", "--sampler", str(trained / "sampler.safetensors"), "--count", "4"]
    assert CliRunner().invoke(app, command).exit_code == 0
    report = json.loads((tmp_path / "composition.json").read_text())
    assert report["reference"]["path"] == "composition/real" and report["reference"]["count"] == 16
    distance = next(entry for entry in report["scores"] if entry["metric"] == "frechet_vlm")
    assert 0 < distance["parameters"]["another_real_set"] < distance["value"]
    folders = [tmp_path / "composition" / name for name in ("real", "real-other")]
    real, other = ([path.read_bytes() for path in sorted(folder.glob("*.png"))] for folder in folders)
    assert len(real) == len(other) == 16 and not set(real) & set(other)
