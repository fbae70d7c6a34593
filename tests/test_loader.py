"""The stream: exact, seeded, resumable, and unafraid of damage."""

import json
import os
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from vugen_cli.data.loader import Batch, ShardedImages, ShuffledOrder, TrainingStream, batches
from vugen_cli.data.manifest import read_manifest
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.nano.scenes import OpenMojiScenes


def take(stream: TrainingStream, count: int, workers: int = 0) -> list[Batch]:
    return list(islice(batches(stream, workers), count))


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and a.captions == b.captions


@pytest.mark.parametrize(("counts", "window"), [([7, 3, 12, 1], 5), ([4], 100), ([5, 5], 1)])
def test_every_sample_comes_once_an_epoch_and_epochs_differ(counts: list[int], window: int) -> None:
    order = ShuffledOrder(np.array(counts), seed=3, window=window)
    epochs = [[order[e * order.total + i] for i in range(order.total)] for e in range(2)]
    for e, epoch in enumerate(epochs):
        assert Counter(epoch) == Counter((e, s, i) for s, c in enumerate(counts) for i in range(c))
    assert [x[1:] for x in epochs[0]] != [x[1:] for x in epochs[1]]


def test_the_stream_does_not_depend_on_workers_and_more_workers_than_shards_do_not_hang(scenes: Path) -> None:
    stream = TrainingStream(ShardedImages(scenes), 5, seed=1, window=30)
    alone, many = take(stream, 7), take(stream, 7, workers=3)
    assert all(same(a, b) for a, b in zip(alone, many, strict=True))


def test_a_stream_resumes_to_the_sample(scenes: Path) -> None:
    images = ShardedImages(scenes)
    whole = take(TrainingStream(images, 5, seed=1, window=30), 30)
    rest = take(TrainingStream(images, 5, seed=1, window=30, start=22), 8)
    assert all(same(a, b) for a, b in zip(whole[22:], rest, strict=True))


def test_another_seed_is_another_order(scenes: Path) -> None:
    images = ShardedImages(scenes)
    assert not same(*(take(TrainingStream(images, 16, seed=s), 1)[0] for s in (0, 1)))


def test_images_and_captions_belong_together(scenes: Path) -> None:
    images = ShardedImages(scenes)
    stored = {tuple(meta["captions"]): pixels for pixels, meta in images.in_order()}
    batch = take(TrainingStream(images, 8, seed=0), 1)[0]
    for image, caption, meta in zip(batch.images, batch.captions, batch.meta, strict=True):
        assert caption in meta["captions"]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), stored[tuple(meta["captions"])])


def test_flipped_images_are_mirrored(scenes: Path) -> None:
    images = ShardedImages(scenes)
    plain = take(TrainingStream(images, 32, seed=0), 1)[0].images
    mixed = take(TrainingStream(images, 32, seed=0, flip=True), 1)[0].images
    kinds = [
        "same" if torch.equal(a, b) else "flipped" if torch.equal(a, b.flip(-1)) else "other"
        for a, b in zip(plain, mixed, strict=True)
    ]
    assert set(kinds) == {"same", "flipped"}


def test_another_size_is_resized(scenes: Path) -> None:
    assert take(TrainingStream(ShardedImages(scenes), 2, seed=0, size=32), 1)[0].images.shape == (
        2,
        3,
        32,
        32,
    )


@pytest.fixture
def copy(scenes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scenes, tmp_path / "copy"))


def test_a_damaged_sample_is_replaced_and_counted(copy: Path) -> None:
    shard = copy / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    start = data.index(b"\x89PNG")
    data[start : start + 64] = bytes(64)
    shard.write_bytes(data)
    seen = take(TrainingStream(ShardedImages(copy), 96, seed=0), 1)[0]
    assert seen.corrupt == 1 and len(seen.images) == 96


def test_a_truncated_shard_gives_what_is_left_of_it(copy: Path) -> None:
    shard = copy / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    seen = take(TrainingStream(ShardedImages(copy), 96, seed=0), 1)[0]
    assert 5 < seen.corrupt < 20


def test_a_set_without_a_readable_sample_says_so(copy: Path) -> None:
    for shard in copy.glob("train-*.tar"):
        shard.write_bytes(bytes(1024))
    with pytest.raises(VugenError, match="no readable sample"):
        take(TrainingStream(ShardedImages(copy), 2, seed=0), 1)


def test_what_is_not_a_data_set_is_explained(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(VugenError, match="no data set at"):
        read_manifest(tmp_path / "none")
    with pytest.raises(VugenError, match=r"no dataset\.json"):
        read_manifest(tmp_path)
    (copy / "train-000002.tar").unlink()
    with pytest.raises(VugenError, match=r"train-000002\.tar .* is missing"):
        ShardedImages(copy)
    with pytest.raises(VugenError, match="no test split"):
        ShardedImages(copy, "test")
    (copy / "dataset.json").write_text("{")
    with pytest.raises(VugenError, match="damaged"):
        read_manifest(copy)


def test_ranks_and_workers_see_every_sample_once_an_epoch_from_fewer_shards_of_different_size(
    tmp_path: Path,
) -> None:
    """Two shards, of 24 and 12 samples, for four readers: none waits, none gets more."""
    ranks = 2
    write_dataset(OpenMojiScenes(36, "train", 32), tmp_path, "train", 32, shard_size=24, progress=False)
    images = ShardedImages(tmp_path)
    seen: list[Counter[str]] = [Counter(), Counter()]
    for rank in range(ranks):
        stream = TrainingStream(images, 6, seed=4, window=10, part=(rank, ranks))
        for number, batch in enumerate(take(stream, 12, workers=2)):
            assert len(batch.captions) == 6 // ranks
            seen[number // 6].update(str(meta["source_key"]) for meta in batch.meta)
    for epoch in seen:
        assert len(epoch) == 36 and set(epoch.values()) == {1}


def test_shards_that_are_let_go_of_are_closed(scenes: Path, tmp_path: Path) -> None:
    manifest = read_manifest(scenes)
    shard = manifest["splits"]["train"]["shards"][0]
    shards = [{**shard, "name": f"{number}.tar"} for number in range(150)]  # far more than are kept open
    for copy in shards:
        (tmp_path / copy["name"]).symlink_to((scenes / shard["name"]).resolve())
    manifest["splits"] = {"train": {"count": 150 * shard["samples"], "shards": shards}}
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    images = ShardedImages(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(150):
        images.read(number, 0)
    assert len(os.listdir("/proc/self/fd")) - before <= 64
