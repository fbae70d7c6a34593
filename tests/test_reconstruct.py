"""`vugen reconstruct`: the rows, the figures, and the checkpoints that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import changed
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.errors import VugenError
from vugen_cli.files import locked
from vugen_cli.metrics.features import Extractor
from vugen_cli.metrics.pairs import psnr
from vugen_cli.recipe import Recipe
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.studies.reconstruct import Seen, reconstruct, save_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def identity(scenes: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("identity") / "identity.safetensors"
    return train_reducer(
        changed(tiny_recipe, "reducer.kind=identity", "train_reducer.steps=2"), scenes, out, CPU
    )


def test_three_rows_and_their_figures(
    trained: Path, identity: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    reducer = str(trained / "reducer.safetensors")
    result = CliRunner().invoke(
        app,
        ["reconstruct", "--reducer", reducer, "--full", str(identity), "--images", str(scenes),
         "--count", "11", "--out", str(tmp_path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "from all of z: PSNR" in result.output and "from reduced z: PSNR" in result.output
    report = json.loads((tmp_path / "reconstruction.json").read_text())
    for found in (report, report["full"]):
        assert 0 < found["psnr"] < 30 and -1 <= found["ssim"] <= 1 and found["frechet"] > 0
        assert "lpips" not in found
    assert report["images"]["count"] == 11 and "VLM" in report["features"]
    with Image.open(tmp_path / "reconstruction.png") as picture:
        assert picture.width == 8 * (128 + 4) + 4  # 64 px pictures are shown twice as large
        assert picture.height == 4 + 6 * (128 + 14 + 4 + 4)  # 8 and 3 columns of three rows


def test_the_figures_are_those_of_known_pictures(
    trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one number a picture as its feature, the Fréchet distance has a closed form."""
    seen: list[np.ndarray] = []

    def brightness(images: torch.Tensor) -> dict[str, torch.Tensor]:
        value = images.float().mean((1, 2, 3))[:, None]
        seen.append(value.double().numpy())
        return {"features": value}

    extractor = Extractor("vlm", "brightness", "none", {}, brightness)
    monkeypatch.setattr("vugen_cli.studies.reconstruct.vlm_extractor", lambda *_: extractor)
    report = reconstruct(trained / "reducer.safetensors", scenes, tmp_path, 16)
    original, decoded = (np.concatenate(seen[i::2]) for i in (0, 1))
    gap = (original.mean() - decoded.mean()) ** 2
    spread = (original.std(ddof=1) - decoded.std(ddof=1)) ** 2
    assert report.frechet == pytest.approx(gap + spread, rel=1e-6)
    assert report.features == "brightness"


def test_saved_pictures_are_of_the_last_call_alone_and_two_calls_do_not_mix(
    trained: Path, scenes: Path, tmp_path: Path
) -> None:
    words = ["reconstruct", "--reducer", str(trained / "reducer.safetensors"), "--images", str(scenes)]
    for count in ("5", "3"):
        more = ["--count", count, "--save-images", "--out", str(tmp_path)]
        assert CliRunner().invoke(app, [*words, *more]).exit_code == 0
    assert len(list(tmp_path.glob("decoded/*.png"))) == len(list(tmp_path.glob("originals/*.png"))) == 3
    with locked(tmp_path, "busy"):
        result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert "another process writes to" in str(result.exception)


def test_a_single_image_has_no_frechet_distance(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "in/a.png")
    report = reconstruct(trained / "reducer.safetensors", tmp_path / "in", tmp_path)
    assert report.frechet is None and report.images.count == 1


def test_a_full_row_needs_the_identity_and_the_same_vlm(
    trained: Path, identity: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    reducer = trained / "reducer.safetensors"
    with pytest.raises(VugenError, match=r"kind linear: train one on all of z"):
        reconstruct(reducer, scenes, tmp_path, full=reducer)
    larger = changed(tiny_recipe, "reducer.kind=identity", "decoder.image_size=72", "train_reducer.steps=1")
    other = train_reducer(larger, scenes, tmp_path / "72.safetensors", CPU)
    with pytest.raises(VugenError, match=r"72.safetensors draws 72 px, but .* 64 px"):
        reconstruct(reducer, scenes, tmp_path, full=other)
    assert not (tmp_path / "reconstruction.json").exists()


def test_every_column_is_one_picture(tmp_path: Path) -> None:
    def grey(value: int) -> torch.Tensor:
        return torch.full((3, 64, 64), value, dtype=torch.uint8)

    save_rows(
        {"a": [grey(10 * i) for i in range(10)], "b": [grey(10 * i + 5) for i in range(10)]},
        tmp_path / "x.png",
    )
    pixels = np.asarray(Image.open(tmp_path / "x.png"))[:, :, 0]
    step = 128 + 4
    tall = 128 + 14 + 4 + 4
    centre = [[int(pixels[4 + tall * r + 60, 4 + step * c + 60]) for c in range(8)] for r in range(4)]
    assert centre[0] == [10 * i for i in range(8)] and centre[1] == [10 * i + 5 for i in range(8)]
    assert centre[2][:3] == [80, 90, 255] and centre[3][:3] == [85, 95, 255]


def test_an_infinite_psnr_is_left_out_of_the_mean() -> None:
    originals = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    decoded = originals.clone()
    decoded[1:] //= 2
    features = originals.float().mean((2, 3))
    one, other = Seen(), Seen()
    one.add([0, 1, 2], originals, features)
    other.add([0, 1, 2], decoded, features)
    other.compare([0, 1, 2], originals, decoded, {"psnr": psnr})
    true = psnr(originals[1:] / 255, decoded[1:] / 255).mean().item()
    assert other.figures(one)["psnr"] == pytest.approx(true)
    other.compare([1, 2], originals[1:], originals[1:], {"psnr": psnr})
    assert other.figures(one)["psnr"] is None
