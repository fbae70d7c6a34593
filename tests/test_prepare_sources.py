"""The sources of `vugen prepare`: the layouts they read, what they say of others, and real samples."""

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vugen_cli.commands.prepare import open_source, prepare
from vugen_cli.data import hf, shards
from vugen_cli.data.captions import CaptionedImages
from vugen_cli.data.coco import CocoCaptions
from vugen_cli.data.folder import ImageFolder, files_of_split, image_paths
from vugen_cli.data.hf import HuggingFaceDataset
from vugen_cli.data.imagenet import ImageNet, class_names
from vugen_cli.data.manifest import read_skipped
from vugen_cli.data.shards import WebDatasetShards
from vugen_cli.data.writer import write_dataset
from vugen_cli.errors import VugenError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def jpeg(seed: int = 0, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def tar_of(files: dict[str, bytes] | list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def content(source) -> dict[str, tuple[list[str], bytes]]:
    samples = [source[i] for i in range(len(source))]
    return {sample.key: (sample.captions, sample.image) for sample in samples}


# --- ImageNet

TENCH, FISH = "n01440764", "n01443537"
PICTURES = {f"{wnid}/{wnid}_{i}.JPEG": jpeg(i) for wnid in (TENCH, FISH) for i in range(3)}


def class_tars() -> dict[str, bytes]:
    return {
        f"{wnid}.tar": tar_of({name[10:]: data for name, data in PICTURES.items() if name.startswith(wnid)})
        for wnid in (FISH, TENCH)
    }


def imagenet_layouts(root: Path) -> dict[str, Path]:
    """The same six pictures in every layout."""
    under = {f"train/{name}": data for name, data in PICTURES.items()}
    put(root, {"plain.tar": tar_of(under), "bare.tar": tar_of(PICTURES)})
    put(
        root,
        {
            "ILSVRC2012_img_train.tar": tar_of(class_tars()),
            "has/ILSVRC2012_img_train.tar": tar_of(class_tars()),
        },
    )
    return {
        "train and val folders": put(root / "extracted", under | {"val/x": b""}),
        "the train folder": root / "extracted" / "train",
        "class folders": put(root / "classes", PICTURES),
        "kaggle": put(root / "kaggle", {f"ILSVRC/Data/CLS-LOC/{name}": data for name, data in under.items()}),
        "class tars": put(root / "tars", class_tars()),
        "class tars in train": put(
            root / "tars2", {f"train/{name}": data for name, data in class_tars().items()}
        ),
        "the official tar": root / "ILSVRC2012_img_train.tar",
        "a folder with the official tar": root / "has",
        "a plain tar": root / "plain.tar",
        "a tar of class folders": root / "bare.tar",
    }


def test_every_imagenet_layout_gives_the_same(tmp_path):
    expected = {name: (class_names()[name[:9]], data) for name, data in PICTURES.items()}
    for layout, path in imagenet_layouts(tmp_path).items():
        source = ImageNet(path)
        assert content(source) == expected, layout
        assert list(content(source)) == sorted(expected), layout
        assert source.classes == ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert source[0].captions == ["tench", "Tinca tinca"]
    assert source[5].meta == {"class": "goldfish, Carassius auratus", "label": 1, "wnid": FISH}


def test_imagenet_layouts_give_the_same_shards(tmp_path):
    hashes = set()
    for number, path in enumerate(imagenet_layouts(tmp_path).values()):
        manifest = write_dataset(ImageNet(path), tmp_path / f"out{number}", size=16)
        hashes.add(manifest.splits["train"].shards[0].sha256)
    assert len(hashes) == 1


def test_the_class_table():
    names = class_names()
    assert len(names) == 1000 and list(names) == sorted(names)
    assert names["n02012849"] == ["crane"] and names[TENCH] == ["tench", "Tinca tinca"]
    assert all(lemma and lemma == lemma.strip() for lemmas in names.values() for lemma in lemmas)


def test_flat_val_with_labels_beside_it(tmp_path):
    flat = {"ILSVRC2012_val_00000001.JPEG": jpeg(1), "ILSVRC2012_val_00000002.JPEG": jpeg(2)}
    folder = put(tmp_path / "data", {f"val/{name}": data for name, data in flat.items()})
    put(tmp_path / "tar", {"ILSVRC2012_img_val.tar": tar_of(flat)})
    paths = [folder, tmp_path / "tar", tmp_path / "tar" / "ILSVRC2012_img_val.tar"]
    for path in paths:
        with pytest.raises(VugenError, match=r"LOC_val_solution\.csv"):
            ImageNet(path, "val")
    rows = (
        "ImageId,PredictionString",
        f"ILSVRC2012_val_00000001,{FISH} 1 2 3 4",
        f"ILSVRC2012_val_00000002,{TENCH} 1 2 3 4 ",
    )
    solution = "\n".join(rows)
    index = "ILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000002.JPEG 0\n"
    for file, text in (("LOC_val_solution.csv", solution), ("val.txt", index)):
        for path in paths:
            beside = put(folder if path == folder else tmp_path / "tar", {file: text}) / file
            source = ImageNet(path, "val")
            assert [source[i].meta["wnid"] for i in range(2)] == [FISH, TENCH]
            beside.unlink()
    # As Kaggle's archive unpacks.
    kaggle = {f"ILSVRC/Data/CLS-LOC/val/{name}": data for name, data in flat.items()}
    unpacked = put(tmp_path / "kaggle", {**kaggle, "LOC_val_solution.csv": solution})
    assert len(ImageNet(unpacked, "val")) == 2


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        ({}, "train", "found nothing"),
        ({"cats/1.jpg": jpeg()}, "train", r"found cats.*n01440764/.*image-net\.org"),
        ({"train/n01440764/1.JPEG": jpeg()}, "val", "found train"),
        ({"n01440764/readme.txt": b""}, "train", "no images"),
        ({"n00004475/1.JPEG": jpeg()}, "train", "no ILSVRC2012 class: n00004475"),
    ],
)
def test_wrong_imagenet_layouts(tmp_path, files, split, words):
    with pytest.raises(VugenError, match=words):
        ImageNet(put(tmp_path, files), split)


def test_wrong_imagenet_paths(tmp_path):
    put(
        tmp_path,
        {"a.zip": b"PK", "val/n01440764/1.JPEG": jpeg(), "coco.tar": tar_of({"train2017/1.jpg": jpeg()})},
    )
    for name, words in (
        ("none", "there is no"),
        ("a.zip", "neither a tar nor"),
        ("coco.tar", "found neither"),
    ):
        with pytest.raises(VugenError, match=words):
            ImageNet(tmp_path / name)
    with pytest.raises(VugenError, match="use --split val"):
        ImageNet(tmp_path / "val")
    put(tmp_path, {"plain.tar": tar_of({f"train/{name}": data for name, data in PICTURES.items()})})
    with pytest.raises(VugenError, match="found train/"):
        ImageNet(tmp_path / "plain.tar", "val")


def test_truncated_tars_are_named(tmp_path):
    layouts = imagenet_layouts(tmp_path)
    for name in ("the official tar", "a plain tar"):
        whole = layouts[name].read_bytes()
        for keep in (0.1, 0.2, 0.3, 0.4):
            cut = put(tmp_path, {"cut.tar": whole[: int(len(whole) * keep)]}) / "cut.tar"
            with pytest.raises(VugenError, match=r"cut\.tar.*again"):
                ImageNet(cut)
    put(layouts["class tars"], {f"{FISH}.tar": class_tars()[f"{FISH}.tar"][:3000]})
    with pytest.raises(VugenError, match=rf"{FISH}\.tar.*again"):
        ImageNet(layouts["class tars"])
    for data in (b"not a tar at all" * 100, b"\x1f\x8b\x08\0" + b"\0" * 2000):
        with pytest.raises(VugenError, match="uncompressed tar"):
            ImageNet(put(tmp_path, {"junk.tar": data}) / "junk.tar")


def test_a_tar_cut_after_it_was_listed_costs_only_what_is_lost(tmp_path):
    path = put(tmp_path, {"bare.tar": tar_of(PICTURES)}) / "bare.tar"
    source = ImageNet(path)
    path.write_bytes(path.read_bytes()[:5000])
    manifest = write_dataset(source, tmp_path / "out", size=16)
    train = manifest.splits["train"]
    assert 0 < train.count < 6 and train.count + train.skipped_count == 6
    assert "cut short" in next(read_skipped(tmp_path / "out", "train")).reason


@pytest.mark.parametrize(
    ("dataset", "variable", "words"),
    [
        ("imagenet", "IMAGENET_DIR", r"ILSVRC2012_img_train\.tar.*\$IMAGENET_DIR"),
        ("coco", "COCO_DIR", r"annotations_trainval2017\.zip.*\$COCO_DIR"),
    ],
)
def test_without_a_source_it_says_what_to_get(monkeypatch, tmp_path, dataset, variable, words):
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(VugenError, match=words):
        open_source(dataset, None, "train", 64, None, 0)
    monkeypatch.setenv(variable, str(tmp_path / "gone"))
    with pytest.raises(VugenError, match="gone"):
        open_source(dataset, None, "train", 64, None, 0)


@pytest.mark.parametrize("dataset", ["folder", "captions", "webdataset", "hf"])
def test_sources_that_must_be_named_and_exist(tmp_path, dataset):
    with pytest.raises(VugenError, match="needs --source"):
        open_source(dataset, None, "train", 64, None, 0)
    with pytest.raises(VugenError, match="there is no"):
        open_source(dataset, tmp_path / "none", "train", 64, None, 0)


# --- COCO


def coco_table(**changes) -> str:
    table = {
        "images": [
            {"id": 7, "file_name": "b.jpg", "license": 1},
            {"id": 3, "file_name": "a.jpg", "license": 1},
        ],
        "annotations": [
            {"id": 10 - i, "image_id": image, "caption": f"caption {10 - i} of {image}\n"}
            for image in (3, 7)
            for i in range(5)
        ],
        "licenses": [{"id": 1, "url": "http://licence"}],
    }
    return json.dumps(table | changes)


@pytest.mark.parametrize(("year", "images"), [("2017", ""), ("2014", ""), ("2017", "images/")])
@pytest.mark.parametrize("split", ["train", "val"])
def test_coco(tmp_path, year, images, split):
    folder = f"{images}{split}{year}"
    files = {
        f"{folder}/a.jpg": jpeg(1),
        f"{folder}/b.jpg": jpeg(2),
        f"annotations/captions_{split}{year}.json": coco_table(),
    }
    source = CocoCaptions(put(tmp_path, files), split)
    assert [source[i].key for i in range(2)] == ["a.jpg", "b.jpg"]
    assert source[1].captions == [f"caption {i} of 7\n" for i in range(6, 11)]
    assert source[0].meta == {"image_id": 3, "image_licence": "http://licence"}
    write_dataset(source, tmp_path / "out", split, size=16)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("{", "no COCO caption file"),
        ("[]", "no COCO caption file"),
        (coco_table(annotations=[{"image_id": 3}]), "no COCO caption file"),
        (coco_table(annotations=[]), "no captioned images"),
        (coco_table(images=[{"id": 3, "file_name": "../../secret.jpg"}]), "secret"),
    ],
)
def test_damaged_coco_tables(tmp_path, table, words):
    put(tmp_path, {"annotations/captions_train2017.json": table, "train2017/a.jpg": jpeg()})
    with pytest.raises(VugenError, match=words):
        CocoCaptions(tmp_path)


def test_wrong_coco_layouts(tmp_path):
    with pytest.raises(VugenError, match=r"captions_train2017\.json; found nothing"):
        CocoCaptions(tmp_path)
    put(tmp_path, {"annotations/captions_train2017.json": coco_table()})
    with pytest.raises(VugenError, match=r"no train2017/ folder.*train2017\.zip"):
        CocoCaptions(tmp_path)
    with pytest.raises(VugenError, match=r"captions_val2017.*found annotations"):
        CocoCaptions(tmp_path, "val")
    with pytest.raises(VugenError, match=r"archive.*unpack"):
        CocoCaptions(put(tmp_path, {"coco.tar": tar_of({})}) / "coco.tar")


# --- folders


def test_class_folders(tmp_path):
    put(
        tmp_path,
        {
            "train/big_cat/1.jpg": jpeg(1),
            "train/big_cat/more/2.PNG": jpeg(2, "PNG"),
            "train/dog/1.webp": jpeg(3, "WEBP"),
            "train/dog/2.jfif": jpeg(4),
        },
    )
    put(
        tmp_path,
        {
            "test/dog/9.jpg": jpeg(9),
            "train/dog/notes.md": "",
            "train/.cache/1.jpg": jpeg(),
            "train/dog/._1.jpg": b"",
        },
    )
    source = ImageFolder(tmp_path)
    assert list(content(source)) == ["big_cat/1.jpg", "big_cat/more/2.PNG", "dog/1.webp", "dog/2.jfif"]
    assert source[0].captions == ["big cat"] and source[0].meta == {"class": "big cat", "label": 0}
    assert list(content(ImageFolder(tmp_path, "val"))) == ["dog/9.jpg"]
    assert content(ImageFolder(tmp_path / "train")) == content(source)


def test_splits_are_known_whatever_their_case(tmp_path):
    put(tmp_path, {"Train/cat/1.jpg": jpeg(), "Testing/cat/2.jpg": jpeg()})
    assert list(content(ImageFolder(tmp_path))) == ["cat/1.jpg"]
    assert list(content(ImageFolder(tmp_path, "val"))) == ["cat/2.jpg"]


def test_what_folders_are_taken_for_is_said_and_pictures_of_a_phone_are_skipped_aloud(tmp_path, capsys):
    put(tmp_path / "in", {"set/cat/1.jpg": jpeg(), "set/cow/2.HEIC": b"no picture that Pillow reads"})
    prepare("folder", tmp_path / "in", tmp_path / "out", size=16)
    said = "1 images of 16 px in 1 shards, 1 skipped (listed in skipped-train.jsonl); 1 classes: set"
    assert said in capsys.readouterr().out


def test_labels_of_all_splits_index_the_classes_of_the_set(tmp_path):
    names = ["train/cat", "train/dog", "train/emu", "val/ant", "val/cat", "val/emu"]
    put(tmp_path / "in", {f"{name}/1.jpg": jpeg() for name in names})
    for split in ("train", "val"):
        manifest = write_dataset(ImageFolder(tmp_path / "in", split), tmp_path / "out", split, size=16)
    assert manifest.classes == ["cat", "dog", "emu", "ant"]
    for split, labels in (("train", {0, 1, 2}), ("val", {0, 2, 3})):
        prepared = WebDatasetShards(tmp_path / "out", split)
        found = [prepared[i].meta for i in range(3)]
        assert {meta["label"] for meta in found} == labels
        assert all(manifest.classes[meta["label"]] == meta["class"] for meta in found)
    # A lost shard is written again with the same labels.
    (tmp_path / "out" / "val-000000.tar").unlink()
    write_dataset(ImageFolder(tmp_path / "in", "val"), tmp_path / "out", "val", size=16)


def test_labels_that_classes_of_one_name_would_confuse_are_refused(tmp_path):
    cranes = ("n02012849", "n03126707")
    put(tmp_path / "in", {f"train/{wnid}/1.JPEG": jpeg() for wnid in (TENCH, *cranes)})
    put(tmp_path / "in", {f"val/{wnid}/1.JPEG": jpeg() for wnid in cranes})
    write_dataset(ImageNet(tmp_path / "in"), tmp_path / "out", size=16)
    with pytest.raises(VugenError, match=r"two of one name.*another --out"):
        write_dataset(ImageNet(tmp_path / "in", "val"), tmp_path / "out", "val", size=16)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_names_that_are_not_utf_8_are_read_or_listed(tmp_path):
    odd = os.fsdecode(b"caf\xe9")  # in Latin-1
    row = {"path": f"{odd}.jpg", "caption": "x"}
    root = tmp_path / odd
    sources = [
        ImageFolder(put(root / "folder", {f"{odd}/1.jpg": jpeg(), f"{odd}/{odd}.jpg": b"no picture"})),
        ImageNet(put(root / "net", {f"{TENCH}/1.JPEG": jpeg(), f"{TENCH}/{odd}.JPEG": b"no picture"})),
        CaptionedImages(
            put(root / "table", {f"{odd}.jpg": b"no picture", "1.jpg": jpeg(), "t.jsonl": "\n".join(
                map(json.dumps, [row, {"path": "1.jpg", "caption": "y"}]),
            )})
        ),
    ]  # fmt: skip
    for number, source in enumerate(sources):
        out = tmp_path / str(number)
        manifest = write_dataset(source, out, size=16)
        assert manifest.splits["train"].count == 1
        (skipped,) = read_skipped(out, "train")
        assert "caf?" in skipped.key and manifest.source.startswith(f"{tmp_path}/caf?/")


def test_flat_folder_says_file_names(tmp_path):
    put(tmp_path, {"a-red_car-01.jpg": jpeg(), "sunset 2.png": jpeg(0, "PNG"), "two 3 legs.jpg": jpeg()})
    captions = [sample.captions for sample in map(ImageFolder(tmp_path).__getitem__, range(3))]
    assert captions == [["a red car"], ["sunset"], ["two 3 legs"]]


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        ({"a.txt": ""}, "train", "holds no images; found a.txt"),
        ({"cat/1.jpg": b"", "2.jpg": b""}, "train", r"beside them \(2\.jpg\)"),
        ({"0001.jpg": b"", "0002.jpg": b""}, "train", "say nothing"),
        ({"train/cat/1.jpg": b""}, "val", "has a train/ folder but no val/"),
    ],
)
def test_wrong_folders(tmp_path, files, split, words):
    with pytest.raises(VugenError, match=words):
        ImageFolder(put(tmp_path, files), split)


def test_a_folder_that_is_an_archive_or_the_other_split(tmp_path):
    put(tmp_path, {"cifar10.tar": tar_of({}), "x.jpg": jpeg(), "val/cat/1.jpg": jpeg()})
    for name, words in (
        ("cifar10.tar", "unpack it"),
        ("x.jpg", "folder is expected"),
        ("val", "--split val"),
    ):
        with pytest.raises(VugenError, match=words):
            ImageFolder(tmp_path / name)


# --- captions


def test_text_beside_images(tmp_path):
    put(
        tmp_path,
        {
            "a.jpg": jpeg(1),
            "a.txt": "\ufeffone\ntwo\n\n",
            "sub/b.png": jpeg(2, "PNG"),
            "sub/b.txt": "three",
            "c.jpg": b"",
        },
    )
    manifest = write_dataset(CaptionedImages(tmp_path), tmp_path / "out", size=16)
    assert manifest.splits["train"].count == 2 and manifest.splits["train"].captions.count == 3
    assert CaptionedImages(tmp_path)[0].captions == ["one", "two", ""]
    (skipped,) = read_skipped(tmp_path / "out", "train")
    assert skipped.key.endswith("c.txt") and skipped.reason == "No such file or directory"
    before = CaptionedImages(tmp_path).fingerprint
    put(tmp_path, {"a.txt": "another"})
    assert CaptionedImages(tmp_path).fingerprint != before
    put(tmp_path, {"t.csv": "path,caption\na.jpg,x\n"})
    with pytest.raises(VugenError, match=r"a \.txt beside them and t\.csv too: point --source at "):
        CaptionedImages(tmp_path)
    assert len(CaptionedImages(tmp_path / "t.csv")) == 1


def test_captions_are_utf_8_or_16_or_cost_their_sample(tmp_path):
    texts = {
        "a.txt": "\ufeffcafé".encode(),
        "b.txt": "café\n".encode("utf-16"),
        "c.txt": "café".encode("latin-1"),
        "d.txt": "café".encode(),
    }
    pictures = {f"{name[0]}.jpg": jpeg(i) for i, name in enumerate(texts)}
    shards = {"0.tar": tar_of(dict(sorted({**pictures, **texts}.items())))}
    sources = [
        CaptionedImages(put(tmp_path / "files", {**pictures, **texts})),
        WebDatasetShards(put(tmp_path / "shards", shards)),
    ]
    for number, source in enumerate(sources):
        assert [source[i].captions for i in (0, 1, 3)] == [["café"]] * 3
        out = tmp_path / f"out{number}"
        assert write_dataset(source, out, size=16).splits["train"].count == 3
        (skipped,) = read_skipped(out, "train")
        assert skipped.reason == "the caption is no UTF-8" and skipped.key in ("c.jpg", "0.tar/c")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'Image,Caption\nimg/a.jpg,"a cat, sitting"\nimg/b.jpg,b\n./img/a.jpg,again\n'),
        (
            "t.tsv",
            "split\tfilename\ttext\nx\timg/a.jpg\ta cat, sitting\nx\timg/b.jpg\tb\nx\timg/a.jpg\tagain\n",
        ),
        (
            "t.jsonl",
            '{"file_name": "img/a.jpg", "caption": ["a cat, sitting", "again"]}\n\n'
            '{"path": "img/b.jpg", "text": "b"}\n',
        ),
    ],
)
def test_tables(tmp_path, name, text):
    put(tmp_path, {"img/a.jpg": jpeg(1), "img/b.jpg": jpeg(2), name: text})
    for path in (tmp_path, tmp_path / name):
        assert content(CaptionedImages(path)) == {
            "img/a.jpg": (["a cat, sitting", "again"], jpeg(1)),
            "img/b.jpg": (["b"], jpeg(2)),
        }


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", ".."])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_paths_that_leave_the_folder_are_refused(tmp_path, path, kind):
    put(tmp_path, {"secret.jpg": jpeg()})
    text = f"path,caption\n{path},x\n" if kind == "csv" else json.dumps({"path": path, "caption": "x"})
    with pytest.raises(VugenError, match=r"line \d.*leaves the table's folder"):
        CaptionedImages(put(tmp_path / "data", {f"t.{kind}": text}))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"t.csv": "a,b\n1,2\n"}, "line 2: expected a column named path.*found a, b"),
        ({"t.csv": "path,caption\nx.jpg,a\n,b\n"}, "line 3 names no image: remove the line"),
        ({"t.jsonl": '{"path": null, "caption": "a"}'}, "line 1 names no image"),
        ({"t.jsonl": '{"path": "x.jpg", "caption": 5}'}, "line 1: its caption is no text but 5"),
        ({"train/1.jpg": b"", "train/1.txt": "a", "car/2.jpg": b""}, r"train/ beside car: rename it"),
        ({"t.csv": "path,caption\n"}, "no lines below"),
        ({"t.csv": "path,caption\nx.jpg\n"}, "line 2 ends before its caption"),
        ({"t.csv": "path,caption\nx.jpg,a dog, running\n"}, "line 2: more values than columns: quote a"),
        ({"t.tsv": "path\tcaption\nx.jpg\ta\tb\n"}, "line 2: more values than columns: a tab in a"),
        ({"t.csv": 'path,caption\nx.jpg,a\ny.jpg,"b\nz.jpg,c\n'}, "about line 2: unexpected end of data"),
        ({"t.csv": 'path,caption\nx.jpg,"say "hi" you"\n'}, "about line 0: ',' expected after"),
        ({"t.jsonl": "{"}, "cannot be read as UTF-8 jsonl, about line 1: Expecting property name"),
        ({"t.jsonl": '{"path": "x.jpg", "caption": [{"text": "a"}]}'}, "line 1: caption is no text"),
        ({"t.jsonl": "[1]"}, "line 1.*found none"),
        ({"t.csv": b"path,caption\na.jpg,\xff\xfe\n"}, "UTF-8"),
        ({"a.jpg": b"", "b.jpg": b""}, r"found a\.jpg, b\.jpg"),
        ({"t.csv": "", "u.csv": ""}, r"not exactly one .*found t\.csv, u\.csv"),
    ],
)
def test_wrong_captions(tmp_path, files, words):
    with pytest.raises(VugenError, match=words):
        CaptionedImages(put(tmp_path, files))


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    put(tmp_path, {"a/b/x.jpg": b"", "elsewhere/y.jpg": b""})
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "b" / "on").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "b" / "itself").symlink_to("itself")
    assert list(image_paths(tmp_path / "a")) == ["b/on/y.jpg", "b/x.jpg"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "a" / "b")  # each leads to the other
    assert list(image_paths(tmp_path / "a")) == ["b/on/y.jpg", "b/x.jpg"]


def test_a_folder_named_as_a_split_beside_classes_is_refused(tmp_path):
    put(tmp_path, {f"{name}/red {n}.jpg": jpeg(n) for name in ("bus", "train", "boat") for n in range(2)})
    with pytest.raises(VugenError, match=r"has train/ beside boat, bus: rename it"):
        ImageFolder(tmp_path)
    split = put(tmp_path / "split", {"train/red 1.jpg": jpeg(1), "annotations/a.json": "{}"})
    assert ImageFolder(split).classes == ImageFolder(tmp_path / "bus").classes == []


def test_a_null_is_no_caption(tmp_path):
    text = '{"path": "a.jpg", "caption": null}\n{"path": "b.jpg", "caption": ["x", null]}\n'
    put(tmp_path, {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "t.jsonl": text})
    assert content(CaptionedImages(tmp_path)) == {"a.jpg": ([], jpeg(1)), "b.jpg": (["x"], jpeg(2))}


def test_missing_pictures_of_a_table_are_listed(tmp_path):
    put(tmp_path, {"a.jpg": jpeg(), "t.csv": "path,caption\na.jpg,x\ngone.jpg,y\n"})
    manifest = write_dataset(CaptionedImages(tmp_path), tmp_path / "out", size=16)
    (skipped,) = read_skipped(tmp_path / "out", "train")
    assert manifest.splits["train"].count == 1 and skipped.reason == "No such file or directory"
    assert skipped.key.endswith("gone.jpg")


@pytest.mark.parametrize("left", ["an empty mount point", "nothing"])
def test_a_source_that_goes_away_ends_the_run_and_is_not_skipped(tmp_path, left):
    source = ImageFolder(put(tmp_path / "in", {f"cat/{i}.jpg": jpeg(i) for i in range(4)}))
    shutil.rmtree(tmp_path / "in")
    if left != "nothing":
        (tmp_path / "in").mkdir()
    with pytest.raises(VugenError, match=r"cannot read .*cat/.*run the same command again, which goes on"):
        write_dataset(source, tmp_path / "out", size=16)
    put(tmp_path / "in", {f"cat/{i}.jpg": jpeg(i) for i in range(4)})
    manifest = write_dataset(ImageFolder(tmp_path / "in"), tmp_path / "out", size=16)
    assert manifest.splits["train"].count == 4 and not manifest.splits["train"].skipped_count


# --- webdataset


def test_plain_endings_come_first_and_an_ending_that_comes_again_begins_a_sample(tmp_path):
    files = {"0.depth.png": b"depth", "0.jpg": b"0", "0.old.txt": b"old", "0.txt": b"new"}
    again = [("1.jpg", b"1"), ("1.jpg", b"2"), ("1.txt", b"two")]
    put(tmp_path, {"a.tar": tar_of([*files.items(), *again])})
    source = WebDatasetShards(tmp_path)
    found = [(sample.image, sample.captions) for sample in map(source.__getitem__, range(len(source)))]
    assert found == [(b"0", ["new"]), (b"1", []), (b"2", ["two"])]


def test_pictures_whose_names_have_more_dots_are_not_taken_for_one(tmp_path):
    files = {f"IMG.{n}.{kind}": b"x" for n in range(3) for kind in ("png", "txt")}
    put(tmp_path, {"a.tar": tar_of(files)})
    with pytest.raises(VugenError, match=r"IMG has several pictures \(0\.png, 1\.png, 2\.png\).*KEY\.jpg"):
        WebDatasetShards(tmp_path)


def test_shards_are_listed_once_and_again_when_they_change(tmp_path, monkeypatch):
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path / "cache"))
    sample = {"a.jpg": jpeg(), "a.txt": b"x"}
    put(tmp_path / "in", {"0.tar": tar_of(sample), "1.tar": tar_of(sample)})
    listed = []
    inner = shards.tar_members
    monkeypatch.setattr(shards, "tar_members", lambda path: listed.append(path.name) or inner(path))
    for _ in range(2):
        source = WebDatasetShards(tmp_path / "in")
        assert [source[i].key for i in range(len(source))] == ["0.tar/a", "1.tar/a"]
        shards._listing.cache_clear()
    assert listed == ["0.tar", "1.tar"]
    (tmp_path / "in" / "1.tar").write_bytes(tar_of(sample | {"b.jpg": jpeg(1), "b.txt": b"y"}))
    assert [s.captions for s in map(WebDatasetShards(tmp_path / "in").__getitem__, range(3))][2] == ["y"]
    assert listed == ["0.tar", "1.tar", "1.tar"]
    next((tmp_path / "cache").rglob("*.npz")).write_bytes(b"junk")
    shards._listing.cache_clear()
    assert len(WebDatasetShards(tmp_path / "in")) == 3


def test_a_source_of_shards_travels_light(tmp_path):
    """What a worker is sent does not grow with the samples."""
    few, many = ({f"{i:05d}.{k}": b"x" for i in range(n) for k in ("jpg", "txt")} for n in (3, 300))
    sent = [
        len(pickle.dumps(WebDatasetShards(put(tmp_path / str(n), {"0.tar": tar_of(files)}) / "0.tar")))
        for n, files in enumerate((few, many))
    ]
    assert abs(sent[0] - sent[1]) < 16


def test_shards_as_img2dataset_writes_them(tmp_path):
    meta = {"caption": "from json", "url": "http://x", "key": "000000001", "status": "success"}
    put(
        tmp_path,
        {
            "00000.tar": tar_of(
                {
                    "000000000.jpg": jpeg(0),
                    "000000000.json": json.dumps({"caption": "ignored", "url": "u"}).encode(),
                    "000000000.txt": b"from text",
                    "000000001.json": json.dumps(meta).encode(),
                    "000000001.webp": jpeg(1, "WEBP"),
                    "000000002.json": b'{"status": "failed_to_download"}',
                }
            ),
            "00001.tar": tar_of(
                {"./d/000000003.png": jpeg(3, "PNG"), "./d/000000003.cls": b"1", "./d/000000003.json": b"{"}
            ),
            "00000_stats.json": "{}",
        },
    )
    source = WebDatasetShards(tmp_path)
    assert len(source) == 4
    assert (source[0].captions, source[0].meta) == (["from text"], {"url": "u"})
    assert source[1].captions == ["from json"] and source[1].image == jpeg(1, "WEBP")
    assert source[1].meta["url"] == "http://x" and source[1].key == "00000.tar/000000001"
    write_dataset(source, tmp_path / "out", size=16)
    skipped = {item.key: item.reason for item in read_skipped(tmp_path / "out", "train")}
    assert skipped["00000.tar/000000002"] == "no image in the sample"
    assert "damaged .json" in skipped["00001.tar/d/000000003"]
    # And our own shards are webdataset shards.
    again = WebDatasetShards(tmp_path / "out")
    assert sorted(c for i in range(2) for c in again[i].captions) == ["from json", "from text"]


def test_captions_that_are_no_text_cost_their_sample_alone_and_nulls_are_dropped(tmp_path):
    said = {
        "number": '{"caption": 5}',
        "nan": '{"caption": NaN}',
        "deep": "[" * 100_000,
        "null": '{"caption": ["a dog", null]}',
        "empty": '{"caption": "", "text": "a cat"}',
        "list": '["of", "somebody\'s", "own"]',
    }
    files = {f"{key}.{kind}": jpeg() for key in said for kind in ("jpg", "json")}
    files |= {f"{key}.json": text.encode() for key, text in said.items()}
    files["list.txt"] = b"a bird"
    source = WebDatasetShards(put(tmp_path, {"0.tar": tar_of(files)}))
    manifest = write_dataset(source, tmp_path / "out", size=16)
    assert [source[i].captions for i in (3, 4, 5)] == [["a dog"], ["a cat"], ["a bird"]]
    assert manifest.splits["train"].count == 3
    reasons = {skipped.key: skipped.reason for skipped in read_skipped(tmp_path / "out", "train")}
    assert reasons.keys() == {"0.tar/number", "0.tar/nan", "0.tar/deep"}
    assert reasons["0.tar/nan"].endswith("caption is no text") and "recursion" in reasons["0.tar/deep"]


def test_hidden_files_are_no_data(tmp_path):
    sample = {"a.jpg": jpeg(), "a.txt": b"x"}
    put(tmp_path / "tars", {"0.tar": tar_of(sample), "._0.tar": b"macOS", ".x.tar.ab.tar": tar_of(sample)})
    assert len(WebDatasetShards(tmp_path / "tars")) == 1
    put(tmp_path / "table", {"a.jpg": jpeg(), "t.csv": "path,caption\na.jpg,x\n", "._t.csv": b"\xff"})
    assert len(CaptionedImages(tmp_path / "table")) == 1
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    put(tmp_path / "rows", {"._0.parquet": b"macOS", "data/._0.parquet": b"macOS"})
    pq.write_table(pa.table({"image": [jpeg()], "text": ["x"]}), tmp_path / "rows" / "0.parquet")
    assert len(HuggingFaceDataset(tmp_path / "rows")) == 1


def test_wrong_shards(tmp_path):
    with pytest.raises(VugenError, match=r"no \.tar shards"):
        WebDatasetShards(tmp_path)
    put(tmp_path, {"a.tar": tar_of({"x.jpg": jpeg(), "y.bin": b""})})
    with pytest.raises(VugenError, match=r"no webdataset samples.*found x\.jpg, y\.bin"):
        WebDatasetShards(tmp_path)
    put(tmp_path, {"b.tar": tar_of({"x.jpg": jpeg(), "x.txt": b"x"})[:900]})
    with pytest.raises(VugenError, match=r"b\.tar.*again"):
        WebDatasetShards(tmp_path)


def test_resharding_into_the_source_is_refused(tmp_path):
    put(tmp_path, {"train-000000.tar": tar_of({"x.jpg": jpeg(), "x.txt": b"x"})})
    before = (tmp_path / "train-000000.tar").read_bytes()
    with pytest.raises(VugenError, match="another --out"):
        prepare("webdataset", source=tmp_path, out=tmp_path, workers=1)
    assert (tmp_path / "train-000000.tar").read_bytes() == before


# --- Hugging Face


def test_hf_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = {
        "image": [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(5)],
        "text": [f"text {i}" for i in range(5)],
    }
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    pq.write_table(
        pa.table({k: v[:1] for k, v in rows.items()}), tmp_path / "data" / "test-00000-of-00001.parquet"
    )
    source = HuggingFaceDataset(tmp_path)
    assert [source[i].captions for i in range(5)] == [[f"text {i}"] for i in range(5)]
    assert all(source[i].image == jpeg(i) for i in range(5))
    assert len(HuggingFaceDataset(tmp_path, "val")) == 1
    write_dataset(source, tmp_path / "one", size=16, shard_size=2)
    write_dataset(source, tmp_path / "two", size=16, shard_size=2, workers=2)
    assert (tmp_path / "one/dataset.json").read_bytes() == (tmp_path / "two/dataset.json").read_bytes()
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"a": [1]}), bad)
    with pytest.raises(VugenError, match="has the columns a"):
        HuggingFaceDataset(bad)
    bad.write_bytes(b"PAR1" + b"\0" * 50)
    with pytest.raises(VugenError, match="cannot be read"):
        HuggingFaceDataset(bad)


def test_hf_captions_that_are_no_text_cost_their_row_alone(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    nested = [[{"raw": "a dog"}], None]
    for name, values in (("numbers", [5, None]), ("lists", [["a dog", None], None]), ("nested", nested)):
        pq.write_table(pa.table({"image": [jpeg(), jpeg()], "text": values}), tmp_path / f"{name}.parquet")
    for name in ("numbers", "nested"):
        with pytest.raises(ValueError, match="caption is no text"):
            HuggingFaceDataset(tmp_path / f"{name}.parquet")[0]
    lists = HuggingFaceDataset(tmp_path / "lists.parquet")
    assert [lists[i].captions for i in range(2)] == [["a dog"], []]


def test_hf_reads_a_row_group_once_for_rows_that_follow_each_other(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = {"image": [jpeg(i) for i in range(6)], "text": [f"text {i}" for i in range(6)]}
    pq.write_table(pa.table(rows), tmp_path / "0.parquet", row_group_size=3)
    source, groups = HuggingFaceDataset(tmp_path), []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda *a, **b: groups.append(a[1]) or read(*a, **b)
    )
    assert [source[i].captions for i in range(6)] == [[f"text {i}"] for i in range(6)]
    assert groups == [0, 1] and len(pickle.dumps(source)) < 4000


def test_files_say_their_split_at_the_start_of_their_name_or_in_it():
    def of(split, *names):
        return [file.name for file in files_of_split([Path(name) for name in names], split)]

    named = ("cc3m-train-0000.tar", "cc3m-validation-0000.tar", "cc3m-test-0000.tar", "readme.tar")
    assert of("train", *named) == ["cc3m-train-0000.tar"]
    assert of("val", *named) == ["cc3m-validation-0000.tar"]
    assert of("val", "train_00.parquet", "test_00.parquet") == ["test_00.parquet"]
    assert of("train", "train-0.tar", "train-1.tar", "val.tar") == ["train-0.tar", "train-1.tar"]
    assert of("train", "test-0.tar") == of("val", "train-0.tar") == []
    assert of("val", "0.tar", "latest-1.tar", "trainset.tar") == ["0.tar", "latest-1.tar", "trainset.tar"]


def test_hf_takes_no_held_out_files_for_training(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [jpeg()], "text": ["x"]}), tmp_path / "validation-0.parquet")
    with pytest.raises(VugenError, match=r"holds no train split .*found validation-0\.parquet"):
        HuggingFaceDataset(tmp_path)
    assert len(HuggingFaceDataset(tmp_path, "val")) == 1


def test_hf_keeps_few_of_many_files_open(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def opened() -> int:
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and os.readlink(link).startswith(str(tmp_path)) for link in links)

    monkeypatch.setattr(hf, "MOST_OPEN", 2)
    for i in range(6):
        pq.write_table(pa.table({"image": [jpeg(i)], "text": [f"text {i}"]}), tmp_path / f"{i}.parquet")
    source = HuggingFaceDataset(tmp_path)
    assert len(source) == 6 and opened() <= 2
    for i in [*range(6), 0, 5, 4]:
        assert source[i].captions == [f"text {i}"] and source[i].image == jpeg(i)
    deadline = time.monotonic() + 10
    while opened() > 2 and time.monotonic() < deadline:  # pyarrow's threads let go of a file when they can
        time.sleep(0.05)
    assert opened() == 2


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_hf_reads_a_path_that_is_not_utf_8(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"image": [jpeg()], "text": ["x"]}), file)
    source = HuggingFaceDataset(put(tmp_path / os.fsdecode(b"caf\xe9"), {"0.parquet": file.getvalue()}))
    assert len(source) == 1 and source[0].captions == ["x"]


def test_hf_save_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["big_cat", "dog"])}
    )
    rows = {"img": [{"bytes": jpeg(i), "path": None} for i in range(4)], "label": [0, 1, 1, 0]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "both")
    for path in (tmp_path / "one", tmp_path / "both"):
        source = HuggingFaceDataset(path)
        assert source.classes == ["big_cat", "dog"]
        assert [source[i].captions for i in range(4)] == [["big cat"], ["dog"], ["dog"], ["big cat"]]
        assert [source[i].image for i in range(4)] == [jpeg(i) for i in range(4)]
    assert HuggingFaceDataset(tmp_path / "both", "val")[0].meta == {"class": "dog", "label": 1}
    for state, message in (("{", "is damaged"), ('{"_data_files": []}', "names no files")):
        (tmp_path / "one" / "state.json").write_text(state)
        with pytest.raises(VugenError, match=rf"state\.json {message}"):
            HuggingFaceDataset(tmp_path / "one")


def test_hf_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(VugenError, match=r"pip install 'vugen-cli\[hf\]'"):
        HuggingFaceDataset(tmp_path)


def test_hf_of_another_layout(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(VugenError, match=r"found a\.txt"):
        HuggingFaceDataset(put(tmp_path, {"a.txt": ""}))


# --- real samples


@pytest.mark.skipif(not (SHARED / "imagenet-sample.tar").exists(), reason="the ImageNet sample is not here")
def test_real_imagenet(tmp_path):
    tar = SHARED / "imagenet-sample.tar"
    manifest = write_dataset(ImageNet(tar), tmp_path / "out", size=64, count=60)
    assert manifest.splits["train"].count == 60 and len(manifest.classes) == 1000


@pytest.mark.skipif(not (SHARED / "coco-mini.tar").exists(), reason="the COCO sample is not here")
def test_real_coco(tmp_path):
    with tarfile.open(SHARED / "coco-mini.tar") as tar:
        tar.extractall(tmp_path / "coco", filter="data")
    manifest = write_dataset(CocoCaptions(tmp_path / "coco"), tmp_path / "out")
    train = manifest.splits["train"]
    assert (train.count, train.captions.count, train.captions.per_image) == (80, 400, 5.0)
