"""Data sets given by address: the same stream, each shard fetched once and verified."""

import functools
import json
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread

import pytest
import torch
from conftest import make_card, tiny_overrides
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.commands.options import data_of
from vugen_cli.data import remote
from vugen_cli.data.loader import ShardedImages, TrainingStream, batches
from vugen_cli.data.remote import fetched
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


@pytest.fixture
def address(copy: Path) -> Iterator[str]:
    asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(copy)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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


def test_fsspec_and_commands_give_the_same_stream(copy: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(copy), "/scenes", recursive=True)
    for base in ("memory://scenes", f"file://{copy}", f"pipe:cat {copy}/{{}}"):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert same_as(copy, ShardedImages(base))


def test_several_at_once_fetch_a_shard_once(copy: Path, address: str) -> None:
    shard = ShardedImages(address).facts[0]
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(lambda _: fetched(address, shard), range(6)))
    assert len(paths) == 1 and asked["/train-000000.tar"] == 1
    assert paths.pop().read_bytes() == (copy / "train-000000.tar").read_bytes()


def test_what_cannot_be_had_is_one_line_and_leaves_nothing(copy: Path, address: str, tmp_path: Path) -> None:
    images = ShardedImages(address)
    (copy / images.names[0]).write_bytes(b"other bytes")
    with pytest.raises(VugenError, match="is not what its dataset.json notes"):
        images.read(0, 0)
    (copy / images.names[1]).unlink()
    with pytest.raises(VugenError, match=r"cannot get train-000001\.tar .*404"):
        images.read(1, 0)
    with pytest.raises(VugenError, match=r"cannot get dataset\.json .*ended with 1"):
        ShardedImages(f"pipe:cat {tmp_path}/nowhere/{{}}")
    with pytest.raises(VugenError, match="damaged"):
        ShardedImages("pipe:echo {}")
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


def test_a_command_that_only_a_checkpoint_names_is_not_run() -> None:
    command = "pipe:touch /tmp/{}"
    mixture = {"data": {"mixture": [{"path": command}]}}
    data = {"path": "x", "dataset": "folder", "size": 64, "counts": {}}
    cards = [make_card(data=data | named) for named in ({"path": command}, {"mixture": [{"path": command}]})]
    harmless = make_card(data=data)
    for card in cards:
        with pytest.raises(VugenError, match="not run unless you give it"):
            data_of(Recipe(), None, card, own_recipe=True)
    with pytest.raises(VugenError, match="not run unless you give it"):
        data_of(Recipe.model_validate(mixture), None, harmless, own_recipe=False)
    assert data_of(Recipe.model_validate(mixture), None, harmless, own_recipe=True) is None
    assert data_of(Recipe(), command, cards[0]) == command


def test_a_path_is_never_a_command(tmp_path: Path) -> None:
    """A checkpoint's data is opened as a Path by scores: a stranger's must not run."""
    with pytest.raises(VugenError, match="no data set at pipe:touch"):
        ShardedImages(Path(f"pipe:touch {tmp_path}/{{}}"))
    assert not any(tmp_path.iterdir())


def test_a_command_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIPE_PATIENCE", 0.3)
    begin = time.monotonic()
    with pytest.raises(VugenError, match="wrote nothing for"):
        ShardedImages("pipe:sleep 30")
    assert time.monotonic() - begin < 10


def test_a_stage_trains_and_shows_previews_from_afar(address: str, vlm_path: Path, tmp_path: Path) -> None:
    options = [p for o in tiny_overrides(vlm_path) for p in ("--set", o)]
    words = ["train-reducer", "--data", address, "--out", str(tmp_path / "r.safetensors"), "--steps", "2"]
    result = CliRunner().invoke(app, [*words, *options])
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "r.run/preview-0000002.png").is_file()
