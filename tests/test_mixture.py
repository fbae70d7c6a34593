"""Mixtures: each source as often as its weight, each of its samples once in its own epoch."""

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from vugen_cli.checkpoint import read_card
from vugen_cli.data.loader import ShardedImages, TrainingStream, batches
from vugen_cli.data.mixture import BLOCK, MixedImages, block_shares
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.recipe import MixtureSource, Recipe
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("other") / "few"
    write_dataset(OpenMojiScenes(20, "train", 64, seed=9), out, "train", 64, shard_size=7)
    return out


@pytest.fixture
def mixture(scenes: Path, other: Path) -> list[MixtureSource]:
    return [MixtureSource(path=str(scenes), weight=3), MixtureSource(path=str(other), weight=1)]


@pytest.mark.parametrize("streams", [1, 4])
def test_sources_come_by_weight_and_each_sample_once_in_its_own_epoch(
    mixture: list[MixtureSource], monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    """With four streams, the first set has four of its own and the second, too small for that, two."""
    monkeypatch.setattr("vugen_cli.data.order.LEAST", 1000 if streams == 1 else 10)
    images = MixedImages(mixture)
    order = images.order(5, window=30, batch_size=4)
    assert [order.streams, *(o.streams for o in order.orders)] == ([4, 4, 2] if streams == 4 else [1, 1, 1])
    drawn = [order.at(k, i) for k in range(streams) for i in range(2 * BLOCK)]
    for first, last, size, share in ((0, 4, 96, BLOCK * 3 // 4), (4, 7, 20, BLOCK // 4)):
        mine = [d for d in drawn if first <= d[1] < last]
        assert len(mine) == 2 * share * streams
        for epoch in range(2 * share * streams // size):
            seen = Counter((s, i) for e, s, i in mine if e == epoch)
            assert len(seen) == size and set(seen.values()) == {1}


def test_shares_are_exact_and_follow_the_weights() -> None:
    shares = block_shares([1, 1, 1])
    assert shares.sum() == BLOCK and set(shares) == {341, 342}
    assert list(block_shares([0.5, 1.5])) == [256, 768]


def test_a_mixed_stream_is_the_same_with_workers_when_resumed_and_in_parts(
    mixture: list[MixtureSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vugen_cli.data.order.LEAST", 10)
    images = MixedImages(mixture)
    whole = list(islice(TrainingStream(images, 6, seed=1, window=30), 12))
    rest = list(islice(batches(TrainingStream(images, 6, seed=1, window=30, start=4), 2), 8))
    halves = [list(islice(TrainingStream(images, 6, seed=1, window=30, part=(r, 2)), 12)) for r in range(2)]
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.images, b.images) and a.captions == b.captions
    for a, left, right in zip(whole, *halves, strict=True):
        assert torch.equal(a.images, torch.cat([left.images, right.images]))


def test_what_is_damaged_is_replaced_from_its_own_set(scenes: Path, other: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    (copy / "train-000001.tar").write_bytes(b"")
    images = MixedImages([MixtureSource(path=str(scenes), weight=3), MixtureSource(path=str(copy), weight=1)])
    found = list(islice(TrainingStream(images, 64, seed=0), 16))  # one block
    assert sum(batch.corrupt for batch in found) > 50
    keys = [str(meta["source_key"]) for batch in found for meta in batch.meta]
    assert sum("-9-" in key for key in keys) == BLOCK // 4  # of the seed of the second set


def test_sets_are_read_in_turn_by_weight(mixture: list[MixtureSource]) -> None:
    keys = [str(meta["source_key"]) for _, meta in islice(MixedImages(mixture).in_order(40), 40)]
    assert abs(sum("-9-" in key for key in keys) - 10) <= 1


def test_the_sets_of_a_mixture_share_the_files_that_may_be_open(
    mixture: list[MixtureSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vugen_cli.data.mixture.MOST_OPEN", 4)
    monkeypatch.setattr("vugen_cli.data.order.LEAST", 10)
    images = MixedImages(mixture)
    images.order(5, window=30, batch_size=4)
    assert [part.keep_open for part in images.parts] == [2, 1], "by the shards that each would keep open"


def test_every_sample_of_a_mixture_is_read_from_its_own_set(
    mixture: list[MixtureSource], scenes: Path, other: Path
) -> None:
    images = MixedImages(mixture)
    pixels, meta = images.read(4, 3)
    expected, facts = ShardedImages(other).read(0, 3)
    assert np.array_equal(pixels, expected) and meta == facts
    assert sum(1 for _ in images.in_order()) == 116
    assert len(images.held_out()) == 24 + 20  # the second set has no val split


def test_both_stages_train_on_a_mixture_and_their_cards_name_it(
    mixture: list[MixtureSource], tiny_recipe: Recipe, scenes: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe.model_copy(update={"data": tiny_recipe.data.model_copy(update={"mixture": mixture})})
    cpu = torch.device("cpu")
    reducer = train_reducer(recipe, None, tmp_path / "r.safetensors", cpu)
    card = read_card(train_sampler(recipe, reducer, None, tmp_path / "s.safetensors", cpu)).data
    assert card.path == str(scenes) and card.counts == {"train": 116} and card.sha256
    assert [source["weight"] for source in card.mixture or []] == [3, 1]


def test_a_run_on_a_mixture_goes_on_where_its_sets_have_moved(
    mixture: list[MixtureSource], tiny_recipe: Recipe, scenes: Path, other: Path, tmp_path: Path
) -> None:
    def run(sources: list[MixtureSource], steps: int) -> None:
        data = tiny_recipe.data.model_copy(update={"mixture": sources})
        training = tiny_recipe.train_reducer.model_copy(update={"steps": steps})
        recipe = tiny_recipe.model_copy(update={"data": data, "train_reducer": training})
        train_reducer(recipe, None, tmp_path / "r.safetensors", torch.device("cpu"))

    run(mixture, 2)
    shutil.copytree(other, tmp_path / "moved")
    run([mixture[0], MixtureSource(path=str(tmp_path / "moved"), weight=1)], 3)
    assert read_card(tmp_path / "r.safetensors").step == 3
    with pytest.raises(VugenError, match=r"data\.sha256"):
        run(mixture[::-1], 4)


def test_sets_that_do_not_mix_are_refused(scenes: Path, other: Path, tmp_path: Path) -> None:
    write_dataset(OpenMojiScenes(4, "train", 32), tmp_path / "small", "train", 32)
    with pytest.raises(VugenError, match="different size"):
        MixedImages([MixtureSource(path=str(scenes)), MixtureSource(path=str(tmp_path / "small"))])
    with pytest.raises(VugenError, match="under 1 in 1024"):
        MixedImages([MixtureSource(path=str(scenes)), MixtureSource(path=str(other), weight=1e-5)])
