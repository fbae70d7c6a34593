"""Data sets given by address: the same stream, each shard fetched once and verified."""

import errno
import functools
import hashlib
import json
import os
import shutil
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import make_card, tiny_overrides
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.commands.options import data_of
from vugen_cli.data import remote
from vugen_cli.data.loader import Damaged, ShardedImages, TrainingStream, batches
from vugen_cli.data.manifest import read_manifest, write_manifest
from vugen_cli.data.remote import open_shard, patiently
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Recipe

asked: Counter[str] = Counter()


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        asked[self.path] += 1
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def copy(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(scenes, tmp_path / "copy"))


@contextmanager
def serving(folder: Path, handler: type[Handler] = Handler) -> Iterator[str]:
    asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def address(copy: Path) -> Iterator[str]:
    with serving(copy) as address:
        yield address


def same_as(path: Path, images: ShardedImages, workers: int = 0) -> bool:
    local = islice(TrainingStream(ShardedImages(path), 8, seed=1), 12)
    remote = islice(batches(TrainingStream(images, 8, seed=1), workers), 12)
    pairs = list(zip(local, remote, strict=True))
    return all(torch.equal(a.images, b.images) and a.captions == b.captions for a, b in pairs)


def test_a_web_server_gives_the_same_stream_and_each_shard_once(copy: Path, address: str) -> None:
    assert same_as(copy, ShardedImages(address))
    # Then in workers, which find every shard there: one stopped while it fetches would leave a second try.
    assert same_as(copy, ShardedImages(address), workers=2)
    shards = {path: times for path, times in asked.items() if path.endswith(".tar")}
    assert len(shards) == 4 and set(shards.values()) == {1}


def test_fsspec_gives_the_same_stream(copy: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(copy), "/scenes", recursive=True)
    for base in ("memory://scenes", f"file://{copy}"):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert same_as(copy, ShardedImages(base))


def test_several_at_once_fetch_a_shard_once(copy: Path, address: str) -> None:
    images = ShardedImages(address)
    with ThreadPoolExecutor(6) as pool:
        files = list(pool.map(lambda _: open_shard(address, images.shard(0), images.cache), range(6)))
    assert asked["/train-000000.tar"] == 1
    assert {file.read() for file in files} == {(copy / "train-000000.tar").read_bytes()}


def test_what_cannot_be_had_is_one_line_and_leaves_nothing(copy: Path, address: str, tmp_path: Path) -> None:
    images = ShardedImages(address)
    (copy / images.names[0]).write_bytes(b"other bytes".ljust(int(images.lengths[0])))
    with pytest.raises(VugenError, match="is not what its dataset.json notes"):
        images.read(0, 0)
    (copy / images.names[1]).unlink()
    with pytest.raises(VugenError, match=r"cannot get train-000001\.tar .*404"):
        images.read(1, 0)
    assert not list((tmp_path / "cache" / "shards").glob("*.tar"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        started = time.monotonic()
        with pytest.raises(VugenError, match="cannot get"):
            ShardedImages(f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert time.monotonic() - started < 5


def test_a_manifest_cannot_name_a_file_outside_its_data_set(copy: Path) -> None:
    manifest = json.loads((copy / "dataset.json").read_text())
    for name in (
        "../secret.tar",
        "a;touch b.tar",
        "$(touch b).tar",
        "-rf.tar",
    ):  # a far shell would run these
        manifest["splits"]["train"]["shards"][0]["name"] = name
        (copy / "dataset.json").write_text(json.dumps(manifest))
        with pytest.raises(VugenError, match="no plain file name"):
            ShardedImages(f"file://{copy}")


@pytest.mark.parametrize("address", ["https://example.org/x", "s3://bucket/x", "file:///etc", "any://x"])
def test_an_address_that_only_a_checkpoint_names_is_not_opened(address: str) -> None:
    mixture = {"data": {"mixture": [{"path": address}]}}
    data = {"path": "/here", "dataset": "folder", "size": 64, "counts": {}}
    cards = [make_card(data=data | named) for named in ({"path": address}, {"mixture": [{"path": address}]})]
    harmless = make_card(data=data)
    for card in cards:
        with pytest.raises(VugenError, match="not opened unless you give it"):
            data_of(Recipe(), None, card, own_recipe=True)
    with pytest.raises(VugenError, match="not opened unless you give it"):
        data_of(Recipe.model_validate(mixture), None, harmless, own_recipe=False)
    assert data_of(Recipe.model_validate(mixture), None, harmless, own_recipe=True) is None
    assert data_of(Recipe(), address, cards[0]) == address
    assert data_of(Recipe(), None, harmless) == "/here"


def test_a_path_is_never_an_address(tmp_path: Path) -> None:
    """A checkpoint's data is opened as a Path by scores: a stranger's must not lead elsewhere."""
    with pytest.raises(VugenError, match="no data set at memory:/x"):
        ShardedImages(Path("memory://x"))


class Unreliable(Handler):
    """Fails as `failures` says, by the number of the request: a status, `reset`, `short` or `damaged`."""

    failures: ClassVar[dict[int, int | str]] = {}
    requests: ClassVar[Iterator[int]] = count()

    def do_GET(self) -> None:
        how = self.failures.get(next(self.requests))
        if isinstance(how, int):
            self.send_error(how)
        elif how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif how in ("short", "damaged"):
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:1000])
            if how == "damaged":
                self.wfile.write(bytes(byte ^ 1 for byte in data[1000:]))
        else:
            super().do_GET()


@pytest.fixture
def unreliable(copy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    Unreliable.requests, Unreliable.failures = count(), {}
    with serving(copy, Unreliable) as address:
        yield address


@pytest.mark.parametrize("how", [503, 429, 500, "reset", "short"])
def test_what_fails_in_passing_is_asked_for_again(copy: Path, unreliable: str, how: int | str) -> None:
    # Of the manifest only a failed request can be told: a short one has no hash to tell it by.
    Unreliable.failures = {0: 503 if how == "short" else how, 2: how, 3: how}
    images = ShardedImages(unreliable)
    assert np.array_equal(images.read(0, 0)[0], ShardedImages(copy).read(0, 0)[0])
    assert next(Unreliable.requests) == 5


def test_a_shard_that_was_damaged_on_the_way_is_fetched_once_more(copy: Path, unreliable: str) -> None:
    Unreliable.failures = {1: "damaged"}
    assert np.array_equal(ShardedImages(unreliable).read(0, 0)[0], ShardedImages(copy).read(0, 0)[0])
    assert next(Unreliable.requests) == 3


@pytest.mark.parametrize(("how", "asked"), [(404, 2), (403, 2), (503, 1 + remote.TRIES)])
def test_what_fails_for_good_is_one_line(unreliable: str, how: int, asked: int) -> None:
    images = ShardedImages(unreliable)
    Unreliable.failures = dict.fromkeys(range(1, 100), how)
    with pytest.raises(VugenError, match=f"cannot get train-000000.tar of {unreliable}: .*{how}"):
        images.read(0, 0)
    assert next(Unreliable.requests) == asked


class Endless:
    """What a server sends that does not stop."""

    def read(self, count: int) -> bytes:
        return b" " * count


def test_what_does_not_end_is_not_read_to_the_end(
    copy: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ShardedImages(address)
    monkeypatch.setattr(remote, "LARGEST", 1000)
    monkeypatch.setattr(remote, "opened", lambda base, name: nullcontext(Endless()))
    with pytest.raises(VugenError, match="longer than the .* bytes that its dataset.json notes"):
        images.read(0, 0)
    with pytest.raises(VugenError, match=r"dataset\.json .* is longer than"):
        ShardedImages(address)


def test_a_file_system_without_locks_holds_a_cache(
    copy: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refused)
    images = ShardedImages(address)
    images.cache.mkdir(parents=True)
    of_another = images.cache / f".{images.shard(0).sha256}.tar.abcd.tar"
    of_another.write_bytes(b"on its way")
    assert np.array_equal(images.read(0, 0)[0], ShardedImages(copy).read(0, 0)[0])
    assert of_another.exists()  # nothing tells whether the process that fetches it is gone


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for _ in range(2):
        with pytest.raises(VugenError):
            patiently("it", lambda: (_ for _ in ()).throw(ConnectionResetError()), 8)
    assert len(pauses) == 14 and pauses[:7] != pauses[7:]
    assert all(0.25 * 2**i <= pauses[i] <= 0.75 * 2**i for i in range(7))


def test_the_next_shards_are_fetched_ahead(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = iter(TrainingStream(ShardedImages(address), 2, seed=1, window=24))
    next(stream)
    deadline = time.monotonic() + 10
    while len(shards_asked()) < 2:  # that of the batch, and that of the window after it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(shards_asked()) == 2


def shards_asked() -> set[str]:
    return {path for path in asked if path.endswith(".tar")}


def test_a_reader_fetches_only_its_own_shards(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vugen_cli.data.order.LEAST", 10)
    stream = iter(TrainingStream(ShardedImages(address), 8, seed=1, part=(2, 4)))
    for _ in range(30):
        next(stream)
    assert shards_asked() == {"/train-000002.tar"}


def test_the_cache_keeps_to_its_size_and_what_was_read_last(
    copy: Path, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = ShardedImages(address)
    images.keep_open = 1
    monkeypatch.setenv("VUGEN_CACHE_GB", str(2.5 * max(images.lengths) / 1e9))
    for number, shard in enumerate((0, 1, 0, 2)):
        images.read(shard, 0)
        path = remote.cached_path(images.shard(shard), images.cache)
        os.utime(path, (number, number))  # the clock of a file system is too coarse for this test
    kept = {path.stem for path in images.cache.glob("*.tar")}
    assert kept == {images.shard(0).sha256, images.shard(2).sha256}
    assert {path.name.partition(".")[0] for path in images.cache.glob("*.npy")} == kept
    assert same_as(copy, images)  # from a cache that is smaller than what is being read
    monkeypatch.setenv("VUGEN_CACHE_GB", "much")
    with pytest.raises(VugenError, match="VUGEN_CACHE_GB=much"):
        remote.make_room(images.cache, 1)


@pytest.mark.parametrize(("total", "free"), [(10**13, 4 * 10**11), (10**12, 10**11)])
def test_a_disk_that_others_fill_is_not_made_room_on_for_nothing(
    copy: Path, address: str, monkeypatch: pytest.MonkeyPatch, total: int, free: int
) -> None:
    usage = shutil.disk_usage(copy)._replace(total=total, free=free)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage)
    assert same_as(copy, ShardedImages(address))
    assert {times for path, times in asked.items() if path.endswith(".tar")} == {1}


def test_a_disk_that_is_full_keeps_what_was_read_last(
    copy: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ShardedImages(address)
    images.keep_open = 1
    usage = shutil.disk_usage(copy)._replace(total=10**12, free=20 * 10**9)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage)
    for shard in (0, 1):
        images.read(shard, 0)
    assert [path.stem for path in images.cache.glob("*.tar")] == [images.shard(1).sha256]


def test_processes_share_a_cache_that_is_too_small_for_them(
    copy: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ShardedImages(address)
    monkeypatch.setenv("VUGEN_CACHE_GB", str(1.5 * max(images.lengths) / 1e9))
    assert same_as(copy, images, workers=3)


def test_what_a_killed_process_left_is_removed(address: str) -> None:
    images = ShardedImages(address)
    images.cache.mkdir(parents=True)
    left = images.cache / f".{images.shard(0).sha256}.tar.abcd.tar"
    left.write_bytes(b"half")
    images.read(0, 0)
    assert not left.exists()


def test_a_stage_trains_and_shows_previews_from_afar(address: str, vlm_path: Path, tmp_path: Path) -> None:
    options = [p for o in tiny_overrides(vlm_path) for p in ("--set", o)]
    words = ["train-reducer", "--data", address, "--out", str(tmp_path / "r.safetensors"), "--steps", "2"]
    result = CliRunner().invoke(app, [*words, *options])
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "r.run/preview-0000002.png").is_file()


@pytest.mark.slow
def test_a_stage_trains_from_a_server_that_fails_every_tenth_time_and_damaged_data(
    copy: Path, vlm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data has a shard cut short and a damaged picture; the counts are what they are."""
    manifest = read_manifest(copy)
    for shard, damage in ((1, lambda data: data[: len(data) * 3 // 4]), (2, spoil)):
        path = copy / f"train-00000{shard}.tar"
        path.write_bytes(damage(path.read_bytes()))
        facts = manifest.splits["train"].shards[shard]
        facts.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        facts.bytes = path.stat().st_size
    write_manifest(copy, manifest)
    lost = sum(not readable(ShardedImages(copy), n) for n in range(96))
    assert 5 <= lost <= 9
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    Unreliable.requests, Unreliable.failures = count(1), dict.fromkeys(range(0, 10000, 10), 503)
    options = [p for o in [*tiny_overrides(vlm_path), "data.workers=1"] for p in ("--set", o)]
    with serving(copy, Unreliable) as address:
        words = ["train-reducer", "--data", address, "--out", str(tmp_path / "r.safetensors")]
        result = CliRunner().invoke(app, [*words, *options, "--steps", "24"])
    assert result.exit_code == 0, result.exception
    rows = [json.loads(line) for line in (tmp_path / "r.run/metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("corrupt", 0) for row in rows) == lost


def spoil(data: bytes) -> bytes:
    at = data.index(b"\x89PNG")
    return data[:at] + bytes(64) + data[at + 64 :]


def readable(images: ShardedImages, number: int) -> bool:
    try:
        return bool(images.read(*divmod(number, 24)))
    except Damaged:
        return False


def test_an_error_in_a_worker_is_one_line(
    copy: Path, vlm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in copy.glob("train-*.tar"):
        path.write_bytes(bytes(10_240))
    options = [p for o in [*tiny_overrides(vlm_path), "data.workers=1"] for p in ("--set", o)]
    words = ["train-vae", "--data", str(copy), "--out", str(tmp_path / "vae")]
    result = CliRunner().invoke(app, [*words, *options])
    assert isinstance(result.exception, VugenError) and "\n" not in str(result.exception)
