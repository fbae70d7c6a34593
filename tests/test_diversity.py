"""Diversity: closed forms of the two measures, and the command over prompts and seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.metrics.diversity import pairwise_distance, score_diversity, vendi_score
from vugen_cli.metrics.features import Extractor
from vugen_cli.metrics.image_sets import ImageSet, open_image_set
from vugen_cli.metrics.prompted_images import prompted_images


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


def test_photographs_of_several_sizes_are_shown_cut(vlm_path: Path, tmp_path: Path) -> None:
    folder = drawn(tmp_path / "set", {"a": [(200, 0, 0), (0, 0, 200)]})
    picture = folder / "a-0.png"
    Image.open(picture).resize((40, 20)).save(picture)
    words = ["study", "diversity", "--features", f"vlm:{vlm_path}", "--images", str(folder)]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "d.json")])
    assert result.exit_code == 0, result.exception
    assert json.loads((tmp_path / "d.json").read_text())["scores"] and (tmp_path / "d.png").is_file()


def brightness(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two numbers of a picture beside a thousand that all pictures share."""
    own = images.double().mean(dim=(2, 3))[:, :2] / 255
    return {"features": torch.cat([own, torch.full((len(images), 1), 1000.0, dtype=torch.float64)], dim=1)}


def test_what_all_pictures_share_does_not_count(tmp_path: Path) -> None:
    """The centre is the reference's mean, or else the mean of the prompts' means, as written out here."""
    extractor = Extractor("vlm", "brightness", "none", {}, brightness)
    set_of = {"a": [(255, 0, 0), (0, 255, 0)], "b": [(255, 255, 0), (255, 0, 0), (0, 255, 0)]}
    images = open_image_set(drawn(tmp_path / "drawn", set_of))
    others = open_image_set(drawn(tmp_path / "real", {"a": [(0, 0, 0), (0, 0, 0)], "c": [(255, 255, 255)]}))

    def pairwise(centre: np.ndarray, rows: np.ndarray) -> float:
        about = rows - centre
        unit = about / np.linalg.norm(about, axis=1, keepdims=True)
        cosines = [unit[i] @ unit[j] for i in range(len(unit)) for j in range(len(unit)) if i != j]
        return float(1 - np.mean(cosines))

    def rows_of(images: ImageSet) -> dict[str, np.ndarray]:
        of_prompt: dict[str, list[np.ndarray]] = {}
        for sample, pixels in zip(images.samples, images, strict=True):
            found = brightness(torch.from_numpy(pixels)[None])["features"].numpy()
            of_prompt.setdefault(sample.prompt or "", []).append(found[0])
        return {prompt: np.array(rows) for prompt, rows in of_prompt.items()}

    ours, real = rows_of(images), rows_of(others)
    own = np.mean([rows.mean(axis=0) for rows in ours.values()], axis=0)
    theirs = np.concatenate(list(real.values())).mean(axis=0)
    for reference, centre, named in (
        (None, own, "mean over the prompts"),
        (prompted_images(others), theirs, "mean of the reference"),
    ):
        report = score_diversity(prompted_images(images), extractor, reference=reference)
        expected = np.mean([pairwise(centre, rows) for rows in ours.values()])
        assert report.scores[0].value == pytest.approx(expected, rel=1e-9) and expected > 0.1
        assert report.scores[0].parameters["centre"] == named
    images.limit = 2  # one prompt alone has no centre but itself
    (distance, _) = score_diversity(prompted_images(images), extractor).scores
    assert distance.value is not None and distance.value < 1e-3 and distance.parameters["centre"] == "none"
    assert "give --reference" in str(distance.warning)


def test_pictures_that_are_all_the_same_do_not_differ(tmp_path: Path) -> None:
    extractor = Extractor("vlm", "brightness", "none", {}, brightness)
    images = open_image_set(drawn(tmp_path / "drawn", {"a": [(9, 9, 9)] * 2, "b": [(9, 9, 9)] * 2}))
    for file in images.path.glob("*.png"):
        Image.new("RGB", (64, 64), (9, 9, 9)).save(file)
    distance, vendi = score_diversity(prompted_images(images), extractor).scores
    assert distance.value == pytest.approx(0) and vendi.value == pytest.approx(1)


def test_one_image_a_prompt_is_refused(
    vlm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "single", {"a": [(9, 9, 9)], "b": [(200, 0, 0)]})
    command = ["study", "diversity", "--features", f"vlm:{vlm_path}", "--images", "single"]
    result = CliRunner().invoke(app, command)
    assert "no prompt of single has two images" in str(result.exception)
    listing = Path("single/samples.jsonl")
    rows = [json.loads(line) for line in listing.read_text().splitlines()]  # one instruction, two pictures
    edits = [row | {"prompt": "at night", "sources": [f"{i}.png"]} for i, row in enumerate(rows)]
    listing.write_text("\n".join(map(json.dumps, edits)))
    result = CliRunner().invoke(app, command)
    assert "no prompt of single has two images" in str(result.exception)
