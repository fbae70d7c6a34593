"""The independent judges of scenes: what they read, how they are trained, and that the bundled ones can see.

Takes about six seconds.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.data.loader import ShardedImages
from vugen_cli.errors import VugenError
from vugen_cli.files import bundle
from vugen_cli.nano.judges import in_short, shares
from vugen_cli.nano.reader import JUDGES, SIZE, Reading, SceneReader, _verdict, load_reader, told, verdicts
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.nano.train_judge import blurred, reading_loss, varied
from vugen_cli.nano.vocabulary import COLORS, SETTING_NAMES, SUBJECT_NAMES

CAT, CAR = SUBJECT_NAMES.index("cat"), SUBJECT_NAMES.index("car")


def scene(kind: str, *names: str, relation: str | None = None, **more: Any) -> dict[str, Any]:
    subjects = [{"name": name, "count": 1, "color": None, **more} for name in names]
    return {"kind": kind, "subjects": subjects, "relation": relation, "setting": "forest", "held_out": False}


def reading(counts: dict[int, float], centres: dict[int, tuple[float, float]]) -> Reading:
    """One picture in a forest; everything in red."""
    found = Reading(
        torch.zeros(1, 64), torch.zeros(1, 64, 2), torch.zeros(1, 64, len(COLORS)), torch.zeros(1, 12)
    )
    for number, count in counts.items():
        found.counts[0, number] = count
    for number, place in centres.items():
        found.centres[0, number] = torch.tensor(place)
    found.colours[..., 0] = 1
    found.settings[0, SETTING_NAMES.index("forest")] = 1
    return found


CAT_ABOVE_CAR = reading({CAT: 0.9, CAR: 1.2}, {CAT: (0.1, -0.5), CAR: (0.0, 0.5)})


@pytest.mark.parametrize(
    ("relation", "right"), [("above", True), ("below", False), ("to the left of", False)]
)
def test_a_side_is_that_of_the_subjects_places(relation: str, right: bool) -> None:
    asked = scene("pair", "cat", "car", relation=relation)
    assert _verdict(CAT_ABOVE_CAR, 0, asked) == {"subject": True, "setting": True, "side": right}


def test_sides_and_colours_are_asked_where_the_subjects_are_right() -> None:
    assert "side" not in _verdict(CAT_ABOVE_CAR, 0, scene("pair", "cat", "dog", relation="above"))
    assert "side" not in _verdict(CAT_ABOVE_CAR, 0, scene("pair", "cat", "car", relation="next to"))
    assert _verdict(CAT_ABOVE_CAR, 0, scene("single", "car", color="red"))["colour"]
    assert not _verdict(CAT_ABOVE_CAR, 0, scene("single", "car", color="blue"))["colour"]


def test_a_number_is_the_nearest() -> None:
    three = reading({CAT: 2.6, CAR: 0.2}, {})
    assert _verdict(three, 0, scene("count", "cat", count=3))["count"]
    assert not _verdict(three, 0, scene("count", "cat", count=2))["count"]
    assert told(three, 0) == "3 cat, forest"


def test_the_loss_is_least_where_the_reading_is_right() -> None:
    asked = [scene("pair", "cat", "car", relation="above", color="red")]
    best = reading_loss(CAT_ABOVE_CAR._replace(counts=CAT_ABOVE_CAR.counts.round()), asked)
    assert set(best) == {"counts", "number", "setting", "side", "colour"}
    wrong = CAT_ABOVE_CAR._replace(centres=-CAT_ABOVE_CAR.centres, settings=-CAT_ABOVE_CAR.settings)
    worse = reading_loss(wrong._replace(counts=CAT_ABOVE_CAR.counts.roll(1)), asked)
    assert all(worse[name] > best[name] for name in ("counts", "setting", "side"))
    other = reading_loss(CAT_ABOVE_CAR, [scene("pair", "cat", "car", relation="above", color="blue")])
    assert other["colour"] > best["colour"]


def test_the_losses_terms_are_the_same_in_every_batch_so_that_processes_can_average_them() -> None:
    asked = [scene("single", "cat"), scene("pair", "cat", "car", relation="above", color="red")]
    single, pair = (reading_loss(CAT_ABOVE_CAR, [one]) for one in asked)
    assert list(single) == list(pair) and single["side"] == single["colour"] == 0 < pair["side"]


def test_real_scenes_are_changed_a_little_and_repeatably() -> None:
    images = torch.full((4, 3, 16, 16), 100, dtype=torch.uint8)
    images[..., 8:] = 200
    first, second = (varied(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and 0 < (first - images).abs().mean() < 25
    blur, noise = torch.eye(2)
    soft = blurred(images.float(), blur.expand(4, 2), torch.randn(4, 3, 16, 16))
    assert torch.equal(soft[..., :5], images[..., :5].float()) and (soft[..., 7] > 105).all()
    grainy = blurred(images.float(), noise.expand(4, 2), torch.ones(4, 3, 16, 16))
    assert torch.equal(grainy, images + 25.0)


def test_train_judge_writes_a_strict_and_a_lenient_one(trained: Path, scenes: Path, tmp_path: Path) -> None:
    tiny = [p for s in ("train_judge.batch_size=8", "data.workers=0") for p in ("--set", s)]
    strict, lenient = (str(tmp_path / f"{name}.safetensors") for name in JUDGES)
    command = ["train-judge", "--data", str(scenes), "--steps", "2", *tiny]
    result = CliRunner().invoke(app, [*command, "--out", strict])
    assert result.exit_code == 0, result.exception
    assert "pair_subject" in result.output and (tmp_path / "strict.run/curves.png").exists()
    reducer = str(trained / "reducer.safetensors")
    result = CliRunner().invoke(app, [*command, "--out", lenient, "--init", strict, "--reducer", reducer])
    assert result.exit_code == 0, result.exception
    weights = [load_reader(path).state_dict() for path in (strict, lenient)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    result = CliRunner().invoke(app, [*command, "--out", strict, "--steps", "4"])  # the same file, trained on
    assert result.exit_code == 0, result.exception
    command = [*command, "--out", lenient, "--init", strict, "--reducer", reducer, "--steps", "4"]
    result = CliRunner().invoke(app, command)
    assert "weights.init: " in str(result.exception)


def test_what_is_no_judge_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(VugenError, match="no judge at .*: make one with `vugen train-judge`"):
        load_reader(tmp_path / "none.safetensors")
    with pytest.raises(VugenError, match="is no judge of this version"):
        load_reader(trained / "reducer.safetensors")


def test_pictures_of_other_sizes_are_read_at_their_own() -> None:
    torch.manual_seed(0)
    reader = SceneReader()
    small = torch.randint(0, 256, (2, 3, SIZE, SIZE))
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(reader(small).counts, reader(large).counts, atol=0.05)


def test_shares_are_by_judge_group_and_question() -> None:
    asked = [scene("single", "cat"), scene("single", "car"), scene("pair", "cat", "car", relation="above")]
    pictures = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)

    def judged(images: Tensor, _scenes: object) -> list[dict[str, bool]]:
        if images.any():  # the real ones
            return [{"subject": True}, {"subject": True}, {"subject": True, "side": True}]
        return [{"subject": True}, {"subject": False}, {"subject": False}]

    found = shares("drawn", {"strict": judged}, pictures, pictures + 1, asked, {"seed_of_samples": 7})
    values = {score.metric: score.value for score in found}
    assert values == {
        "drawn_strict_seen_subject": 50,
        "drawn_strict_pair_subject": 0,
        "drawn_strict_pair_side": None,
    }
    assert found[0].parameters["judge_on_real_scenes"] == 100 and found[0].parameters["seed_of_samples"] == 7
    assert found[2].warning == "no picture shows the subjects that this is asked of."
    assert in_short(found)[0].startswith(
        "right by the strict judge, in % (of real scenes): seen_subject 50.0 (100.0)"
    )


@pytest.mark.parametrize("splits", [["train", "val"], ["val"]], ids=" and ".join)
def test_reconstructions_of_scenes_are_judged(
    splits: list[str], trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reconstruction is asked for what its own original shows."""
    whole, scenes = scenes, tmp_path / "scenes"
    shutil.copytree(whole, scenes)
    manifest = json.loads((scenes / "dataset.json").read_text())
    manifest["splits"] = {split: manifest["splits"][split] for split in splits}
    (scenes / "dataset.json").write_text(json.dumps(manifest))
    asked: list[dict[str, Any]] = []

    def judges(_vlm: object) -> dict[str, Any]:
        def judged(images: Tensor, wanted: list[dict[str, Any]]) -> list[dict[str, bool]]:
            asked.extend(wanted)
            return [{"subject": bool(row)} for row in range(len(images))]

        return {"strict": judged}

    monkeypatch.setattr("vugen_cli.nano.judges.judges_beside", judges)
    command = ["reconstruct", "--reducer", str(trained / "reducer.safetensors"), "--images", str(scenes)]
    result = CliRunner().invoke(app, [*command, "--count", "9", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.exception
    stored = [meta["scene"] for _, meta in ShardedImages(scenes, "val").in_order(9)]
    assert asked == stored * 2 and "right by the strict judge" in result.output
    report = json.loads((tmp_path / "reconstruction.json").read_text())
    assert {score["metric"] for score in report["judges"]} >= {"reconstruction_strict_seen_subject"}


@pytest.mark.parametrize("name", JUDGES)
def test_the_bundled_judges_read_held_out_scenes(name: str) -> None:
    if not bundle(f"judge-{name}.safetensors").is_file():
        pytest.skip("no bundle in this checkout")
    samples = [OpenMojiScenes(320, "val", SIZE, seed=11, pairs=0.5)[i] for i in range(320)]
    pictures = torch.from_numpy(np.stack([np.asarray(s.image) for s in samples])).permute(0, 3, 1, 2)
    found = verdicts(load_reader(name), pictures, [sample.meta["scene"] for sample in samples])
    for what in ("subject", "setting", "side", "count", "colour"):
        right = [verdict[what] for verdict in found if what in verdict]
        assert len(right) >= 20 and np.mean(right) > 0.94, what
    assert bundle(f"judge-{name}.safetensors").stat().st_size < 1e6
