"""dataset.json: read and written through its model, refused in one line, and what cards remember of it."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from vugen_cli.data.loader import ShardedImages, TrainingStream
from vugen_cli.data.manifest import (
    FORMAT,
    SHAPED,
    Manifest,
    Shard,
    Split,
    read_manifest,
    write_manifest,
)
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.recipe import Recipe
from vugen_cli.stages.latent_cache import write_latents
from vugen_cli.stages.train_reducer import train_reducer

SHARD = {"name": "train-000000.tar", "samples": 1, "bytes": 1, "sha256": "0" * 64}


def of(format: int = FORMAT, **shard: Any) -> dict[str, Any]:
    split = {"count": 1, "shards": [SHARD | shard]}
    return {"format": format, "dataset": "x", "size": 8, "splits": {"train": split}}


def test_it_is_written_as_it_was_read(scenes: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, read_manifest(scenes))
    assert (tmp_path / "dataset.json").read_bytes() == (scenes / "dataset.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged"),
        ("\xff", "is damaged"),
        ("[]", "no manifest"),
        ("{}", r"no manifest .*\(format: "),
        (json.dumps(of(format=SHAPED + 1)), "another format"),
        (json.dumps(of(name="../x.tar")), "no plain file name"),
        (json.dumps(of(name="a/x.tar")), "no plain file name"),
        (json.dumps(of(sha256="../../x")), "no manifest"),
        (json.dumps(of(samples=-1)), "no manifest"),
        (json.dumps(of(samples="many")), "no manifest"),
        (json.dumps({**of(), "splits": {"train": 3}}), r"splits\.train"),
        (json.dumps({**of(), "splits": {"train": {"shards": [{"name": "x"}]}}}), r"splits\.train"),
    ],
)
def test_what_is_damaged_or_not_ours_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dataset.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(VugenError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_format_1_is_read_with_its_list_of_skipped_pictures(scenes: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(scenes, tmp_path / "copy"))
    for index in copy.glob("*.npy"):
        index.unlink()
    old = json.loads((copy / "dataset.json").read_text())
    old["format"] = 1
    old["splits"]["train"]["skipped"] = [{"key": "a", "reason": "b"}]
    (copy / "dataset.json").write_text(json.dumps(old))
    batches = [next(iter(TrainingStream(ShardedImages(path), 8, seed=0))) for path in (scenes, copy)]
    assert torch.equal(batches[0].images, batches[1].images)
    with pytest.raises(VugenError, match=f"format 1, this version writes {FORMAT}"):
        write_dataset(OpenMojiScenes(4, "val", 64), copy, "val", 64)


def test_workers_are_sent_little(tmp_path: Path) -> None:
    shards = [Shard(f"train-{i:06d}.tar", 1000, 1, f"{i:064x}") for i in range(10_000)]
    for shard in shards:
        (tmp_path / shard.name).touch()
    split = Split(count=10**7, shards=shards, skipped_count=10**5)
    write_manifest(tmp_path, Manifest(format=FORMAT, dataset="x", size=8, splits={"train": split}))
    stream = TrainingStream(ShardedImages(tmp_path), 64, seed=0)
    assert len(pickle.dumps(stream)) < 100 * len(shards)


def test_cards_tell_data_sets_of_equal_counts_apart(scenes: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(scenes, tmp_path / "copy"))
    first = read_manifest(scenes).card(scenes)
    assert read_manifest(copy).card(copy) == first.model_copy(update={"path": str(copy)})
    moved = write_other(tmp_path / "other")
    other = read_manifest(moved).card(moved)
    assert other.sha256 != first.sha256
    assert other.train_sha256 != first.train_sha256
    hashes = {"sha256": other.sha256, "train_sha256": other.train_sha256}
    assert other == first.model_copy(update={"path": other.path, **hashes})


def write_other(out: Path) -> Path:
    """As `scenes`, of other pictures."""
    write_dataset(OpenMojiScenes(96, "train", 64, seed=5), out, "train", 64, shard_size=24)
    write_dataset(OpenMojiScenes(24, "val", 64, seed=5), out, "val", 64)
    return out


def test_a_run_goes_on_with_the_same_data_elsewhere_and_with_no_other(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = tiny_recipe.model_copy(
        update={"train_reducer": tiny_recipe.train_reducer.model_copy(update={"steps": 5})}
    )
    out, cpu = tmp_path / "r.safetensors", torch.device("cpu")
    with monkeypatch.context() as earlier:  # a version whose cards did not say what the data set holds
        card = ShardedImages.card
        earlier.setattr(ShardedImages, "card", lambda self: card(self).model_copy(update={"sha256": None}))
        train_reducer(tiny_recipe, scenes, out, cpu)
    train_reducer(longer, Path(shutil.copytree(scenes, tmp_path / "copy")), out, cpu)
    with pytest.raises(VugenError, match=r"data\.sha256: "):
        train_reducer(tiny_recipe, write_other(tmp_path / "other"), out, cpu)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_split_that_is_prepared_later_stops_no_run_and_no_cache(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    data, latents, out, cpu = tmp_path / "d", tmp_path / "z", tmp_path / "r.safetensors", torch.device("cpu")
    write_dataset(OpenMojiScenes(32, "train", 64), data, "train", 64)
    with monkeypatch.context() as before:
        if earlier:  # a version that noted one hash, of all splits
            card, none = Manifest.card, {"train_sha256": None}
            before.setattr(Manifest, "card", lambda self, path: card(self, path).model_copy(update=none))
        train_reducer(tiny_recipe, data, out, cpu)
        reducer = shutil.copy(out, tmp_path / "kept.safetensors")
        write_latents(reducer, data, latents, cpu)
    written = (latents / "train-000000.tar").stat().st_mtime_ns
    write_dataset(OpenMojiScenes(8, "val", 64), data, "val", 64)
    settings = tiny_recipe.train_reducer.model_copy(update={"steps": tiny_recipe.train_reducer.steps + 1})
    train_reducer(tiny_recipe.model_copy(update={"train_reducer": settings}), data, out, cpu)
    write_latents(reducer, data, latents, cpu)
    assert {name: split.count for name, split in read_manifest(latents).splits.items()} == {
        "train": 32,
        "val": 8,
    }
    assert (latents / "train-000000.tar").stat().st_mtime_ns == written
