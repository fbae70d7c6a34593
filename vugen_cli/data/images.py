"""From an image file's bytes to a square RGB picture, and back to bytes.

Plain JPEGs take a fast road (simplejpeg decodes and encodes, torch resamples); everything else goes through
Pillow. Both end in the same thing: `uint8 [H, W, 3]`, values 0 to 255, upright, opaque.
"""

import io
import re
import warnings
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from vugen_cli.data.shapes import Shape, as_shape

# Pillow warns from half of its limit on; up to the limit there is nothing that a user should do.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MAX_PIXELS = 2 * 89_478_485
"""Larger pictures are refused undecoded: the limit at which Pillow calls a file a bomb (179 MP)."""

MIN_SIDE = 16
"""Pictures with a shorter side than this carry nothing worth enlarging."""

MAX_ASPECT = 50
"""Longer strips are refused: their short side would be enlarged and the rest along with it."""

MAX_SCANS = 500
"""JPEGs of more are refused undecoded: a megabyte of empty ones takes minutes (libjpeg-turbo's limit)."""
SEGMENT = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
"""The marker of a segment: of those that stand within a scan's data none."""

JPEG_QUALITY = 95

# Pillow would also hand EPS to Ghostscript and open rarities with large attack surface: name what we accept.
_ACCEPTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")

# libjpeg's complaints that leave the picture whole: stray bytes between segments, odd scan headers.
_HARMLESS = ("extraneous bytes", "Invalid SOS parameters", "unknown Adobe color transform")

# EXIF orientation -> what brings the picture upright (EXIF 2.3, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to `uint8 [H, W, 3]`.

    Handles EXIF orientation, CMYK (Adobe's inverted kind too), palettes, transparency (laid on white), 16-bit
    and 32-bit greyscale, greyscale with alpha, 1-bit pictures, and the first frame of animations.

    Raises:
        ValueError: the file is no image we read, is truncated or corrupt, has more than `max_pixels` pixels,
            a side below `MIN_SIDE`, or an aspect ratio above `MAX_ASPECT`. The message is short enough for a
            list.
    """
    if not is_jpeg(data):
        return _decode_with_pillow(data, max_pixels)
    if data.count(b"\xff\xda") > MAX_SCANS and scans(data) > MAX_SCANS:
        raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
    pixels = _decode_plain_jpeg(data, max_pixels)
    return _decode_with_pillow(data, max_pixels) if pixels is None else pixels


def scans(data: bytes) -> int:
    """How many scans a JPEG has. What follows its end, as the video of a phone's picture, is none of it."""
    count, place = 0, 2
    while (marker := SEGMENT.search(data, place)) and marker[0] != b"\xff\xd9":
        count += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return count


def _decode_plain_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Decode a three-channel or grey JPEG with libjpeg-turbo; None where Pillow must have a look."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours in ("CMYK", "YCCK"):
        return None
    _check_size(width, height, max_pixels)
    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError as err:
        if any(words in str(err) for words in _HARMLESS):
            return None
        raise ValueError(f"corrupt JPEG: {err}") from err
    # Mostly at its start, but other blocks may come first; or Adobe's, in XML.
    if b"Exif\0\0" in data or b"tiff:Orientation" in data:
        try:
            with Image.open(io.BytesIO(data), formats=_formats()) as header:
                return _upright(pixels, _orientation(header))
        except (OSError, SyntaxError):
            return pixels
    return pixels


def _decode_with_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return opened(image, max_pixels)
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError("not an image file, or of a kind that is not read") from None
    except Image.DecompressionBombError:
        raise ValueError(f"too large: more than {MAX_PIXELS} pixels") from None
    except Exception as err:  # a damaged file makes Pillow's plugins raise nearly anything
        raise ValueError(" ".join(f"unreadable image: {err or type(err).__name__}".split())) from err


def opened(image: Image.Image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An open picture of any mode as `decode` gives it, `uint8 [H, W, 3]`.

    Raises:
        ValueError: it is too small, too large or too long; what Pillow raises on damage.
    """
    _check_size(*image.size, max_pixels)
    pixels = np.asarray(_to_rgb(image))
    return _upright(pixels, _orientation(image))  # asked afterwards: Pillow itself turns TIFFs as it reads


@cache
def _formats() -> tuple[str, ...]:
    """The accepted formats that this build of Pillow knows; naming another to `Image.open` fails."""
    Image.init()
    return tuple(name for name in _ACCEPTED if name in Image.OPEN)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"too large: {width}x{height} pixels")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"too small: {width}x{height} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"too long a strip: {width}x{height} pixels")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) when the EXIF block is damaged, which harms nothing else."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation not in _UPRIGHT:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Load a picture of any mode and bring it to RGB, with transparency laid on white."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bit(np.asarray(image), image.format == "PPM")).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(grey: np.ndarray, deep: bool) -> np.ndarray:
    """Scale deep greyscale `[H, W]` to uint8: integers are taken as 16 bits (those of 32 that stay below 256
    as 8, unless they are known to be `deep`), floats up to 1 as 0 to 1.
    """
    if grey.dtype.kind == "f":
        scaled = np.nan_to_num(grey) * (255 if np.nanmax(grey) <= 1 else 1)
    else:
        scaled = grey / 257 if deep or grey.itemsize == 2 or grey.max() > 255 else grey
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def adm_crop(pixels: np.ndarray, size: int | Shape) -> np.ndarray:
    """Resize to cover a square of side `size` and crop the centre, as ADM's `center_crop_arr` does.

    Follows guided_diffusion/image_datasets.py (Dhariwal & Nichol 2021, arXiv 2105.05233), the preprocessing
    behind the usual ImageNet figures: halve with a box filter while the picture is at least twice as large,
    then antialiased bicubic to the final scale, then the centre. Smaller pictures are enlarged.
    torch's uint8 kernels do the resampling, five times as fast as Pillow's; a value differs from Pillow's by
    at most 2 of 255, and by less than 0.01 on average.

    Args:
        pixels: `uint8 [H, W, 3]`.
        size: the side of the result in pixels, or (height, width).

    Returns:
        `uint8 [size, size, 3]` or `[height, width, 3]`, contiguous.
    """
    height, width = pixels.shape[:2]
    rows, columns = as_shape(size)
    if (height, width) == (rows, columns):
        return pixels
    while height >= 2 * rows and width >= 2 * columns:
        if height % 2 or width % 2:
            halved = Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BOX)
            pixels = np.asarray(halved)
        else:  # bilinear at exactly half meets four pixels at equal weight: the box filter
            pixels = _interpolate(pixels, height // 2, width // 2, mode="bilinear")
        height, width = pixels.shape[:2]
    scale = max(rows / height, columns / width)
    height, width = round(height * scale), round(width * scale)
    if pixels.shape[:2] != (height, width):
        pixels = _interpolate(pixels, height, width, mode="bicubic", antialias=True)
    top, left = (height - rows) // 2, (width - columns) // 2
    return np.ascontiguousarray(pixels[top : top + rows, left : left + columns])


def _interpolate(pixels: np.ndarray, height: int, width: int, **how: Any) -> np.ndarray:
    # Imported here: drawn pictures need no resizing, and their workers start two seconds faster without.
    import torch

    if not pixels.flags.writeable:  # a view of Pillow's memory; torch only reads it, but would warn
        pixels = pixels.copy()
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, size=(height, width), **how)
    return resized[0].permute(1, 2, 0).numpy()


def is_lossless(data: bytes) -> bool:
    """Whether the file, by its first bytes, is of a kind that keeps pixels exactly."""
    if data[:4] == b"RIFF":
        return data[12:16] == b"VP8L"
    starts = (b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P4", b"P5", b"P6")
    return data.startswith(starts)


def is_jpeg(data: bytes) -> bool:
    """Whether a file begins as a JPEG does; what `vugen prepare` stores is that or a PNG."""
    return data[:2] == b"\xff\xd8"


def encode(image: Image.Image | np.ndarray, lossless: bool = False) -> tuple[str, bytes]:
    """Encode an RGB picture for a shard: `("jpg", bytes)` or `("png", bytes)`.

    JPEG at quality 95 without chroma subsampling is some 45 dB from the original and a quarter of the PNG's
    size; halving the chroma would smear the very edges a generator is to learn. Pass `lossless=True` for
    drawn pictures, whose flat areas PNG stores small while JPEG rings around them, and for small pictures
    from lossless files, where JPEG's 8x8 blocks are a large part of the picture.
    """
    pixels = np.ascontiguousarray(np.asarray(image))
    if not lossless:
        return "jpg", simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="444")
    file = io.BytesIO()
    # Level 3 is three times as fast as the default and within 2% of its size on photographs.
    Image.fromarray(pixels).save(file, "PNG", compress_level=3)
    return "png", file.getvalue()
