"""What counts as a difference between the outcomes of two commits; the line that makes them is not run."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "same_bytes.py"
spec = importlib.util.spec_from_file_location("same_bytes", SCRIPT)
assert spec and spec.loader
same_bytes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(same_bytes)

WEIGHTS, LOSSES, PICTURE = "sampler.safetensors", "sampler.run/metrics.jsonl", "samples/a.png"


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal folders of outcomes."""
    base, head = tmp_path / "base", tmp_path / "head"
    for folder in ("sampler.run", "samples", ".cache"):
        (base / folder).mkdir(parents=True)
    weights = {"down.weight": torch.randn(3, 4), "up.weight": torch.randn(3, 4), "step": torch.tensor(4)}
    save_file(weights | {"half": torch.ones(2, dtype=torch.bfloat16)}, base / WEIGHTS)
    row = {"step": 0, "loss": 2.098792, "images_per_s": 17.9}
    (base / LOSSES).write_text(json.dumps(row) + "\n" + json.dumps(row | {"step": 1}) + "\n")
    (base / "scores.json").write_text(
        json.dumps({"scores": [{"name": "FID", "value": 7.25}], "path": "here"})
    )
    Image.new("RGB", (8, 8), "red").save(base / PICTURE)
    Image.new("RGB", (8, 8), "red").save(base / "sampler.run/curves.png")
    (base / "train.tar").write_bytes(bytes(64))
    shutil.copytree(base, head)
    return base, head


def different(both: tuple[Path, Path]) -> dict[str, str]:
    """The files that differ, and how."""
    verdicts = same_bytes.compare(*both)
    assert {WEIGHTS, LOSSES, PICTURE, "scores.json", "train.tar"} <= set(verdicts)
    return {name: verdict for name, verdict in verdicts.items() if not verdict.startswith("SAME, ")}


def test_equal_outcomes_are_the_same_whatever_the_time_the_path_and_the_curves(both):
    head = both[1]
    (head / LOSSES).write_text((head / LOSSES).read_text().replace("17.9", "3"))
    (head / "scores.json").write_text((head / "scores.json").read_text().replace("here", "there"))
    Image.new("RGB", (8, 8), "blue").save(head / "sampler.run/curves.png")
    (head / ".cache/of.json").write_text("1")
    assert different(both) == {}


def test_one_byte_of_a_weight_differs(both):
    weights = load_file(both[1] / WEIGHTS)
    weights["down.weight"].view(torch.uint8)[1, 2] ^= 1
    save_file(weights, both[1] / WEIGHTS)
    found = different(both)
    assert list(found) == [WEIGHTS] and found[WEIGHTS].startswith("DIFFERENT: down.weight by up to ")


def test_a_changed_type_differs(both):
    weights = load_file(both[1] / WEIGHTS)
    save_file(weights | {"half": weights["half"].half()}, both[1] / WEIGHTS)
    assert different(both) == {WEIGHTS: "DIFFERENT: half torch.bfloat16 (2,) -> torch.float16 (2,)"}


def test_weights_under_another_name_are_the_same_unless_the_names_are_swapped(both):
    weights = load_file(both[0] / WEIGHTS)
    down, up = weights.pop("down.weight"), weights.pop("up.weight")
    save_file(
        weights | {"up.weight": down, "conv_out.weight": up}, both[1] / WEIGHTS
    )  # one name is used again
    assert same_bytes.compare(*both)[WEIGHTS] == "SAME, 4 tensors, 1 keys renamed"
    save_file(weights | {"up.weight": down, "down.weight": up}, both[1] / WEIGHTS)
    assert list(different(both)) == [WEIGHTS]


def test_a_renamed_weight_that_changed_differs(both):
    weights = load_file(both[0] / WEIGHTS)
    save_file(weights | {"conv_in": weights.pop("down.weight") + 1}, both[1] / WEIGHTS)
    found = different(both)[WEIGHTS]
    assert found == "DIFFERENT: 1 of 4 tensors only in base, 1 only in head"


def test_the_last_digit_of_a_loss_or_a_score_differs(both):
    for name, old, new in ((LOSSES, "2.098792", "2.098793"), ("scores.json", "7.25", "7.250000000000001")):
        (both[1] / name).write_text((both[1] / name).read_text().replace(old, new, 1))
    assert different(both) == {
        LOSSES: "DIFFERENT: 0.loss 2.098792 -> 2.098793",
        "scores.json": "DIFFERENT: scores.0.value 7.25 -> 7.250000000000001",
    }


def test_one_pixel_differs_and_so_do_the_words_in_a_picture(both):
    pixels = np.asarray(Image.open(both[1] / PICTURE)).copy()
    pixels[3, 4, 1] = 2
    Image.fromarray(pixels).save(both[1] / PICTURE)
    assert different(both) == {PICTURE: "DIFFERENT: 1 of 192 values by up to 2 of 255"}
    text = PngImagePlugin.PngInfo()
    text.add_itxt("vugen:prompt", "a cat")
    Image.new("RGB", (8, 8), "red").save(both[1] / PICTURE, pnginfo=text)
    assert different(both) == {PICTURE: "DIFFERENT: bytes of the file; its pixels are the same"}


def test_a_shard_differs_and_so_does_a_file_that_one_lacks(both):
    (both[1] / "train.tar").write_bytes(bytes(63) + b"1")
    (both[1] / "more.json").write_text("1")
    assert different(both) == {
        "more.json": "DIFFERENT: only in head",
        "train.tar": "DIFFERENT: 1 bytes, 64 -> 64 long",
    }


def test_an_unknown_commit_is_told_in_one_line():
    command = [sys.executable, SCRIPT, "no-such-commit"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: there is no commit no-such-commit in ")
    assert result.stderr.count("\n") == 1
