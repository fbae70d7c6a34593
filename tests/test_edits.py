"""Edits as data: read from every layout, stored beside their targets, streamed, mixed and cached."""

import io
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_prepare_sources import jpeg, put, tar_of

from vugen_cli.commands.prepare import open_source
from vugen_cli.data.edits import open_edits
from vugen_cli.data.loader import ShardedImages, TrainingStream, batches
from vugen_cli.data.manifest import read_skipped
from vugen_cli.data.mixture import MixedImages
from vugen_cli.data.sample import Sample, Source
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError
from vugen_cli.metrics.image_sets import open_image_set
from vugen_cli.nano.edits import (
    EDITS,
    SHARES,
    OpenMojiEdits,
    choose_kind,
    describe_edit,
    is_held_out,
    natural_color,
)
from vugen_cli.nano.painting import _layout, random_stream
from vugen_cli.nano.vocabulary import SUBJECTS
from vugen_cli.recipe import MixtureSource
from vugen_cli.stages.caption import Captioning, write_captions
from vugen_cli.stages.latent_cache import write_latents

CPU = torch.device("cpu")


def prepared(source: Source, out: Path, size: int = 24) -> ShardedImages:
    write_dataset(source, out, "train", size)
    return ShardedImages(out)


def said(source: Source) -> list[tuple[list[str], bytes, list[bytes]]]:
    samples: list[Sample] = [source[i] for i in range(len(source))]
    return [(sample.captions, sample.image, list(sample.sources)) for sample in samples]


TWO = [(["make it red"], jpeg(1), [jpeg(0)]), (["add a hat", "put a hat on"], jpeg(3), [jpeg(2), jpeg(4)])]
FILES = {f"p/{n}.jpg": jpeg(n) for n in range(5)}


def test_a_table_of_paths_may_have_several_sources_and_instructions(tmp_path: Path) -> None:
    put(tmp_path, {**FILES, "pairs.jsonl": "\n".join(map(json.dumps, [
        {"source": "p/0.jpg", "target": "p/1.jpg", "instruction": "make it red"},
        {"input": ["p/2.jpg", "p/4.jpg"], "output": "p/3.jpg", "edit": ["add a hat", "put a hat on"]},
    ]))})  # fmt: skip
    assert said(open_source("edits", tmp_path / "pairs.jsonl", "train", 64, None, 0)) == TWO
    assert said(open_edits(tmp_path)) == TWO
    put(tmp_path, {"one/p/0.jpg": jpeg(0), "one/p/1.jpg": jpeg(1)})
    put(tmp_path, {"one/pairs.csv": "source,target,instruction\np/0.jpg,p/1.jpg,make it red\n"})
    assert said(open_edits(tmp_path / "one")) == TWO[:1]


def test_shards_name_source_and_target(tmp_path: Path) -> None:
    put(tmp_path, {"a.tar": tar_of({
        "0.source.jpg": jpeg(0), "0.target.jpg": jpeg(1), "0.txt": b"make it red\n",
        "1.source1.jpg": jpeg(4), "1.source0.jpg": jpeg(2), "1.output.jpg": jpeg(3),
        "1.json": json.dumps({"instruction": ["add a hat", "put a hat on"], "task": "add"}).encode(),
        "2.source.jpg": jpeg(0), "2.txt": b"nothing comes of it",
    })})  # fmt: skip
    source = open_edits(tmp_path)
    assert said(Head(source, 2)) == TWO and source[1].meta == {"edit": "add"}
    with pytest.raises(OSError, match="no target picture"):
        source[2]


def test_instructions_that_are_no_text_cost_their_edit_alone_and_hidden_files_are_no_edits(
    tmp_path: Path,
) -> None:
    said = {"0": '{"edit": 5}', "1": "[" * 100_000, "2": '{"edit": [null, "make it red"]}'}
    files = {"._0.source.jpg": b"macOS"}
    for key, text in said.items():
        files |= {f"{key}.source.jpg": jpeg(0), f"{key}.target.jpg": jpeg(1), f"{key}.json": text.encode()}
    source = open_edits(put(tmp_path, {"a.tar": tar_of(files), "._a.tar": b"macOS", "._a.csv": b"\xff"}))
    assert len(source) == 3 and source[2].captions == ["make it red"]
    for index in range(2):
        with pytest.raises(OSError, match=r"damaged \.json"):
            source[index]


class Head:
    """The first samples of a source."""

    def __init__(self, source: Source, count: int):
        self.source, self.count = source, count
        self.name, self.origin, self.licence, self.classes = "head", "here", "none", ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ("original_image", "edited_image", "edit_prompt"),  # InstructPix2Pix
        ("source_image", "edited_image", "edit_prompt"),  # UltraEdit
        ("src_img", "edited_img", "edited_prompt_list"),  # OmniEdit
    ],
)
def test_the_published_parquet_layouts(tmp_path: Path, source: str, target: str, text: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def image(seed: int) -> dict[str, object]:
        return {"bytes": jpeg(seed), "path": None}

    words = ["make it red"] if text.endswith("list") else "make it red"
    others = {"original_prompt": "a ball", "source_caption": "a ball", "edited_prompt": "a red ball"}
    table = {source: [image(0)], target: [image(1)], text: [words], "task": ["color"]}
    pq.write_table(pa.table(table | {k: [v] for k, v in others.items()}), tmp_path / "train-0.parquet")
    found = open_edits(tmp_path)
    assert said(found) == TWO[:1] and found[0].meta == {"edit": "color"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": '{"source": "x.jpg", "instruction": "make it red"}'}, "line 1: expected source, targ"),
        ({"a.jsonl": '{"source": "../x.jpg", "target": "y", "text": "t"}'}, "leaves the table's folder"),
        ({"a.jsonl": '{"source": 5, "target": "y.jpg", "text": "t"}'}, "line 1: expected source, targ"),
        ({"a.jsonl": '{"source": "x.jpg", "target": "y.jpg", "text": 5}'}, "line 1: expected source, targ"),
        ({"a.tar": tar_of({"0.jpg": jpeg(), "0.txt": b"a bear"})}, "holds no edits .*found 0.jpg, 0.txt"),
        ({"notes.md": "nothing"}, "holds no shards, no parquet files and not .*found notes.md"),
        ({"a.csv": "source,target,edit\n", "b.csv": ""}, "found a.csv, b.csv: point --source at the table"),
        ({"train/a.json": "[]"}, "found a.json"),
    ],
)  # fmt: skip
def test_what_holds_no_edits_is_refused_in_one_line(
    tmp_path: Path, files: dict[str, bytes | str], message: str
) -> None:
    with pytest.raises(VugenError, match=message):
        open_edits(put(tmp_path, files))


def test_a_file_of_another_kind_is_refused_by_what_is_read(tmp_path: Path) -> None:
    put(tmp_path, {"edits.json": "[]"})
    with pytest.raises(
        VugenError, match=r"edits\.json is none of \.csv, \.tsv, \.jsonl, \.tar and \.parquet"
    ):
        open_edits(tmp_path / "edits.json")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_line_with_an_empty_value_costs_its_edit_alone(tmp_path: Path, name: str) -> None:
    columns = ("source", "target", "instruction")
    good = ("p/0.jpg", "p/1.jpg", "make it red")
    lines = [good, *((*good[:n], "", *good[n + 1 :]) for n in range(3))]
    rows = [",".join(columns), *map(",".join, lines)]
    if name.endswith("jsonl"):
        rows = [
            json.dumps({c: value or None for c, value in zip(columns, line, strict=True)}) for line in lines
        ]
    put(tmp_path, {**FILES, name: "\n".join(rows)})
    assert len(prepared(open_edits(tmp_path), tmp_path / "out")) == 1
    assert {skipped.reason for skipped in read_skipped(tmp_path / "out", "train")} == {
        "no source picture on its line",
        "no target picture on its line",
        "no caption",
    }


def test_a_caption_of_a_source_in_a_shard_is_no_picture(tmp_path: Path) -> None:
    files = {"0.source.jpg": jpeg(0), "0.source.txt": b"a ball", "0.target.json": b"{}"}
    put(tmp_path, {"a.tar": tar_of({**files, "0.target.jpg": jpeg(1), "0.txt": b"make it red"})})
    assert said(open_edits(tmp_path)) == TWO[:1]


def test_parquet_files_may_have_a_dev_split_kinds_of_any_type_and_one_that_lacks_a_column(
    tmp_path: Path,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def image(seed: int) -> dict[str, object]:
        return {"bytes": jpeg(seed), "path": None}

    row = {"source_img": [image(0)], "target_img": [image(1)], "instruction": ["make it red"], "task": [b"a"]}
    put(tmp_path, {"data/notes.md": ""})
    for split in ("train", "dev"):
        pq.write_table(pa.table(row), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    pq.write_table(pa.table({k: v for k, v in row.items() if k != "task"}), tmp_path / "data/dev-1.parquet")
    assert len(prepared(open_edits(tmp_path, "train"), tmp_path / "train")) == 1
    held_out = open_edits(tmp_path, "val")
    assert len(held_out) == 2 and len(prepared(held_out, tmp_path / "val")) == 1
    (skipped,) = read_skipped(tmp_path / "val", "train")
    assert skipped.reason.startswith("a column is missing (") and "task" in skipped.reason


def test_a_row_without_source_pictures_is_skipped(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": jpeg(0), "path": None}
    texts = ["make it red", "make it blue"]
    row = {"sources": [[image], []], "target": [image, image], "instruction": texts}
    pq.write_table(pa.table(row), tmp_path / "train-0.parquet")
    assert len(prepared(open_edits(tmp_path), tmp_path / "out")) == 1
    (skipped,) = read_skipped(tmp_path / "out", "train")
    assert "no source picture" in skipped.reason


def test_source_and_target_are_cut_alike_and_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (48, 96, 3))
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(ramp)).save(file, "PNG")
    row = {"source": "a.png", "target": "a.png", "instruction": "leave it"}
    bad = [
        row | {"source": "none.png"},
        row | {"source": "bad.png"},
        row | {"instruction": "{image} on {image}"},
    ]
    put(tmp_path, {"a.png": file.getvalue(), "bad.png": b"no picture"})
    put(tmp_path, {"e.jsonl": "\n".join(map(json.dumps, [row, *bad]))})
    images = prepared(open_edits(tmp_path), tmp_path / "out")
    ((pixels, meta),) = images.in_order()
    (batch,) = islice(TrainingStream(images, 1, seed=0, sources=True), 1)
    assert batch.sources is not None and meta["source_count"] == 1 == len(meta["sources"])
    assert (batch.sources[0][0].permute(1, 2, 0).numpy() == pixels).all(), "the same cut"
    assert sorted(skipped.reason for skipped in read_skipped(tmp_path / "out", "train")) == [
        "No such file or directory",
        "an instruction places 2 pictures of 1",
        "source picture 0: not an image file, or of a kind that is not read",
    ]


def test_preparing_goes_on_after_an_interruption_with_the_same_bytes(edits: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(edits, tmp_path / "copy"))
    (copy / "train-000001.tar").unlink()
    (copy / "train-000001.index.npy").unlink()
    write_dataset(OpenMojiEdits(40), copy, "train", 64, shard_size=20)
    for file in [*edits.glob("train*"), edits / "dataset.json"]:
        assert file.read_bytes() == (copy / file.name).read_bytes()


def test_a_stream_gives_sources_beside_their_targets_mirrored_together(edits: Path) -> None:
    images = ShardedImages(edits)
    drawn = {sample.key: sample for sample in map(OpenMojiEdits(40).__getitem__, range(40))}
    stream = TrainingStream(images, 8, seed=3, flip=True, sources=True)
    for batch in islice(batches(stream, 2), 3):
        assert batch.sources is not None
        for image, sources, meta in zip(batch.images, batch.sources, batch.meta, strict=True):
            sample = drawn[meta["source_key"]]
            shown = [np.asarray(picture) for picture in (sample.image, *sample.sources)]
            given = [picture.permute(1, 2, 0).numpy() for picture in (image, *sources)]
            assert any(
                all((g == s[:, ::step]).all() for g, s in zip(given, shown, strict=True)) for step in (1, -1)
            )
    plain = next(iter(TrainingStream(images, 8, seed=3)))
    assert plain.sources is None and not any("sources" in meta for meta in plain.meta)


def test_a_damaged_source_makes_a_damaged_sample(edits: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(edits, tmp_path / "copy"))
    shard = copy / "train-000000.tar"
    offset, length = np.load(copy / "train-000000.index.npy")[5, 3]
    data = bytearray(shard.read_bytes())
    data[offset + length // 2 : offset + length] = bytes(length - length // 2)
    shard.write_bytes(data)
    batch = next(iter(TrainingStream(ShardedImages(copy), 40, seed=0, sources=True)))
    assert batch.corrupt == 1 and batch.sources is not None and all(len(s) == 1 for s in batch.sources)


def test_edits_mix_with_captioned_images(edits: Path, scenes: Path) -> None:
    mixed = MixedImages([MixtureSource(path=str(edits), weight=1), MixtureSource(path=str(scenes), weight=3)])
    batch = next(iter(TrainingStream(mixed, 64, seed=0, sources=True)))
    assert batch.sources is not None
    assert [len(s) for s in batch.sources] == ["edit" in meta for meta in batch.meta]
    assert 8 <= sum(map(len, batch.sources)) <= 24


def test_a_latent_cache_carries_the_sources(edits: Path, trained: Path, tmp_path: Path) -> None:
    write_latents(trained / "reducer.safetensors", edits, tmp_path / "z", CPU)
    live = TrainingStream(ShardedImages(edits), 8, seed=1, sources=True)
    cached = TrainingStream(ShardedImages(tmp_path / "z", latents=True), 8, seed=1, sources=True)
    for a, b in islice(zip(live, cached, strict=False), 3):
        assert a.captions == b.captions and a.sources is not None and b.sources is not None
        assert all(torch.equal(x[0], y[0]) for x, y in zip(a.sources, b.sources, strict=True))
        assert [m["scene"] for m in a.meta] == [m["scene"] for m in b.meta]


def test_scores_compare_with_targets_alone(edits: Path) -> None:
    images = open_image_set(edits)
    targets = [np.asarray(OpenMojiEdits(16, "val")[i].image).transpose(2, 0, 1).tobytes() for i in range(16)]
    assert images.total == 16 and sorted(i.tobytes() for i in images) == sorted(targets)


def test_edits_are_not_captioned(edits: Path, tmp_path: Path) -> None:
    with pytest.raises(VugenError, match="holds edits, whose captions say what to change"):
        write_captions(edits, tmp_path / "out", "nano", Captioning(), CPU)


def test_drawn_edits_change_what_is_asked_and_nothing_else() -> None:
    drawn = [OpenMojiEdits(120, "train", 32)[i] for i in range(120)]
    assert {sample.meta["edit"] for sample in drawn} == set(EDITS)
    for sample in drawn:
        before, after = sample.meta["source_scene"], sample.meta["scene"]
        assert not is_held_out(before) and not is_held_out(after) and len(set(sample.captions)) == 3
        different = {key for key in before if before[key] != after[key]}
        allowed = {
            "setting": {"setting"},
            "subject": {"subjects"},
            "color": {"subjects"},
            "number": {"subjects", "kind"},
            "side": {"relation"},
            "add": {"subjects", "kind", "relation"},
            "remove": {"subjects", "kind", "relation"},
        }[sample.meta["edit"]]
        assert different and different <= allowed
        one, two = (np.asarray(picture).astype(int) for picture in (sample.sources[0], sample.image))
        changed = (np.abs(one - two).max(-1) > 8).mean()
        assert 0 < changed < (1.01 if sample.meta["edit"] == "setting" else 0.75)
        if sample.meta["edit"] in ("color", "add", "remove"):
            assert changed < 0.4
    again = OpenMojiEdits(9, "train", 32)[7]
    assert again.captions == drawn[7].captions and again.image == drawn[7].image


@pytest.mark.parametrize("kind", EDITS)
def test_both_scenes_of_an_edit_show_as_many_of_each_subject_as_they_say(kind: str) -> None:
    for i in range(150):
        for scene in describe_edit("train", kind, random_stream(kind, i))[:2]:
            placed = Counter(each.name for each in _layout(scene, random_stream("layout", i)))
            assert placed == {subject["name"]: subject["count"] for subject in scene["subjects"]}


def test_no_edit_asks_for_the_colour_that_is_there() -> None:
    named = {name: natural_color(name) for name, subject in SUBJECTS.items() if subject.tintable}
    assert named["car"] == "red" and named["ball"] == "orange" and named["umbrella"] == "purple"
    assert named["hat"] is None
    for i in range(60):
        before, after, _ = describe_edit("train", "color", random_stream("color", i))
        for old, new in zip(before["subjects"], after["subjects"], strict=True):
            assert old == new or new["color"] != (old["color"] or named[old["name"]])


def test_held_out_edits_ask_for_pairs_that_training_never_shows() -> None:
    scenes = [OpenMojiEdits(40, "val", 8)[i].meta["scene"] for i in range(40)]
    assert 8 < sum(is_held_out(scene) for scene in scenes) < 36
    assert all(scene["held_out"] == is_held_out(scene) for scene in scenes)


def test_what_is_learned_last_is_drawn_most_to_train_on_and_asked_for_alike() -> None:
    for split, shares in (("train", SHARES), ("val", dict.fromkeys(SHARES, 1))):
        found = Counter(choose_kind(split, random_stream("kind", i)) for i in range(1000))
        for kind, share in shares.items():
            assert abs(found[kind] / 1000 - share / sum(shares.values())) < 0.05, (split, kind)
    assert set(SHARES) == set(EDITS)
