"""The Python API and the diffusers pipeline draw what the command draws."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import vugen_cli
from vugen_cli import VugenPipeline, load_sampler
from vugen_cli.app import app
from vugen_cli.errors import VugenError

PROMPTS = ["a bear in a forest", "two apples in the snow"]


@pytest.fixture(scope="module")
def pipe() -> VugenPipeline:
    """The bundled sampler: its pictures depend on every weight."""
    sampler = load_sampler()
    assert "bundles" in sampler.path.parts
    pipe = VugenPipeline(sampler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: VugenPipeline, *prompts: str, **options: Any) -> np.ndarray:
    return pixels(pipe(list(prompts), num_inference_steps=2, **options).images)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import vugen_cli, sys; print({'torch', 'numpy', 'diffusers', 'typer'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


API = {"VugenPipeline", "load_sampler", "reconstruct", "sample", "score"}


def test_the_api_is_five_names_that_the_commands_call() -> None:
    from vugen_cli.metrics.scores import score_sets
    from vugen_cli.sampling.draw import draw
    from vugen_cli.studies.reconstruct import reconstruct

    assert set(vugen_cli.__all__) == {*API, "__version__"}
    assert vugen_cli.sample is draw and vugen_cli.score is score_sets
    assert vugen_cli.reconstruct is reconstruct
    with pytest.raises(AttributeError, match="nonsense"):
        _ = vugen_cli.nonsense


def test_a_saved_pipeline_draws_the_same_pictures(pipe: VugenPipeline, tmp_path: Path) -> None:
    before = draw(pipe, *PROMPTS, num_images_per_prompt=2, seed=3)
    pipe.save_pretrained(tmp_path / "pipe")
    again = VugenPipeline.from_pretrained(tmp_path / "pipe")
    assert again.sampler.vlm.fingerprint == pipe.sampler.vlm.fingerprint
    assert np.array_equal(before, draw(again, *PROMPTS, num_images_per_prompt=2, seed=3))
    # What was saved is a checkpoint as any other, and saving it again changes nothing.
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "sampler.safetensors") for name in ("pipe", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    names = {path.name for path in (tmp_path / "pipe").iterdir()}
    assert names == {"model_index.json", "pipeline.py", "sampler", "sampler.safetensors", "vlm"}


def test_a_seed_gives_the_pictures_of_the_command(
    pipe: VugenPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", *PROMPTS, "-n", "2", "--seed", "5", "--steps", "2", "--device", "cpu"]
    assert CliRunner().invoke(app, words).exit_code == 0
    files = [sorted((tmp_path / "samples").glob(f"{p.replace(' ', '-')}-*.png")) for p in PROMPTS]
    drawn = pixels([Image.open(file) for each in files for file in each])
    assert np.array_equal(drawn, draw(pipe, *PROMPTS, num_images_per_prompt=2, seed=5))


def test_a_generator_repeats_and_moves_on(pipe: VugenPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (draw(pipe, PROMPTS[0], generator=generator) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, draw(pipe, PROMPTS[0], generator=torch.Generator().manual_seed(0)))


def test_output_types_hold_the_same_pictures(pipe: VugenPipeline) -> None:
    options = {"seed": 0, "num_inference_steps": 1}
    pil = pixels(pipe(PROMPTS, **options).images)
    array = pipe(PROMPTS, output_type="np", **options).images
    (tensor,) = pipe(PROMPTS, output_type="pt", return_dict=False, **options)
    assert array.dtype == np.float32 and array.shape == pil.shape == (2, 64, 64, 3)
    assert np.array_equal((array * 255).round().astype(np.uint8), pil)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_steps_and_guidance_reach_the_sampler(pipe: VugenPipeline) -> None:
    plain = draw(pipe, PROMPTS[0], seed=0)
    assert not np.array_equal(plain, pixels(pipe(PROMPTS[0], seed=0, num_inference_steps=1).images))
    assert not np.array_equal(plain, draw(pipe, PROMPTS[0], seed=0, guidance_scale=9.0))


def test_guidance_is_at_work_within_its_interval_only(
    pipe: VugenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guided(interval: tuple[float, float], scale: float) -> np.ndarray:
        changed = pipe.sampler.defaults.model_copy(update={"guidance_interval": interval})
        monkeypatch.setattr(pipe.sampler, "defaults", changed)
        return draw(pipe, PROMPTS[0], seed=0, guidance_scale=scale)  # velocities at times 0 and 0.5

    plain, first, both = guided((0.0, 1.0), 1.0), guided((0.0, 0.5), 6.0), guided((0.0, 1.0), 6.0)
    assert np.array_equal(guided((0.6, 1.0), 6.0), plain)
    assert not np.array_equal(first, plain) and not np.array_equal(first, both)


def test_wrong_use_ends_in_a_line(pipe: VugenPipeline, tmp_path: Path) -> None:
    with pytest.raises(VugenError, match="empty"):
        pipe(["a bear", " "])
    with pytest.raises(VugenError, match="not both"):
        pipe("a bear", seed=1, generator=torch.Generator())
    with pytest.raises(VugenError, match="latent"):
        pipe("a bear", output_type="latent")
    for seed in (-1, 1.0):
        with pytest.raises(VugenError, match=f"seed {seed}: give a whole number"):
            pipe("a bear", seed=seed)  # type: ignore[arg-type]
    with pytest.raises(VugenError, match="draws 64x64 alone"):
        pipe("a bear", height=0)
    with pytest.raises(VugenError, match="image guidance is by a prompt's pictures, and none is given"):
        pipe("a bear", image_guidance_scale=2.0)
    with pytest.raises(VugenError, match="no pipeline at"):
        VugenPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(VugenError, match="trust_remote_code"):
        VugenPipeline.from_pretrained(tmp_path, trust_remote_code=True)
