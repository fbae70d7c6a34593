"""Captions by a VLM beside a data set's own: whose they are, the same set after an interruption, faults."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import vugen_here

from vugen_cli.commands.options import beside
from vugen_cli.data.loader import ShardedImages, TrainingStream
from vugen_cli.data.manifest import read_manifest, read_skipped
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.recipe import Captioning
from vugen_cli.stages import caption, latent_cache
from vugen_cli.stages.caption import with_captions, write_captions
from vugen_cli.vlm.chat import ask
from vugen_cli.vlm.frozen import FrozenVLM

CPU = torch.device("cpu")
ASKED = Captioning(instructions=["describe the picture", "where is it?"], tokens=4)


@pytest.fixture(scope="module")
def captioned(scenes: Path, vlm_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("captioned") / "set"
    write_captions(scenes, out, str(vlm_path), ASKED, CPU)
    return out


def files(out: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes()
        for file in [*out.glob("*.tar"), *out.glob("*.npy"), *out.glob("*.json*")]
    }


def stop_after(calls: int) -> Callable[..., list[str]]:
    """`ask`, until it is interrupted in its call of that number."""
    asked = []

    def told(*arguments: object) -> list[str]:
        asked.append(0)
        if len(asked) == calls:
            raise KeyboardInterrupt
        return ask(*arguments)

    return told


def test_captions_stand_beside_the_old_ones_with_their_origin(
    captioned: Path, scenes: Path, vlm: FrozenVLM
) -> None:
    before, after = ShardedImages(scenes), ShardedImages(captioned)
    assert len(after) == len(before) == 96 and after.names == before.names
    rows = range(int(before.counts[2]))
    pictures = torch.stack([torch.from_numpy(before.read(2, row)[0]).permute(2, 0, 1) for row in rows])
    told = [ask(vlm.model, vlm.processor, pictures, each, 4) for each in ASKED.instructions]
    for row in rows:
        assert after.stored(2, row)[0] == before.stored(2, row)[0]
        (_, old), (_, new) = before.read(2, row), after.read(2, row)
        lines = [" ".join(answers[row].split()) for answers in told]
        expected = with_captions(old, lines, 0)
        assert new == expected and new["captions"][: len(old["captions"])] == old["captions"]
        assert new["caption_count"] == len(new["captions"]) == len(new["caption_origins"])
    assert any(1 in after.read(2, row)[1]["caption_origins"] for row in rows)
    manifest = read_manifest(captioned)
    assert [(each.instruction, each.tokens) for each in manifest.captioned or []] == [
        ("describe the picture", 4), ("where is it?", 4),
    ]  # fmt: skip
    entry = manifest.splits["train"]
    assert entry.count == 96 and entry.captions and entry.captions.per_image > 1 and not entry.skipped_count
    assert manifest.splits["val"].count == 24 and manifest.licence == read_manifest(scenes).licence
    assert len(next(iter(TrainingStream(after, 8, seed=0))).captions) == 8


def test_new_captions_go_on_counting_and_empty_ones_are_left_out() -> None:
    meta = {"captions": ["a", "b"], "class": "bear"}
    once = with_captions(meta, ["c", ""], 0)
    assert once["captions"] == ["a", "b", "c"] and once["caption_origins"] == [0, 0, 1]
    twice = with_captions(once, ["d"], 2)
    assert twice["captions"] == ["a", "b", "c", "d"] and twice["caption_origins"] == [0, 0, 1, 3]
    assert twice["class"] == "bear" and twice["caption_count"] == 4


@pytest.mark.parametrize("stale", [[0, 1], [0], ["0", None], 3])
def test_origins_that_the_set_does_not_explain_are_dropped(stale: object) -> None:
    meta = {"captions": ["a", "b"], "caption_origins": stale}
    assert with_captions(meta, ["c"], 0)["caption_origins"] == [0, 0, 1]


def test_an_interrupted_run_ends_with_the_same_bytes(
    captioned: Path, scenes: Path, vlm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption, "ask", stop_after(8))  # two for the first picture, two a shard
    with pytest.raises(KeyboardInterrupt):
        write_captions(scenes, tmp_path / "set", str(vlm_path), ASKED, CPU)
    assert len(list((tmp_path / "set").glob("*.tar"))) == 2
    monkeypatch.setattr(caption, "ask", ask)
    half = tmp_path / "set" / ".progress" / ".train-000002.tar.json.x.json"  # killed while it wrote a note
    half.touch()
    write_captions(scenes, tmp_path / "set", str(vlm_path), ASKED, CPU)
    assert not half.exists()
    assert files(tmp_path / "set") == files(captioned)


def test_processes_take_a_shard_each(
    captioned: Path, scenes: Path, vlm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    monkeypatch.setattr(latent_cache, "world_size", lambda: 2)
    monkeypatch.setattr(latent_cache, "rank", lambda: 1)
    monkeypatch.setattr(caption, "is_first", lambda: False)
    with pytest.raises(VugenError, match="no dataset.json"):  # there is no first process beside it here
        write_captions(scenes, out, str(vlm_path), ASKED, CPU)
    assert sorted(file.name for file in out.glob("*.tar")) == ["train-000001.tar", "train-000003.tar"]
    for file in out.glob("*.tar"):
        assert file.read_bytes() == (captioned / file.name).read_bytes()


def test_a_set_to_compare_with_alone_is_captioned(vlm_path: Path, tmp_path: Path) -> None:
    val = tmp_path / "val"
    write_dataset(OpenMojiScenes(3, "val", size=32), val, split="val", size=32, workers=1)
    write_captions(val, tmp_path / "set", str(vlm_path), ASKED, CPU)
    assert list(read_manifest(tmp_path / "set").splits) == ["val"]


def test_what_is_made_of_the_working_directory_goes_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coco" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "coco")
    for data in (".", "deep/.."):
        assert beside(Path(data), "captioned") == tmp_path.resolve() / "coco-captioned"
    assert beside(Path("data/coco"), "latents") == Path("data/coco-latents")


def test_bad_pictures_are_counted_and_a_vlm_that_cannot_be_asked_is_refused(
    scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(scenes, tmp_path / "copy"))
    data = bytearray((copy / "val-000000.tar").read_bytes())
    start = data.index(b"\x89PNG")
    data[start : start + 64] = bytes(64)
    (copy / "val-000000.tar").write_bytes(data)
    small = ["--set", "caption.instructions=['what is it?']", "--set", "caption.tokens=2", "--workers", "0"]
    done = vugen_here("caption", "--data", copy, "--vlm", vlm_path, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of 23 images, 1 skipped (listed in skipped-val.jsonl)" in done.stdout
    out = tmp_path / "copy-captioned"
    assert read_manifest(out).splits["val"].skipped_count == 1
    (bad,) = read_skipped(out, "val")
    assert bad.key == "val-000000.tar/000000000" and bad.reason

    dumb = Path(shutil.copytree(vlm_path, tmp_path / "dumb"))
    settings = json.loads((dumb / "processor_config.json").read_text())
    (dumb / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (dumb / "processor_config.json").unlink()
    done = vugen_here("caption", "--data", copy, "--vlm", dumb, "--out", "none", *small, cwd=tmp_path)
    assert done.returncode == 1 and "cannot be asked" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "none").exists()
    done = vugen_here("caption", "--data", copy, "--vlm", vlm_path, "--out", copy, *small, cwd=tmp_path)
    assert "already holds shards without captions" in done.stderr
    done = vugen_here("caption", "--data", copy, "--vlm", vlm_path, "--set", "caption.tokens=3", cwd=tmp_path)
    assert "holds captions prepared otherwise (captioned)" in done.stderr
