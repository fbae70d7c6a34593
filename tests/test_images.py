"""Decoding, the ADM crop and encoding of pictures."""

import contextlib
import io
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vugen_cli.data.images import MAX_PIXELS, adm_crop, decode, encode, is_lossless, scans


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth, colourful picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def reference_adm(image: Image.Image, size: int) -> np.ndarray:
    """guided_diffusion/image_datasets.py, center_crop_arr, in other words."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize(
    "shape",
    [(500, 375), (333, 500), (640, 480), (1025, 771), (64, 64), (100, 61), (40, 47), (256, 256), (900, 130)],
)
def test_crop_is_adms(shape, size):
    image = photo(*shape)
    rough = np.asarray(image).astype(int) + np.random.default_rng(1).integers(-40, 41, (*shape[::-1], 3))
    image = Image.fromarray(np.clip(rough, 0, 255).astype(np.uint8))
    ours, theirs = adm_crop(np.asarray(image), size), reference_adm(image, size)
    assert ours.shape == (size, size, 3) and ours.dtype == np.uint8
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 2
    assert difference.mean() < 0.02


def test_crop_of_the_right_size_changes_nothing():
    pixels = np.asarray(photo(64, 64))
    assert np.array_equal(adm_crop(pixels, 64), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_undone(orientation, kind):
    upright = photo(48, 32)
    # What a camera stores for each orientation: the inverse of what a viewer does.
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = upright.transpose(stored[orientation]) if orientation in stored else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    result = decode(encoded(image, kind, exif=exif, **options))
    assert result.shape == (32, 48, 3)
    assert np.abs(result.astype(int) - np.asarray(upright)).max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_turned_by_xmp_alone_is_turned_whatever_its_kind(kind):
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF>'
        b"</x:xmpmeta>"
    )
    options = {"xmp": xmp}
    if kind == "PNG":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    assert decode(encoded(photo(48, 32), kind, **options)).shape == (48, 32, 3)


def test_damaged_exif_costs_the_picture_nothing():
    data = encoded(photo(40, 40), "JPEG")
    exif = b"Exif\0\0" + b"\xff" * 40
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert decode(data).shape == (40, 40, 3)


def test_plain_jpeg_matches_pillow():
    data = encoded(photo(123, 77), "JPEG", quality=90)
    assert np.abs(decode(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)))).max() <= 1


def test_grey_and_cmyk_jpegs():
    grey = photo(40, 30).convert("L")
    result = decode(encoded(grey, "JPEG", quality=95))
    assert np.array_equal(result[..., 0], result[..., 2])
    assert np.abs(result[..., 0].astype(int) - np.asarray(grey)).max() < 10
    # Pillow writes CMYK as Adobe does, inverted; read without the inversion it would come out as a negative.
    image = photo(40, 30)
    result = decode(encoded(image.convert("CMYK"), "JPEG", quality=98, subsampling=0))
    assert np.abs(result.astype(int) - np.asarray(image)).mean() < 6


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (20, 20), (200, 0, 0, 0))
    clear.putpixel((3, 3), (200, 0, 0, 255))
    for image in (clear, clear.convert("LA"), clear.quantize()):
        result = decode(encoded(image))
        assert result[10, 10].tolist() == [255, 255, 255]
        assert result[3, 3].max() < 255 or result[3, 3].tolist() == [200, 0, 0]
    keyed = encoded(Image.new("RGB", (20, 20), (1, 2, 3)), transparency=(1, 2, 3))
    assert decode(keyed).min() == 255


def test_palette_one_bit_and_deep_grey():
    colours = photo(30, 30).quantize(64)
    assert np.array_equal(decode(encoded(colours)), np.asarray(colours.convert("RGB")))
    bits = Image.new("1", (20, 20), 1)
    assert decode(encoded(bits)).min() == 255
    ramp = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    for kind in ("PNG", "TIFF"):
        result = decode(encoded(Image.fromarray(ramp), kind))
        assert result[0, 0, 0] == 0 and result[0, -1, 0] == 255
        assert abs(int(result[0, 16, 0]) - 132) <= 1
        assert decode(encoded(Image.fromarray(ramp // 257), kind)).max() == 1, (
            "dark, and of 16 bits all the same"
        )
    assert decode(b"P5 32 32 65535\n" + (ramp // 257).astype(">u2").tobytes()).max() == 1
    floats = Image.fromarray(np.full((20, 20), 0.5, np.float32))
    assert decode(encoded(floats, "TIFF"))[0, 0, 0] in (127, 128)


def test_first_frame_of_an_animation():
    red, blue = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))
    for kind in ("GIF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(red, kind, save_all=True, append_images=[blue], **options)
        assert decode(data)[5, 5].tolist() == [255, 0, 0]
        assert kind == "WEBP" or is_lossless(data)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height and whose data is a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo(32, 32), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("make", [png_of_size, jpeg_of_size])
@pytest.mark.parametrize(
    ("size", "complaint"),
    [
        ((60000, 60000), "too large"),
        ((15, 400), "too small"),
        ((16, 4000), "strip"),
        ((20000, 9000), "too large"),
    ],
)
def test_bombs_and_slivers_are_refused_undecoded(make, size, complaint):
    assert MAX_PIXELS < 20000 * 9000
    with pytest.raises(ValueError, match=complaint):
        decode(make(*size))


def test_a_jpeg_of_thousands_of_scans_is_refused_undecoded():
    data = encoded(photo(32, 32), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), len(data) - 2
    began = time.process_time()
    with pytest.raises(ValueError, match="more than 500 scans"):
        decode(data[:end] + 5000 * data[last:end] + data[end:])
    assert time.process_time() - began < 1
    video = 600 * b"\xff\xda\x00\x02 what a phone appends to a picture "
    assert scans(data) == scans(data + video) > 1
    assert np.array_equal(decode(data + video), decode(data))


def test_a_large_picture_within_the_limit_is_read_without_a_warning(tmp_path):
    """In a process of its own: here pytest says which warnings are shown."""
    (tmp_path / "large.tif").write_bytes(encoded(photo(100, 80), "TIFF"))
    code = (
        "import sys; from PIL import Image; from vugen_cli.data.images import decode; "
        "Image.MAX_IMAGE_PIXELS = 5000; print(decode(open(sys.argv[1], 'rb').read()).shape)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large.tif")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "(80, 100, 3)\n" and not done.stderr


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_truncated_files_are_errors(kind, keep):
    data = encoded(photo(120, 90), kind)
    with pytest.raises(ValueError, match=r"\w"):
        decode(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\xff\xd8", b"\xff\xd8\xff\xe0" + b"\0" * 50, b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(ValueError, match=r"\w"):
        decode(data)


def test_random_damage_is_a_picture_or_a_value_error():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        whole = np.frombuffer(encoded(photo(60, 40), kind), np.uint8)
        for _ in range(40):
            data = whole.copy()
            data[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            with contextlib.suppress(ValueError):
                pixels = decode(data.tobytes())
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


def test_stray_bytes_in_a_jpeg_are_forgiven_and_rotten_data_is_not():
    data = encoded(photo(80, 80), "JPEG")
    stray = data[:-2] + b"\0\0\0" + data[-2:]
    assert np.array_equal(decode(stray), decode(data))
    start = data.index(b"\xff\xda") + 14
    rotten = (
        data[:start] + bytes((start * 7 + i * 13) % 251 for i in range(len(data) - start - 2)) + data[-2:]
    )
    with pytest.raises(ValueError, match="corrupt"):
        decode(rotten)


def test_encode():
    image = photo(64, 64)
    kind, data = encode(image)
    assert kind == "jpg" and simplejpeg.decode_jpeg_header(data)[3] == "444"
    error = decode(data).astype(float) - np.asarray(image)
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 40
    kind, data = encode(image, lossless=True)
    assert kind == "png" and np.array_equal(decode(data), np.asarray(image))
    assert is_lossless(data) and not is_lossless(encode(image)[1])
