"""Diversity: closed forms of the two measures, and the command over prompts and seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.metrics.diversity import pairwise_distance, vendi_score


def test_copies_are_one_image_and_orthogonal_ones_are_all_different() -> None:
    alike, different = np.ones((5, 5)), np.eye(5)
    assert vendi_score(alike) == pytest.approx(1) and pairwise_distance(alike) == pytest.approx(0)
    assert vendi_score(different) == pytest.approx(5) and pairwise_distance(different) == pytest.approx(1)
    pairs = np.kron(np.eye(2), np.ones((3, 3)))  # two kinds, three copies of each
    assert vendi_score(pairs) == pytest.approx(2)
    assert pairwise_distance(pairs) == pytest.approx(18 / 30)


def drawn(folder: Path, colours: dict[str, list[tuple[int, int, int]]]) -> Path:
    folder.mkdir()
    rows = []
    for prompt, each in colours.items():
        for i, colour in enumerate(each):
            name = f"{prompt}-{i}.png"
            picture = Image.new("RGB", (64, 64), colour)
            picture.paste((255, 255, 255), (8 * i, 0, 8 * i + 8, 64))
            picture.save(folder / name)
            rows.append(json.dumps({"file": name, "prompt": prompt, "index": i}))
    (folder / "samples.jsonl").write_text("\n".join(rows))
    return folder


def test_the_command_scores_each_prompts_seeds_and_shows_one(
    vlm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "alike", {"a": [(9, 9, 9)], "b": [(200, 0, 0), (0, 0, 200), (0, 200, 0)]})
    command = ["study", "diversity", "--features", f"vlm:{vlm_path}", "--images", "alike"]
    whole = Path("alike/b-0.png").read_bytes()
    Path("alike/bad.png").write_bytes(whole[: len(whole) // 2])
    with open("alike/samples.jsonl", "a") as listing:
        listing.write("\n" + json.dumps({"file": "bad.png", "prompt": "b", "index": 3}))
    result = CliRunner().invoke(app, [*command, "--reference", "alike"])
    assert result.exit_code == 0, result.exception
    report = json.loads(Path("diversity.json").read_text())
    distance, vendi = report["scores"]
    assert distance["parameters"]["prompts"] == 1 and distance["parameters"]["images_of_a_prompt"] == [3]
    assert distance["value"] > 0 and 1 < vendi["value"] <= 3
    assert distance["parameters"]["real"] == pytest.approx(distance["value"])
    assert report["images"]["count"] == 4 and len(report["images"]["bad"]) == 1
    assert Path("diversity.png").is_file()


def test_one_image_a_prompt_is_refused(
    vlm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "single", {"a": [(9, 9, 9)], "b": [(200, 0, 0)]})
    command = ["study", "diversity", "--features", f"vlm:{vlm_path}", "--images", "single"]
    result = CliRunner().invoke(app, command)
    assert "no prompt of single has two images" in str(result.exception)
