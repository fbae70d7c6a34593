"""The Python interface: five names, a page whose examples run, and a diffusers pipeline."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import vugen_cli
from vugen_cli import VugenPipeline, load_sampler
from vugen_cli.errors import VugenError

PAGE = Path(__file__).parent.parent / "docs/python.md"


def test_the_page_runs_from_top_to_bottom(
    trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("reducer.safetensors", "sampler.safetensors"):
        (tmp_path / name).symlink_to(trained / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/openmoji").symlink_to(scenes)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 5


def test_the_package_has_five_names_and_importing_it_loads_nothing_heavy() -> None:
    assert len(vugen_cli.__all__) == 5 and all(callable(getattr(vugen_cli, n)) for n in vugen_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vugen_cli.nothing
    loaded = "import sys, vugen_cli; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout.strip() == "[]"
    )


def test_a_pipeline_comes_back_whole_and_draws_what_the_sampler_draws(trained: Path, tmp_path: Path) -> None:
    pipe = VugenPipeline.from_sampler(trained / "sampler.safetensors")
    assert isinstance(pipe, DiffusionPipeline)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a bear", "two cats", "a bear"]
    images = pipe(prompts, num_images_per_prompt=2, seed=3, output_type="pt").images
    sampler = load_sampler(trained / "sampler.safetensors")
    drawn = {(p, i): image for p, i, image in sampler.sample(prompts[:2], 2, seed=3)}
    expected = [drawn[p, i] for p in (0, 1, 0) for i in (0, 1)]
    assert torch.equal(images, torch.stack(expected).float() / 255)

    pipe.save_pretrained(tmp_path / "pipeline")
    again = VugenPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    (second,) = again("two cats", 2, seed=3, output_type="np", return_dict=False)
    assert np.array_equal(second, images[2:4].permute(0, 2, 3, 1).numpy())
    assert again.sampler.vlm.fingerprint == pipe.sampler.vlm.fingerprint


def test_a_generator_draws_the_seed_and_pictures_are_pil_images(trained: Path) -> None:
    pipe = VugenPipeline.from_sampler(trained / "sampler.safetensors")
    pipe.set_progress_bar_config(disable=True)
    one, same, other = (
        pipe("a bear", generator=torch.Generator().manual_seed(s)).images[0] for s in (1, 1, 2)
    )
    assert one.size == (64, 64) and one.tobytes() == same.tobytes() != other.tobytes()
    with pytest.raises(VugenError, match="output_type='latent'"):
        pipe("a bear", output_type="latent")


def test_another_directory_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(VugenError, match="is no saved VugenPipeline"):
        VugenPipeline.from_pretrained(tmp_path)
