"""Every kind of image set reads to the same arrays; bad images are named; bad containers end in one line."""

import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from vugen_cli.errors import VugenError
from vugen_cli.metrics import image_sets
from vugen_cli.metrics.image_sets import image_batches, npz_names, open_image_set

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 24, 20, 3), dtype=np.uint8)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def bomb(side=60_000):
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_dataset(path, splits):
    path.mkdir()
    manifest = {"format": 2, "dataset": "made up", "size": 24, "splits": {}}
    for split, shards in splits.items():
        entries = []
        for index, rows in enumerate(shards):
            name = f"{split}-{index:06d}.tar"
            members = [(f"{row}.{kind}", data) for row in rows for kind, data in _sample(row)]
            write_tar(path / name, members)
            entries.append({"name": name, "samples": len(rows), "bytes": 1, "sha256": "0" * 64})
        manifest["splits"][split] = {"count": sum(map(len, shards)), "shards": entries}
    (path / "dataset.json").write_text(json.dumps(manifest))
    return path


def _sample(row):
    return [("png", png(PIXELS[row])), ("txt", b"a caption"), ("json", b"{}")]


def read(image_set):
    return [image.transpose(1, 2, 0) for image in image_set]


def assert_rows(image_set, rows):
    images = read(image_set)
    assert len(images) == image_set.count == len(rows)
    for image, row in zip(images, rows, strict=True):
        assert image.dtype == np.uint8 and np.array_equal(image, PIXELS[row])


def test_folder_is_recursive_and_sorted(tmp_path):
    for name, row in (("b.png", 1), ("a.PNG", 0), ("deep/er/c.png", 2)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(PIXELS[row]))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.png").write_text("what macOS leaves behind")
    images = open_image_set(tmp_path)
    assert (images.kind, images.total) == ("folder", 3)
    assert_rows(images, [0, 1, 2])
    assert_rows(images, [0, 1, 2])  # a set can be read again
    assert images.describe().written() == {"path": str(tmp_path), "kind": "folder", "count": 3, "bad": []}


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "webp", "bmp"])
def test_formats(tmp_path, suffix):
    Image.fromarray(PIXELS[0]).save(tmp_path / f"a.{suffix}")
    (image,) = read(open_image_set(tmp_path))
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        assert np.array_equal(image, np.asarray(opened.convert("RGB")))


def test_samples_are_what_the_listing_names(tmp_path):
    for name, row in (("b.png", 1), ("a.png", 0), ("grid.png", 2)):
        (tmp_path / name).write_bytes(png(PIXELS[row]))
    rows = [{"file": name, "prompt": "x"} for name in ("b.png", "a.png", "b.png", "gone.png")]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    images = open_image_set(tmp_path)
    assert (images.kind, images.total) == ("samples", 3)
    assert_rows(images, [1, 0])
    assert len(images.bad) == 1 and images.bad[0].startswith("gone.png: ")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "link/secret.png"])
def test_samples_stay_in_their_folder(tmp_path, name):
    folder = tmp_path / "samples"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(PIXELS[0]))
    (folder / "link").symlink_to(tmp_path)
    (folder / "samples.jsonl").write_text(json.dumps({"file": name}))
    with pytest.raises(VugenError, match="outside its folder"):
        open_image_set(folder)


@pytest.mark.parametrize("text", ['{"prompt": "x"}', "[1]", "{", '{"file": 3}'])
def test_bad_listing(tmp_path, text):
    (tmp_path / "samples.jsonl").write_text(text)
    with pytest.raises(VugenError, match=r"samples\.jsonl"):
        open_image_set(tmp_path)


def test_prepared_data_set(tmp_path):
    data = write_dataset(tmp_path / "data", {"train": [[0, 1], [2]], "val": [[3], [4]]})
    images = open_image_set(data)
    assert (images.kind, images.total, images.split) == ("shards", 2, "val")
    assert_rows(images, [3, 4])
    assert images.describe().split == "val"
    assert_rows(open_image_set(data, limit=1), [3])
    only_train = write_dataset(tmp_path / "other", {"train": [[0]]})
    assert open_image_set(only_train).split == "train"


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "[]",
        "{}",
        '{"splits": {"train": {}}}',
        '{"splits": {"train": {"shards": [{"name": "../x.tar", "samples": 1}]}}}',
        '{"splits": {"train": {"shards": [{"name": "gone.tar", "samples": 1}]}}}',
        '{"splits": {"train": {"shards": []}}}',
    ],
)
def test_bad_manifest(tmp_path, manifest):
    data = tmp_path / "data"
    data.mkdir()
    write_tar(tmp_path / "x.tar", [("0.png", png(PIXELS[0]))])
    (data / "dataset.json").write_text(manifest)
    with pytest.raises(VugenError):
        open_image_set(data)


def test_tars(tmp_path):
    write_tar(tmp_path / "b.tar", [("1.png", png(PIXELS[1])), ("1.txt", b"")])
    write_tar(tmp_path / "a.tar", [("../0.png", png(PIXELS[0]))])
    assert_rows(open_image_set(tmp_path / "b.tar"), [1])
    folder = open_image_set(tmp_path)
    assert (folder.kind, folder.total) == ("tar", None)
    assert_rows(folder, [0, 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]  # nothing unpacked


def test_truncated_tar_ends_the_run(tmp_path):
    big = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_tar(tmp_path / "a.tar", [("0.png", png(PIXELS[0])), ("1.png", png(big))])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:6000])
    with pytest.raises(VugenError, match=r"a\.tar is cut short"):
        list(open_image_set(tmp_path / "a.tar"))
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(VugenError, match=r"a\.tar is not a whole, uncompressed tar"):
        list(open_image_set(tmp_path / "a.tar"))


def test_zip(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/0.png", png(PIXELS[0]))
        archive.writestr("../1.png", png(PIXELS[1]))
        archive.writestr("__MACOSX/x/._0.png", b"")
        archive.writestr("readme.txt", b"")
    images = open_image_set(path)
    assert (images.kind, images.total) == ("zip", 2)
    assert_rows(images, [0, 1])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(VugenError, match=r"images\.zip is truncated"):
        open_image_set(path)


def test_zip_with_a_damaged_member(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for row in range(2):
            archive.writestr(f"{row}.png", png(PIXELS[row]))
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    images = open_image_set(path)
    assert_rows(images, [1])
    assert len(images.bad) == 1 and images.bad[0].startswith("0.png: ")


def test_oversized_members_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "MAX_FILE_BYTES", 3000)
    large = bytes(10_000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("large.png", large)
        archive.writestr("0.png", png(PIXELS[0]))
    write_tar(tmp_path / "a.tar", [("large.png", large), ("0.png", png(PIXELS[0]))])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "large.png").write_bytes(large)
    (folder / "0.png").write_bytes(png(PIXELS[0]))
    for path in (tmp_path / "a.zip", tmp_path / "a.tar", folder):
        images = open_image_set(path)
        assert_rows(images, [0])
        assert len(images.bad) == 1 and "10000 bytes is too large" in images.bad[0]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_batch(tmp_path, save):
    save(tmp_path / "batch.npz", PIXELS, np.arange(5))
    images = open_image_set(tmp_path / "batch.npz")
    assert (images.kind, images.total) == ("npz", 5)
    assert_rows(images, range(5))
    assert npz_names(tmp_path / "batch.npz") == {"arr_0", "arr_1"}


def test_bad_npz(tmp_path):
    path = tmp_path / "batch.npz"
    for array in (
        PIXELS.astype(np.float32),
        PIXELS[0],
        PIXELS[..., :2],
        np.asfortranarray(PIXELS),
        np.array([{}], dtype=object),
        np.zeros((1, 1 << 15, 1 << 13, 3), np.uint8)[:0],
    ):
        np.savez(path, array)
        with pytest.raises(VugenError, match=r"batch\.npz"):
            open_image_set(path)
    np.savez(path, images=PIXELS)
    with pytest.raises(VugenError, match='expected "arr_0"'):
        open_image_set(path)
    # An array that ends before its header says: only reading finds out.
    stream = io.BytesIO()
    np.save(stream, PIXELS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", stream.getvalue()[:-100])
    with pytest.raises(VugenError, match="ends at image 4 of 5"):
        list(open_image_set(path))


def test_bad_images_are_named_and_counted(tmp_path):
    good = png(PIXELS[0])
    files = {
        "0_good.png": good,
        "1_truncated.png": good[: len(good) // 2],
        "2_empty.jpg": b"",
        "3_text.png": b"not an image",
        "4_bomb.png": bomb(),
        "5_good.png": png(PIXELS[1]),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "6_dangling.png").symlink_to(tmp_path / "nowhere")
    images = open_image_set(tmp_path)
    assert_rows(images, [0, 1])
    assert [entry.split(":")[0] for entry in images.bad] == [
        "1_truncated.png",
        "2_empty.jpg",
        "3_text.png",
        "4_bomb.png",
        "6_dangling.png",
    ]
    assert all("\n" not in entry for entry in images.bad)


def test_missing_empty_and_foreign_paths(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    for path in (tmp_path / "gone", tmp_path / "empty", tmp_path / "file.txt"):
        with pytest.raises(VugenError, match=path.name):
            open_image_set(path)
    with pytest.raises(VugenError, match="at least 1"):
        open_image_set(tmp_path, limit=0)


def test_batches_group_by_size_and_stay_bounded(tmp_path):
    sizes = [(16 + i % 7, 16) for i in range(60)]
    np.savez(tmp_path / "a.npz", PIXELS)
    assert [len(batch) for _, batch in image_batches(open_image_set(tmp_path / "a.npz"), 2)] == [2, 2, 1]
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index, size in enumerate(sizes):
        (folder / f"{index:02d}.png").write_bytes(png(np.full((*size, 3), index, np.uint8)))
    seen = []
    for positions, batch in image_batches(open_image_set(folder), 4):
        assert batch.ndim == 4 and batch.shape[1] == 3 and 1 <= len(batch) <= 4
        assert [int(image[0, 0, 0]) for image in batch] == positions
        seen += positions
    assert sorted(seen) == list(range(60)) != seen


def test_the_digest_is_of_names_and_bytes(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "0.png").write_bytes(png(PIXELS[0]))
    (folder / "1.png").write_bytes(b"no image")
    images = open_image_set(folder)
    first = images.digest()
    assert images.digest() == first and images.count == 0  # nothing is decoded
    moved = folder.rename(tmp_path / "b")
    assert open_image_set(moved).digest() == first
    assert open_image_set(moved, limit=1).digest() != first
    (moved / "1.png").write_bytes(b"no imagE")
    assert open_image_set(moved).digest() != first
    np.savez(tmp_path / "wide.npz", np.zeros((1, 16, 32, 3), np.uint8))
    np.savez(tmp_path / "tall.npz", np.zeros((1, 32, 16, 3), np.uint8))
    assert open_image_set(tmp_path / "wide.npz").digest() != open_image_set(tmp_path / "tall.npz").digest()


def test_reading_stops_cleanly(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    stream = iter(open_image_set(tmp_path / "a.npz"))
    next(stream)
    stream.close()
    assert_rows(open_image_set(tmp_path / "a.npz", limit=3), range(3))
