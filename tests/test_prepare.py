"""The shard writer: what it writes, that its bytes depend on the plan alone, and how it fails."""

import errno
import fcntl
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vugen_cli.commands.prepare import prepare
from vugen_cli.data import writer
from vugen_cli.data.manifest import Manifest, Plan, Skipped, read_manifest, read_skipped, this_tool
from vugen_cli.data.sample import Sample
from vugen_cli.data.shuffle import Shuffled
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import Stopped, VugenError


class Drawn:
    """Pictures drawn from their index; every `bad`-th is no image."""

    name, origin, licence, classes = "drawn", "nowhere", "CC0", ("even", "odd")

    def __init__(self, count: int = 25, bad: int = 0, pause: float = 0.0, turned: bool = False):
        self.count, self.bad, self.pause, self.turned = count, bad, pause, turned

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        time.sleep(self.pause)
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels[::-1] if self.turned else pixels).save(file, "JPEG")
        broken = self.bad and index % self.bad == 0
        return Sample(
            key=f"picture {index}",
            image=b"broken" if broken else file.getvalue(),
            captions=[f"number {index}", "  a second\n caption ", ""],
            meta={"class": self.classes[index % 2]},
        )


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def samples_of(folder: Path, split: str = "train") -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return samples


def write(out: Path, source: Drawn | None = None, **options) -> Manifest:
    settings = {"size": 32, "shard_size": 10} | options
    return write_dataset(Drawn() if source is None else source, out, **settings)


def test_shards_and_manifest(tmp_path):
    manifest = write(tmp_path, Drawn(25, bad=10))
    assert manifest == read_manifest(tmp_path)
    assert manifest.format == 2 and manifest.size == 32 and manifest.classes == ["even", "odd"]
    assert (manifest.dataset, manifest.source, manifest.licence) == ("drawn", "nowhere", "CC0")
    train = manifest.splits["train"]
    assert train.count == 22 and train.skipped_count == 3
    skipped = [json.loads(line) for line in (tmp_path / "skipped-train.jsonl").read_text().splitlines()]
    assert {item["key"] for item in skipped} == {"picture 0", "picture 10", "picture 20"}
    assert all("not an image" in item["reason"] for item in skipped)
    assert train.captions.count == 44 and train.captions.per_image == 2.0
    assert train.captions.words_max == 3 and train.captions.words_mean == 2.5
    shards = [f"train-00000{i}.{kind}" for i in range(3) for kind in ("index.npy", "tar")]
    assert sorted(os.listdir(tmp_path)) == ["dataset.json", "skipped-train.jsonl", *shards]
    for shard in train.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    samples = samples_of(tmp_path)
    assert len(samples) == sum(shard.samples for shard in train.shards) == 22
    for key, members in samples.items():
        assert len(key) == 9 and sorted(members) == ["jpg", "json", "txt"]
        meta = json.loads(members["json"])
        number = int(meta["source_key"].split()[1])
        assert members["txt"].decode() == f"number {number}\na second caption\n"
        assert meta["class"] == ("even", "odd")[number % 2]
        assert (meta["width"], meta["height"], meta["caption_count"]) == (50, 40, 2)
        assert Image.open(io.BytesIO(members["jpg"])).size == (32, 32)


def test_shuffled_by_seed_and_count_is_a_random_subset(tmp_path):
    def keys(name: str, **options) -> list[str]:
        write(tmp_path / name, **options)
        samples = samples_of(tmp_path / name).values()
        return [json.loads(members["json"])["source_key"] for members in samples]

    first, again, other = keys("a"), keys("b"), keys("c", seed=1)
    assert first == again and first != other and sorted(first) == sorted(other)
    some = keys("d", count=7)
    assert some == first[:7]
    assert keys("e", count=1000) == first


def test_webdataset_reads_it(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write(tmp_path)
    stream = webdataset.WebDataset(str(tmp_path / "train-{000000..000002}.tar"), shardshuffle=False)
    samples = list(stream.decode("rgb8").to_tuple("jpg", "txt", "json"))
    assert len(samples) == 25 and samples[0][0].shape == (32, 32, 3) and samples[0][2]["width"] == 50


def test_drawn_pictures_and_small_lossless_ones_are_stored_exactly(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    for number, image in enumerate((Image.fromarray(pixels), file.getvalue())):
        source = [Sample("one", image, ["noise"])]
        out = tmp_path / str(number)
        write_dataset(Listed(source), out, size=32)
        stored = samples_of(out)["000000000"]["png"]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), pixels)
    write_dataset(Listed([Sample("one", file.getvalue(), ["noise"])]), tmp_path / "large", size=256)
    assert "jpg" in samples_of(tmp_path / "large")["000000000"]


@pytest.mark.parametrize(("items", "count"), [(10, None), (10, 4), (5077, None), (5077, 3000), (1100, None)])
def test_every_item_has_one_position(monkeypatch, items, count):
    monkeypatch.setattr("vugen_cli.data.shuffle.WHOLE", 1000)
    order = Shuffled(items, 3, count)
    parts = [order.part(first, first + 700) for first in range(0, len(order), 700)]
    places = np.concatenate(parts)
    assert len(places) == len(order) == min(count or items, items)
    assert len(np.unique(places)) == len(places) and places.min() >= 0 and places.max() < items
    assert not np.array_equal(places, Shuffled(items, 4, count).part(0, items))
    assert len(pickle.dumps(order)) < 200
    if items == 10:  # what earlier versions wrote
        assert np.array_equal(places, np.random.default_rng(3).permutation(10)[:count])


def test_a_large_source_is_read_from_few_places_for_a_shard():
    places = np.sort(Shuffled(10**8, 0).part(5 * 1024, 6 * 1024))
    assert (np.diff(places) > 1).sum() == 15  # 16 runs of 64
    assert np.ptp(places) > 5 * 10**7


class Listed(list):
    """Samples as a source."""

    name, origin, licence, classes = "listed", "nowhere", "CC0", ()


def test_same_bytes_whatever_the_workers(tmp_path):
    write(tmp_path / "one", Drawn(25, bad=7), workers=1)
    write(tmp_path / "two", Drawn(25, bad=7), workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_same_bytes_after_an_interruption(tmp_path, monkeypatch):
    write(tmp_path / "whole", Drawn(25, bad=7))
    written = []
    inner = writer._write_shard

    def interrupted(job, shard, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        return inner(job, shard, *args)

    monkeypatch.setattr(writer, "_write_shard", interrupted)
    out = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        write(out, Drawn(25, bad=7))
    assert not (out / "dataset.json").exists() and len(list(out.glob("*.tar"))) == 2
    (out / "train-000001.tar").write_bytes(b"cut short")  # a crash of the machine
    (out / ".train-000002.tar.abc.tar").write_bytes(b"left by a killed worker")
    (out / ".progress" / ".train-000002.json.abc.json").write_bytes(
        b"left by one that was killed a bit later"
    )
    written.clear()
    monkeypatch.setattr(
        writer, "_write_shard", lambda job, shard, *a: written.append(shard) or inner(job, shard, *a)
    )
    write(out, Drawn(25, bad=7))
    assert written == [1, 2]  # shard 0 was kept
    assert files_of(out) == files_of(tmp_path / "whole")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_prepare import Drawn, write
if __name__ == "__main__":
    try:
        write({out!r}, Drawn(60, pause=0.2), workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_for_real_and_run_again(tmp_path, how):
    out, script = tmp_path / "out", tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out)))
    environment = os.environ | {"PYTHONPATH": str(Path(writer.__file__).parents[2])}
    run = subprocess.Popen(
        [sys.executable, str(script)],
        start_new_session=True,
        # A suite started in the background inherits an ignored SIGINT; a terminal's processes do not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 30
    while not list(out.glob("train-*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run.poll() is None, run.stderr.read()
    started = time.monotonic()
    if how == signal.SIGKILL:
        run.kill()
        run.wait()
    else:
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: parent and workers alike
        assert run.wait(timeout=20) == 130
        assert "Traceback" not in run.stderr.read()
        assert not list(out.glob(".train-*"))
        assert time.monotonic() - started < 5
    assert not (out / "dataset.json").exists()
    for shard in out.glob("train-*.tar"):
        with tarfile.open(shard) as tar:
            tar.getmembers()
    # The workers of a killed parent go with it.
    wait_until(lambda: not alive_in_session(run.pid))
    write(out, Drawn(60))
    write(tmp_path / "whole", Drawn(60))
    assert files_of(out) == files_of(tmp_path / "whole")


def alive_in_session(session: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_finished_split_is_left_alone_and_lost_shards_come_back(tmp_path, capsys):
    write(tmp_path)
    before = files_of(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    manifest = write(tmp_path)
    assert "nothing to do" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "train-000001.tar").unlink()
    assert write(tmp_path) == manifest
    assert "1 lost shards written again" in capsys.readouterr().err
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("shapes", [None, "16x16,20x16"])
def test_a_shard_that_comes_back_otherwise_is_not_put_among_the_others(tmp_path, shapes):
    write(tmp_path, shapes=shapes)
    lost = min(path for path in tmp_path.glob("train-000001*.tar"))
    lost.unlink()
    before = files_of(tmp_path)
    for _ in range(2):  # the second time it is not taken for what was lost
        with pytest.raises(VugenError, match="gave other bytes than dataset.json notes"):
            write(tmp_path, source=Drawn(turned=True), shapes=shapes)
        assert files_of(tmp_path) == before


def test_processes_of_a_job_prepare_the_same_or_say_so(tmp_path, monkeypatch):
    source = Drawn()
    plan = Plan(dataset="drawn", size=32, seed=0, shard_size=10, items=25, listing=writer._listing(source))
    note = tmp_path / ".progress" / "train.json"
    note.parent.mkdir()
    note.write_text(plan.model_copy(update={"tool": this_tool()}).model_dump_json())
    monkeypatch.setattr(writer, "is_first", lambda: False)
    monkeypatch.setattr(writer, "barrier", lambda _: None)
    for other, size in ((Drawn(24), 32), (source, 40)):
        with pytest.raises(VugenError, match="the processes of this job do not prepare the same"):
            write_dataset(other, tmp_path, size=size, shard_size=10)
    assert not list(tmp_path.glob("*.tar"))


def test_splits_share_a_folder_in_either_order(tmp_path):
    for name, splits in (("a", ("train", "val")), ("b", ("val", "train"))):
        for split in splits:
            write(tmp_path / name, split=split, seed=3)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert list(json.loads((tmp_path / "a" / "dataset.json").read_text())["splits"]) == ["train", "val"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": 40}, "--size"),
        ({"seed": 1}, "--seed"),
        ({"shard_size": 5}, "--shard-size"),
        ({"count": 5}, "--count"),
        ({"source": Drawn(26)}, "source files"),
        ({"split": "val", "size": 40}, "--size"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused_with_what_differs(tmp_path, monkeypatch, change, named, finished):
    if finished:
        write(tmp_path)
    elif "split" in change:
        pytest.skip("a split that was never finished binds no other")
    else:
        with monkeypatch.context() as patch:
            patch.setattr(writer, "_finished", lambda job, shard: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(VugenError, match=named) as caught:
        write(tmp_path, **change)
    assert "--out" in str(caught.value)
    assert files_of(tmp_path) == before


def test_shards_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(VugenError, match="already holds train-000000"):
        write(tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 99, "splits": {}}', '{"format": 1, "splits": {"train": 3}}']
)
def test_a_foreign_manifest_is_refused(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(VugenError, match="choose another --out"):
        write(tmp_path)


def test_two_runs_at_once(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(VugenError, match="another vugen prepare"):
        write(tmp_path)
    os.close(handle)
    write(tmp_path)


def test_strict_stops_at_the_first_bad_picture(tmp_path):
    for workers in (1, 2):
        with pytest.raises(VugenError, match=r"picture \d+: not an image.*--strict"):
            write(tmp_path / str(workers), Drawn(25, bad=5), strict=True, workers=workers)
    write(tmp_path / "lenient", Drawn(25, bad=5))
    with pytest.raises(VugenError, match=r"picture \d+: not an image.*--strict"):
        write(tmp_path / "lenient", Drawn(25, bad=5), strict=True)


def test_nothing_usable_is_an_error_and_leaves_no_shards(tmp_path):
    with pytest.raises(VugenError, match=r"not one of 5 pictures .* not an image"):
        write(tmp_path, Drawn(5, bad=1))
    assert files_of(tmp_path) == {}
    with pytest.raises(VugenError, match="no pictures"):
        write(tmp_path, Drawn(0))
    write(tmp_path, Drawn(5))  # and the folder is free for another try


def test_a_shard_of_bad_pictures_is_left_out(tmp_path):
    manifest = write(tmp_path, Drawn(12, bad=2), shard_size=1)
    shards = manifest.splits["train"].shards
    assert len(shards) == 6 == len(list(tmp_path.glob("*.tar"))) and all(s.samples == 1 for s in shards)


def test_pictures_without_captions_are_skipped(tmp_path):
    image = Drawn()[0].image
    source = Listed([Sample("mute", image, [" ", "\n"]), Sample("fine", image, ["words"])])
    write_dataset(source, tmp_path, size=32)
    assert list(read_skipped(tmp_path, "train")) == [Skipped(key="mute", reason="no caption")]


def test_captions_of_any_script_survive(tmp_path):
    line = "ein Bär 🐻 im 森 \ud800"
    source = Listed([Sample("one", Drawn()[0].image, [line], {"note": line})])
    write_dataset(source, tmp_path, size=32)
    stored = samples_of(tmp_path)["000000000"]
    assert stored["txt"].decode() == "ein Bär 🐻 im 森 ?\n" and json.loads(stored["json"])["note"].startswith(
        "ein Bär 🐻"
    )


def test_disk_full(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(VugenError, match="No space left on device"):
        write(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*train-0*"))
    write(tmp_path)


class Failing(Drawn):
    """The system fails to read the first pictures."""

    def __init__(self, number: int, failures: int):
        super().__init__(5)
        self.number, self.failures = number, failures

    def __getitem__(self, index: int) -> Sample:
        if self.failures:
            self.failures -= 1
            raise OSError(self.number, os.strerror(self.number), "here.jpg")
        return super().__getitem__(index)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_failing_system_is_asked_again_and_then_ends_the_run(tmp_path, monkeypatch, number):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(VugenError, match=rf"cannot read here\.jpg of nowhere: {os.strerror(number)}"):
        write(tmp_path, Failing(number, 1000))
    manifest = write(tmp_path, Failing(number, 2))
    assert manifest.splits["train"].count == 5 and not list(read_skipped(tmp_path, "train"))


def test_unwritable_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VugenError, match="cannot write to"):
        write(tmp_path / "file")
    with pytest.raises(VugenError, match="cannot write to"):
        write(tmp_path / "file" / "below")
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(VugenError, match="cannot write"):
        write(tmp_path / "locked")


class Deadly(Drawn):
    """Ends the worker that reads it, as the kernel does when memory runs out."""

    def __getitem__(self, index: int) -> Sample:
        os._exit(9)


def test_a_dead_worker(tmp_path):
    with pytest.raises(VugenError, match="fewer --workers"):
        write(tmp_path, Deadly(), workers=2)


@pytest.mark.parametrize("bad", [{"size": 0}, {"shard_size": 0}, {"workers": 0}, {"count": 0}])
def test_bad_numbers(tmp_path, bad):
    with pytest.raises(VugenError, match="or more"):
        write(tmp_path, **bad)


def test_openmoji_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare("openmoji", count=12, workers=1, shard_size=5)
    prepare("openmoji", count=4, workers=1, split="val")
    assert "12 images of 64 px in 3 shards" in capsys.readouterr().out
    manifest = json.loads(Path("data/openmoji/dataset.json").read_text())
    assert manifest["size"] == 64 and manifest["splits"]["val"]["count"] == 4
    assert all("png" in members for members in samples_of(Path("data/openmoji")).values())
    with pytest.raises(VugenError, match="leave --source out"):
        prepare("openmoji", source=tmp_path)
    prepare("openmoji", count=6, workers=1, pairs=1.0, out=Path("pairs"))
    scenes = [json.loads(members["json"])["scene"] for members in samples_of(Path("pairs")).values()]
    assert {scene["kind"] for scene in scenes} == {"pair"}
    with pytest.raises(VugenError, match="--pairs and --counts go with"):
        prepare("folder", source=tmp_path, pairs=0.5)
    with pytest.raises(VugenError, match="--counts 0.2 and --pairs 0.9 are more than all scenes"):
        prepare("openmoji", pairs=0.9, counts=0.2, out=Path("none"))
    assert not Path("none").exists()


def test_ctrl_c_through_the_command(monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_dataset", interrupt)
    with pytest.raises(Stopped, match="finished shards are kept in"):
        prepare("openmoji", out=tmp_path)
