"""Shapes of pictures: `WIDTHxHEIGHT` for people, (height, width) for arrays."""

import math
from collections.abc import Sequence
from itertools import pairwise

from vugen_cli.errors import VugenError

Shape = tuple[int, int]  # height, width


def as_shape(size: int | Shape) -> Shape:
    """A shape from itself, or from the side of a square."""
    return (size, size) if isinstance(size, int) else size


def shape_name(shape: Shape) -> str:
    """(80, 48) -> `48x80`."""
    return f"{shape[1]}x{shape[0]}"


def parse_shape(text: str, option: str = "--size") -> Shape:
    """`48x80` -> (80, 48); `64` is a square.

    Raises:
        VugenError: it is neither.
    """
    width, cross, height = text.strip().partition("x")
    if not (width.isdecimal() and (height.isdecimal() or not cross)):
        raise VugenError(f"{option} {text}: give WIDTHxHEIGHT in pixels, as 48x80")
    return int(height or width), int(width)


def parse_shapes(text: str) -> list[Shape]:
    """The buckets that `vugen prepare --shapes` names, as `64x64,48x80,80x48`.

    Args:
        text: one of them is a square, whose side is the data set's nominal size.

    Raises:
        VugenError: it is one alone, there is not just one square, two are of one aspect ratio, one is tiny,
            or one has more than twice the pixels of another: batches of the two would cost as unlike.
    """
    shapes = [parse_shape(part, "--shapes") for part in text.split(",")]
    if len(shapes) < 2 or sum(height == width for height, width in shapes) != 1:
        raise VugenError(
            f"--shapes {text}: give several, and one square among them: its side is the data set's size"
        )
    if any(math.isclose(a, b) for a, b in pairwise(sorted(map(log_aspect, shapes)))):
        raise VugenError(f"--shapes {text}: two of them are of one aspect ratio")
    areas = [height * width for height, width in shapes]
    if min(map(min, shapes)) < 8 or max(areas) > 2 * min(areas):
        raise VugenError(
            f"--shapes {text}: give sides of 8 pixels or more, and no shape of more than twice the pixels of "
            "another"
        )
    return shapes


def nearest(shapes: Sequence[Shape], shape: Shape) -> int:
    """Number of the shape whose aspect ratio is nearest to a picture's, in its logarithm."""
    return min(range(len(shapes)), key=lambda i: abs(log_aspect(shapes[i]) - log_aspect(shape)))


def log_aspect(shape: Shape) -> float:
    """log(height / width)."""
    return math.log(shape[0] / shape[1])
