"""Grids of pictures, with labels where they help."""

import math
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vugen_cli.files import whole_file


def save_grid(
    images: Tensor, path: str | Path, columns: int | None = None, labels: list[str] | None = None
) -> None:
    """Write a PNG grid, row by row.

    Args:
        images: uint8 [N, 3, H, W]. Pictures under 128 px are enlarged by a whole factor, without smoothing.
        path: the file to write.
        columns: pictures in a row; default about a square.
        labels: N texts put under the pictures, wrapped.
    """
    count, _, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    zoom = max(1, math.ceil(128 / max(height, width)))
    font = ImageFont.load_default(size=11)
    texts = [textwrap.wrap(t, max(8, width * zoom // 6))[:4] for t in labels or []]
    caption = 14 * max((len(t) for t in texts), default=0) + (4 if texts else 0)
    gap, tile = 4, (width * zoom, height * zoom + caption)
    sheet = Image.new("RGB", (columns * (tile[0] + gap) + gap, rows * (tile[1] + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(images.cpu().permute(0, 2, 3, 1).numpy()):
        x, y = gap + i % columns * (tile[0] + gap), gap + i // columns * (tile[1] + gap)
        enlarged = Image.fromarray(np.ascontiguousarray(picture)).resize(
            (tile[0], height * zoom), Image.Resampling.NEAREST
        )
        sheet.paste(enlarged, (x, y))
        if texts:
            draw.text((x, y + height * zoom + 2), "\n".join(texts[i]), fill="black", font=font, spacing=2)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")
