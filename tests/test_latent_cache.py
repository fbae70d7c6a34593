"""Latent caches: what live encoding gives, made once, and refused where they do not belong."""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_overrides, vugen_here

from vugen_cli.checkpoint import read_card
from vugen_cli.data.loader import ShardedImages, TrainingStream, batches
from vugen_cli.data.manifest import read_skipped
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.recipe import Recipe, load_recipe
from vugen_cli.sampling.trained import load_autoencoder
from vugen_cli.stages.latent_cache import write_latents
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.vlm.frozen import FrozenVLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(trained: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "latents"
    write_latents(trained / "reducer.safetensors", scenes, out, CPU, flip=True)
    return out


def losses(out: Path) -> list[float]:
    lines = (out.with_suffix(".run") / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def with_flip(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"flip": True})})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_streams_the_same_samples_as_its_images_mirrored_ones_included(
    cache: Path, scenes: Path, trained: Path, vlm: FrozenVLM, workers: int
) -> None:
    autoencoder, _, _ = load_autoencoder(trained / "reducer.safetensors", CPU)
    live = TrainingStream(ShardedImages(scenes), 6, seed=2, window=30, flip=True)
    cached = TrainingStream(ShardedImages(cache, latents=True), 6, seed=2, window=30, flip=True)
    for a, b in islice(zip(live, batches(cached, workers), strict=False), 20):
        assert a.captions == b.captions and [m["source_key"] for m in a.meta] == [
            m["source_key"] for m in b.meta
        ]
        with torch.no_grad():
            z = autoencoder.encode(vlm, a.images)
        assert torch.allclose(z, b.images.float(), atol=1e-3, rtol=1e-3)


def test_training_on_a_cache_never_encodes_and_has_the_losses_of_live_encoding(
    cache: Path,
    scenes: Path,
    trained: Path,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, reducer = with_flip(tiny_recipe), trained / "reducer.safetensors"
    train_sampler(recipe, reducer, scenes, tmp_path / "live.safetensors", CPU)

    def refuse(*_: object) -> None:
        raise AssertionError("the vision encoder ran")

    monkeypatch.setattr(FrozenVLM, "encode", refuse)
    train_sampler(recipe, reducer, cache, tmp_path / "cached.safetensors", CPU)
    live, cached = losses(tmp_path / "live.safetensors"), losses(tmp_path / "cached.safetensors")
    assert len(live) == 4 and live == pytest.approx(cached, rel=2e-3)
    assert read_card(tmp_path / "cached.safetensors").data.path == str(scenes)


def test_a_cache_serves_any_words_and_those_of_earlier_versions_bring_none(
    cache: Path, trained: Path, vlm_path: Path, tmp_path: Path
) -> None:
    """Another tokenizer, template or instruction reads the captions anew."""
    manifest = json.loads((cache / "dataset.json").read_text())
    earlier = Path(shutil.copytree(cache, tmp_path / "earlier"))
    words = {"instruction": "{prompt}", "prompt_tokens": 128}
    (earlier / "dataset.json").write_text(json.dumps({**manifest, "latents": manifest["latents"] | words}))
    recipe = load_recipe(None, [*tiny_overrides(vlm_path), "instruction=Draw {prompt}"])
    found = []
    for data in (cache, earlier):
        out = tmp_path / f"{data.name}.safetensors"
        train_sampler(recipe, trained / "reducer.safetensors", data, out, CPU)
        found.append(losses(out))
    assert found[0] == found[1] and len(found[0]) == 4


def test_the_same_bytes_after_an_interruption_and_from_worker_processes_that_decode(
    cache: Path, scenes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    (copy / "dataset.json").unlink()
    (copy / "train-000001.tar").unlink()
    (copy / ".progress" / "train-000002.tar.json").unlink()
    monkeypatch.setattr(ShardedImages, "read", None)  # in this process, not in theirs
    write_latents(trained / "reducer.safetensors", scenes, copy, CPU, flip=True, workers=2)
    for file in [*cache.glob("*.tar"), cache / "dataset.json"]:
        assert file.read_bytes() == (copy / file.name).read_bytes()


def test_a_set_of_held_out_pictures_alone_can_be_cached(trained: Path, tmp_path: Path) -> None:
    write_dataset(OpenMojiScenes(4, "val", 64), tmp_path / "val", "val", 64)
    made = write_latents(trained / "reducer.safetensors", tmp_path / "val", tmp_path / "latents", CPU)
    assert list(made.splits) == ["val"] and made.splits["val"].count == 4


def test_a_damaged_image_is_replaced_as_it_is_without_a_cache(
    scenes: Path, trained: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(scenes, tmp_path / "copy"))
    data = bytearray((copy / "train-000000.tar").read_bytes())
    start = data.index(b"\x89PNG")
    data[start : start + 64] = bytes(64)
    (copy / "train-000000.tar").write_bytes(data)
    manifest = write_latents(trained / "reducer.safetensors", copy, tmp_path / "latents", CPU)
    (damaged,) = read_skipped(tmp_path / "latents", "train")
    assert manifest.splits["train"].skipped_count == 1 and damaged.key.startswith("train-000000.tar/")
    live = next(iter(TrainingStream(ShardedImages(copy), 96, seed=0)))
    cached = next(iter(TrainingStream(ShardedImages(tmp_path / "latents", latents=True), 96, seed=0)))
    assert live.corrupt == cached.corrupt == 1 and live.captions == cached.captions


def test_a_shard_of_which_little_can_be_read_is_refused_and_written_once_it_is_whole(
    scenes: Path, trained: Path, tmp_path: Path
) -> None:
    copy, out = Path(shutil.copytree(scenes, tmp_path / "copy")), tmp_path / "latents"
    whole = (copy / "train-000001.tar").read_bytes()
    (copy / "train-000001.tar").write_bytes(whole[: len(whole) // 2])
    said = r"1\d of 24 pictures of .*/train-000001\.tar are damaged \(.*\), more than data.max_corrupt=0.1"
    with pytest.raises(VugenError, match=said):
        write_latents(trained / "reducer.safetensors", copy, out, CPU)
    assert not (out / "train-000001.tar").exists() and not (out / "dataset.json").exists()
    (copy / "train-000001.tar").write_bytes(whole)
    manifest = write_latents(trained / "reducer.safetensors", copy, out, CPU)
    assert not manifest.splits["train"].skipped_count and not list(out.glob("skipped-*"))


def test_a_cache_is_refused_where_it_does_not_belong(
    cache: Path, scenes: Path, trained: Path, tiny_recipe: Recipe, vlm_path: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    manifest = json.loads((other / "dataset.json").read_text())
    reducer, out = trained / "reducer.safetensors", tmp_path / "x.safetensors"
    for key in ("reducer", "vlm"):
        changed = {**manifest, "latents": {**manifest["latents"], key: "0" * 64}}
        (other / "dataset.json").write_text(json.dumps(changed))
        with pytest.raises(VugenError, match=f"latents of another {key}"):
            train_sampler(tiny_recipe, reducer, other, out, CPU)
    recipe = load_recipe(None, [*tiny_overrides(vlm_path), "vlm_dtype=bfloat16"])
    with pytest.raises(VugenError, match="latents of another vlm_dtype"):
        train_sampler(recipe, reducer, cache, out, CPU)
    with pytest.raises(VugenError, match="only `vugen train-sampler` reads"):
        ShardedImages(cache)
    write_latents(reducer, scenes, tmp_path / "plain", CPU, flip=False)
    with pytest.raises(VugenError, match="no mirrored images"):
        train_sampler(with_flip(tiny_recipe), reducer, tmp_path / "plain", out, CPU)
    with pytest.raises(VugenError, match=r"prepared otherwise \(latents\)"):
        write_latents(reducer, scenes, cache, CPU, flip=False)
    there = scenes.parent / "." / ".." / scenes.parent.name / scenes.name  # the same data, spelled otherwise
    write_latents(reducer, there, tmp_path / "plain", CPU, flip=False)
    told = vugen_here("prepare", "--latents", reducer, "--data", "https://host/set", cwd=tmp_path)
    assert told.returncode == 1 and "latents are made of a data set on disk" in told.stderr
    manifest["splits"].pop("val")
    (other / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(VugenError, match="holds latents, made from another data set: choose another --out"):
        write_dataset(OpenMojiScenes(4, "val"), other, "val")
    with pytest.raises(VugenError, match="already holds shards without latents"):
        write_latents(reducer, scenes, scenes, CPU)


@pytest.mark.parametrize("option", ["--split=val", "--seed=1", "--shard-size=5"])
def test_options_that_would_do_nothing_are_refused(option: str, trained: Path, tmp_path: Path) -> None:
    done = vugen_here("prepare", "--latents", trained / "reducer.safetensors", option, cwd=tmp_path)
    assert done.returncode == 1 and "--latents makes those of a whole data set" in done.stderr


def test_the_command(scenes: Path, trained: Path, tmp_path: Path) -> None:
    done = vugen_here("prepare", "--latents", trained / "reducer.safetensors", "--out", "z", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    z, _ = next(ShardedImages(tmp_path / "z", latents=True).in_order(1))
    assert z.dtype == np.float16 and z.shape[0] == 1
    done = vugen_here("prepare", "--size", "32", cwd=tmp_path)
    assert done.returncode != 0 and "--dataset" in done.stderr and "Traceback" not in done.stderr
