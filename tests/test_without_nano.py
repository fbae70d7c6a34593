"""`vugen_cli.nano` is a wing of its own: without it the whole line runs on another VLM and other pictures."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_overrides
from families import build
from PIL import Image

LINE = """
import shlex
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[:2] == ["vugen_cli", "nano"]:
            raise ModuleNotFoundError(f"{name} is hidden")


sys.meta_path.insert(0, Hidden())
from vugen_cli.app import app

for line in sys.stdin:
    print("vugen", line, flush=True)
    app(shlex.split(line), standalone_mode=False)
assert not [name for name in sys.modules if name.startswith("vugen_cli.nano")]
"""


@pytest.mark.slow
def test_the_whole_line_runs_without_the_embedded_world(tmp_path: Path) -> None:
    build("llava_clip", tmp_path / "vlm")
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(photos / f"a-red-car-{number}.png")
    tiny = " ".join(f"--set {shlex.quote(each)}" for each in tiny_overrides(Path("vlm")))
    line = f"""
        prepare --dataset folder --source photos --size 64 --workers 1
        train-reducer --data data/folder {tiny}
        train-sampler --reducer reducer.safetensors {tiny}
        sample "a red car" "a cat" -n 2
        reconstruct --images photos --count 4
        score --fid --features vlm
        study understanding --sampler sampler.safetensors --images photos
    """
    steps = "\n".join(each.strip() for each in line.strip().splitlines())
    result = subprocess.run(
        [sys.executable, "-c", LINE], input=steps, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert (tmp_path / "samples/grid.png").is_file() and (tmp_path / "scores.json").is_file()
