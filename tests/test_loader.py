"""The stream: exact, seeded, resumable, and unafraid of damage."""

import errno
import io
import multiprocessing
import os
import pickle
import resource
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_images import jpeg_of_size, png_of_size

from vugen_cli.data.loader import (
    Batch,
    Damaged,
    DamageLimit,
    ShardedImages,
    TrainingStream,
    _raised,
    batches,
    decode_latents,
    decode_stored,
)
from vugen_cli.data.manifest import read_manifest, write_manifest
from vugen_cli.data.order import StreamOrder, stream_count
from vugen_cli.data.sample import Sample
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.nano.scenes import OpenMojiScenes


def take(stream: TrainingStream, count: int, workers: int = 0) -> list[Batch]:
    return list(islice(batches(stream, workers), count))


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and a.captions == b.captions


def epochs(order: StreamOrder, stream: int, count: int = 2) -> list[list[tuple[int, int, int]]]:
    length = order.length(stream)
    return [[order.at(stream, e * length + i) for i in range(length)] for e in range(count)]


@pytest.mark.parametrize(
    ("counts", "window", "streams"),
    [
        ([7, 3, 12, 1], 5, 1),
        ([4], 100, 1),
        ([5, 5], 1, 1),
        ([7, 3, 12, 1], 5, 4),
        ([23], 8, 5),
        ([1] * 9, 3, 2),
    ],
)
def test_every_sample_comes_once_an_epoch_of_one_stream_and_epochs_differ(
    counts: list[int], window: int, streams: int
) -> None:
    """More streams than shards, fewer, unequal shards, shards that two streams share."""
    order = StreamOrder(np.array(counts), seed=3, window=window, streams=streams)
    lengths = [order.length(k) for k in range(streams)]
    assert sum(lengths) == sum(counts) and max(lengths) - min(lengths) <= 1
    first, second = ([place for k in range(streams) for place in epochs(order, k)[e]] for e in range(2))
    for e, epoch in enumerate((first, second)):
        assert Counter(epoch) == Counter((e, s, i) for s, c in enumerate(counts) for i in range(c))
    assert [x[1:] for x in first] != [x[1:] for x in second]


def test_a_stream_keeps_to_its_shards_over_epochs_and_shuffles_them() -> None:
    order = StreamOrder(np.full(64, 50), seed=0, window=100, streams=8)
    for stream in range(8):
        for epoch in epochs(order, stream):
            assert {shard for _, shard, _ in epoch} == set(range(8 * stream, 8 * stream + 8))
    places = epochs(order, 0, 1)[0]
    assert (
        len({shard for _, shard, _ in places[:50]}) == 1
    )  # a window of 100 over 8 streams is one shard each
    assert [i for _, _, i in places[:50]] != list(range(50))


def test_one_shard_is_shuffled_as_a_whole_and_shared_out() -> None:
    order = StreamOrder(np.array([64_000]), seed=0, window=10_000, streams=64)
    assert stream_count(512, 64_000) == 64
    assert {i for _, _, i in epochs(order, 5, 1)[0]} == set(range(5000, 6000))


@pytest.mark.parametrize(
    ("rows", "samples", "streams"),
    [(512, 10**8, 64), (384, 10**8, 64), (48, 10**8, 48), (100, 10**8, 50), (64, 40_000, 32), (64, 96, 1)],
)
def test_streams_divide_the_batch_and_are_not_short(rows: int, samples: int, streams: int) -> None:
    assert stream_count(rows, samples) == streams


def many_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let data sets as small as ours have several streams."""
    monkeypatch.setattr("vugen_cli.data.order.LEAST", 10)


@pytest.mark.parametrize(
    ("ranks", "accumulate", "workers"), [(1, 1, 3), (2, 1, 0), (4, 1, 0), (2, 2, 2), (1, 4, 0)]
)
def test_a_batch_holds_the_same_whoever_computes_its_rows(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, accumulate: int, workers: int
) -> None:
    many_streams(monkeypatch)
    images = ShardedImages(scenes)
    whole = take(TrainingStream(images, 8, seed=1, window=30), 4)
    assert images.order(1, 30, 8).streams == 8
    parts = [
        take(
            TrainingStream(images, 8, seed=1, window=30, part=(r, ranks), accumulate=accumulate),
            4 * accumulate,
            workers,
        )
        for r in range(ranks)
    ]
    for step, batch in enumerate(whole):
        mine = [p for part in parts for p in part[step * accumulate : (step + 1) * accumulate]]
        assert torch.equal(batch.images, torch.cat([p.images for p in mine]))
        assert batch.captions == [caption for p in mine for caption in p.captions]


def test_a_reader_opens_only_its_own_streams_shards(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_streams(monkeypatch)
    for part in range(4):  # 4 shards of 24, 8 streams of 12
        images = ShardedImages(scenes)
        seen = {
            shard
            for b in take(TrainingStream(images, 8, seed=1, part=(part, 4)), 30)
            for shard in images._open
        }
        assert seen == {part}


def test_no_tar_is_listed_where_there_is_an_index(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vugen_cli.data.index.list_members", lambda tar: pytest.fail(f"listed {tar}"))
    assert len(take(TrainingStream(ShardedImages(scenes), 96, seed=1), 1)[0].captions) == 96


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\x93NUMPY\x01\x00v\x00{'descr'"])
@pytest.mark.parametrize("writable", [True, False])
def test_an_index_that_is_missing_or_damaged_is_made_and_kept(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, writable: bool
) -> None:
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    expected = take(TrainingStream(ShardedImages(copy), 96, seed=1), 1)[0]
    index = copy / "train-000001.index.npy"
    before = index.read_bytes()
    index.unlink()
    if content is not None:
        index.write_bytes(content)
    if not writable:  # as for a user who may only read
        monkeypatch.setattr("vugen_cli.data.index.index_path", lambda tar: Path("/proc/none.npy"))
    assert same(take(TrainingStream(ShardedImages(copy), 96, seed=1), 1)[0], expected)
    kept = [index] if writable else list((tmp_path / "cache" / "shards").glob("*.npy"))
    assert before in [path.read_bytes() for path in kept]


def test_captions_are_tokenised_in_the_workers(scenes: Path) -> None:
    stream = TrainingStream(ShardedImages(scenes), 4, seed=0, tokenize=letters)
    for batch in [*take(stream, 2), *take(stream, 2, workers=2)]:
        assert batch.tokens == [letters(caption)[0] for caption in batch.captions]
        assert batch.cut == sum(len(caption) > 20 for caption in batch.captions)
    assert take(TrainingStream(ShardedImages(scenes), 4, seed=0), 1)[0].tokens is None


def letters(text: str) -> tuple[list[int], bool]:
    return list(text.encode()[:20]), len(text) > 20


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


def test_a_foreign_fact_named_sources_is_no_picture(tmp_path: Path) -> None:
    class Foreign(OpenMojiScenes):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return replace(sample, meta={**sample.meta, "sources": ["https://example.org/1"]})

    write_dataset(Foreign(8, "train", 16), tmp_path, size=16)
    images = ShardedImages(tmp_path)
    assert "sources" not in images.read(0, 0)[1]
    (batch,) = islice(TrainingStream(images, 8, seed=0, flip=True, sources=True), 1)
    assert batch.sources == [[]] * 8 and not batch.corrupt


def test_what_edits_are_made_from_goes_to_another_process_as_one_tensor() -> None:
    def picture(height: int, width: int) -> torch.Tensor:
        return torch.randint(256, (3, height, width), dtype=torch.uint8)

    images, captions = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), ["a", "b", "c", "d"]
    rows = [[picture(8, 8)], [], [picture(4, 6), picture(8, 8)], []]
    tensors = Counter[type]()

    class Counting(pickle.Pickler):
        def persistent_id(self, thing: object) -> None:
            tensors[type(thing)] += 1

    for sources in (rows, [[], [], [], []], None):
        file = io.BytesIO()
        tensors.clear()
        Counting(file).dump(Batch(images, captions, [{}] * 4, 0, sources=sources))
        assert tensors[torch.Tensor] <= 2, "the images and all sources"
        again = pickle.loads(file.getvalue()).sources
        assert (again is None) == (sources is None)
        for before, after in zip(sources or [], again or [], strict=True):
            assert len(before) == len(after) and all(map(torch.equal, before, after))


def test_a_truncated_shard_gives_what_is_left_of_it(copy: Path) -> None:
    shard = copy / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    seen = take(TrainingStream(ShardedImages(copy), 96, seed=0), 1)[0]
    assert 5 < seen.corrupt < 20


def test_stand_ins_are_drawn_at_random(copy: Path) -> None:
    """A quarter of the samples is gone, and no other one takes all their places."""
    (copy / "train-000002.tar").write_bytes(b"")
    batch = take(TrainingStream(ShardedImages(copy), 96, seed=0), 1)[0]
    assert batch.corrupt == 24
    assert max(Counter(str(meta["source_key"]) for meta in batch.meta).values()) <= 4
    again = take(TrainingStream(ShardedImages(copy), 96, seed=0), 1)[0]
    assert same(batch, again)


def test_a_set_without_a_readable_sample_says_so_in_workers_too(copy: Path) -> None:
    for shard in copy.glob("train-*.tar"):
        shard.write_bytes(bytes(1024))
    for workers in (0, 1):
        with pytest.raises(VugenError, match=r"^no readable sample in [^\n]*train-00000\d\.tar[^\n]*$"):
            take(TrainingStream(ShardedImages(copy), 2, seed=0), 1, workers)


def test_workers_start_at_once_in_a_group_of_their_own(scenes: Path) -> None:
    """Signals to the run's group, as Ctrl-C sends, do not reach them."""
    before = set(multiprocessing.active_children())
    stream = batches(TrainingStream(ShardedImages(scenes), 4, seed=0), 1)
    (worker,) = set(multiprocessing.active_children()) - before
    assert os.getpgid(worker.pid or 0) != os.getpgrp()
    next(stream)


def test_a_worker_that_is_killed_is_one_line() -> None:
    def loader() -> Iterator[Batch]:
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
        yield

    with pytest.raises(VugenError, match=r"fewer data\.workers"):
        next(_raised(loader()))


class Unsendable:
    """As a batch is for which /dev/shm has no room."""

    def __reduce__(self) -> str:
        raise RuntimeError("unable to allocate shared memory(shm)")


class OneUnsendable(torch.utils.data.IterableDataset[Unsendable]):
    def __iter__(self) -> Iterator[Unsendable]:
        yield Unsendable()


def test_a_batch_that_a_worker_cannot_send_ends_the_run() -> None:
    with pytest.raises(VugenError, match="a decoding process died.*shm-size"):
        next(batches(OneUnsendable(), 1))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.ENOENT])
def test_errors_of_the_environment_are_tried_again_and_then_end_the_run(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    images, failures = ShardedImages(scenes), [2]
    pread = os.pread

    def failing(*arguments: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(number, os.strerror(number))
        return pread(*arguments)

    monkeypatch.setattr("os.pread", failing)
    assert images.read(0, 0)[1]["captions"] and failures == [0]
    failures[0] = 1000
    with pytest.raises(VugenError, match=f"cannot read train-000000.tar .*{os.strerror(number)}"):
        take(TrainingStream(images, 96, seed=0), 1)


def test_too_many_open_shards_are_closed_and_opened_again(
    scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    images = ShardedImages(scenes)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, hard))
        batch = take(TrainingStream(images, 96, seed=0), 1)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert batch.corrupt == 0


def test_fuzzed_members_are_counted_and_never_crash(copy: Path) -> None:
    """Bytes of every kind of member are overwritten, with junk and with what decoders trip over."""
    random = np.random.default_rng(0)
    path = copy / "train-000000.tar"
    whole = path.read_bytes()
    index = np.load(copy / "train-000000.index.npy")
    images = ShardedImages(copy)
    traps = [
        b"",
        b"[]",
        b"[1]",
        b'"a"',
        b"{",
        b"[" * 5000,
        b"\xff\xfe",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
    ]
    damaged = 0
    for _ in range(300):
        data = bytearray(whole)
        sample = int(random.integers(len(index)))
        offset, size = index[sample][random.integers(3)]
        if random.random() < 0.3:
            trap = traps[random.integers(len(traps))][:size]
            data[offset : offset + size] = trap + bytes(size - len(trap))
        else:
            for _ in range(int(random.integers(1, 8))):
                data[offset + random.integers(min(size, 64))] = random.integers(256)
        path.write_bytes(data)
        images._open.clear()
        try:
            pixels, meta = images.read(0, sample)
            assert pixels.shape == (64, 64, 3) and isinstance(meta["captions"], list)
        except Damaged:
            damaged += 1
    assert damaged > 100


@pytest.mark.parametrize("side", [32, 65_000])
@pytest.mark.parametrize("make", [png_of_size, jpeg_of_size])
def test_pictures_of_another_size_are_damage_and_not_decoded(
    side: int, make: Callable[[int, int], bytes]
) -> None:
    with pytest.raises(Exception, match=f"{side}x{side} pixels, not 64x64|exceeds limit"):
        decode_stored(make(side, side), 64)


def test_latents_are_checked_before_they_are_allocated() -> None:
    stored = io.BytesIO()
    np.save(stored, np.ones((1, 2, 2, 4), np.float16))
    assert decode_latents(stored.getvalue(), (1, 2, 2, 4)).sum() == 16
    huge = stored.getvalue().replace(b"(1, 2, 2, 4)", b"(9999999999)")
    for data in (huge, stored.getvalue()[:-1], b"", stored.getvalue().replace(b"<f2", b"|O8")):
        with pytest.raises(ValueError, match="latents|buffer|magic|shape"):
            decode_latents(data, (1, 2, 2, 4))


def test_more_damage_than_allowed_ends_a_run() -> None:
    limit, few = DamageLimit(0.1), DamageLimit(0.1)
    for corrupt in [4] * 1000 + [32] * 10 + [0] * 200:  # 6%, a bad shard, none
        limit.add(corrupt, 64)
    with pytest.raises(VugenError, match=r"1\d\d\d of the last 10048 samples .* data\.max_corrupt=0\.1"):
        deque(limit.add(7, 64) for _ in range(157))
    with pytest.raises(VugenError, match=r"1001 of the last 1001 samples"):  # at once where all are damaged
        deque(few.add(1, 1) for _ in range(1001))


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
    write_dataset(OpenMojiScenes(36, "train", 32), tmp_path, "train", 32, shard_size=24)
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
    split = manifest.splits["train"]
    shard = split.shards[0]
    split.shards = [replace(shard, name=f"{number}.tar") for number in range(40)]  # more than are kept open
    for copy in split.shards:
        (tmp_path / copy.name).symlink_to((scenes / shard.name).resolve())
    write_manifest(tmp_path, manifest)
    images = ShardedImages(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(40), *range(40)]:  # the second time by their indexes, which hold no file open
        images.read(number, 0)
    assert len(os.listdir("/proc/self/fd")) - before <= images.keep_open
