"""MJHQ-30K: 30,000 pictures in ten categories, whose FID is taken over all and within each category.

Li et al. (2024), "Playground v2.5" (arXiv 2402.17245). Its two files are `meta_data.json`, an object of
`{ID: {"category": ..., "prompt": ...}}`, and `mjhq30k_imgs.zip` with the pictures, `CATEGORY/ID.jpg`.
"""

import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pydantic import BaseModel, TypeAdapter

from vugen_cli.errors import VugenError, first_line

if TYPE_CHECKING:
    from vugen_cli.metrics.image_sets import ImageSet

META = "meta_data.json"


class Entry(BaseModel):
    """What `meta_data.json` says of a picture."""

    category: str
    prompt: str


def read_meta(directory: Path) -> dict[str, Entry]:
    """The entries of a folder's `meta_data.json`, by the id that names the picture.

    Raises:
        VugenError: it cannot be read or is in another layout.
    """
    path = directory / META
    try:
        return TypeAdapter(dict[str, Entry]).validate_python(json.loads(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise VugenError(f"{path} is not as MJHQ-30K's meta_data.json: {first_line(error)}.") from error


def rows_by_category(images: "ImageSet", entries: dict[str, Entry]) -> dict[str, list[int]]:
    """Which rows of the features of a set, whose good images they are in its order, are of which category.

    An image belongs to the entry whose id its file is named after, or else whose prompt it was drawn for.

    Args:
        images: pictures named after ids, or what `vugen sample` wrote.
        entries: from `read_meta`.

    Raises:
        VugenError: an image is of no entry; names it.
    """
    of_prompt = {" ".join(entry.prompt.split()): entry.category for entry in entries.values()}
    drawn = {sample.file: " ".join((sample.prompt or "").split()) for sample in images.samples}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(images.good_names()):
        entry = entries.get(PurePosixPath(name).stem)
        category = entry.category if entry else of_prompt.get(drawn.get(name, ""))
        if category is None:
            raise VugenError(
                f"{name} of {images.path} is of no category of MJHQ-30K's: draw its prompts, or name "
                "pictures after its ids."
            )
        rows.setdefault(category, []).append(row)
    return rows
