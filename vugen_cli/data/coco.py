"""COCO captions (Lin et al. 2014; Chen et al. 2015): photographs with five captions each."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vugen_cli.data.folder import check_folder, given_source
from vugen_cli.data.sample import Sample, hash_of, texts_of
from vugen_cli.errors import VugenError

_YEARS = ("2017", "2014")


def find_coco(source: Path | None) -> Path:
    """`source`, else `$COCO_DIR`.

    Raises:
        VugenError: neither is given; says what to download and where to point.
    """
    return given_source(
        source,
        "COCO_DIR",
        "COCO is not bundled: from the Download page of cocodataset.org get train2017.zip, val2017.zip and "
        "annotations_trainval2017.zip, unpack all three into one folder, and point --source or $COCO_DIR "
        "at it",
    )


class CocoCaptions:
    """COCO images with all their captions.

    Args:
        path: the folder that holds `annotations/captions_train2017.json` and `train2017/` (val and 2014
            alike; the image folders may also lie in `images/`).
        split: "train" or "val".

    Raises:
        VugenError: the annotations or the image folder are missing or damaged.
    """

    name = "coco"
    licence = "captions CC BY 4.0 (COCO Consortium); images under their owners' Flickr licences"
    classes: Sequence[str] = ()

    def __init__(self, path: str | Path, split: str = "train"):
        path = Path(path)
        self.origin = str(path)
        check_folder(path)
        names = [f"annotations/captions_{split}{year}.json" for year in _YEARS]
        table, year = next(
            ((path / n, y) for n, y in zip(names, _YEARS, strict=True) if (path / n).exists()), (None, "")
        )
        if table is None:
            found = sorted(
                str(file.relative_to(path)) for file in [*path.iterdir(), *(path / "annotations").glob("*")]
            )
            raise VugenError(
                f"{path} has no {names[0]}; found {', '.join(found[:6]) or 'nothing'}: unpack COCO's "
                f"annotations_trainval2017.zip there, or choose another --split"
            )
        folder = next(
            (f for f in (path / f"{split}{year}", path / "images" / f"{split}{year}") if f.is_dir()), None
        )
        if folder is None:
            raise VugenError(f"{path} has no {split}{year}/ folder: unpack COCO's {split}{year}.zip there")
        self.folder = folder
        self._read(table)
        self.fingerprint = hash_of([self.files, self.captions])

    def _read(self, table: Path) -> None:
        try:
            content = json.loads(table.read_text(encoding="utf-8"))
            captions: dict[int, list[tuple[int, str]]] = {}
            for note in content["annotations"]:
                if text := texts_of(note["caption"]):  # none of null
                    captions.setdefault(note["image_id"], []).append((note["id"], text[0]))
            images = sorted(
                (i["file_name"], i["id"], i.get("license")) for i in content["images"] if i["id"] in captions
            )
            urls = {item["id"]: item["url"] for item in content.get("licenses", [])}
        except OSError as error:
            raise VugenError(f"cannot read {table}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise VugenError(f"{table} is no COCO caption file ({error!r}): unpack it again") from error
        for file, *_ in images:
            if not isinstance(file, str) or os.path.basename(file) != file:
                raise VugenError(f"{table} names the image {file!r}, which is not in the image folder itself")
        if not images:
            raise VugenError(f"{table} has no captioned images: unpack COCO's annotations again")
        self.files = [file for file, *_ in images]
        self.ids = [identity for _, identity, _ in images]
        self.licences = [urls.get(licence) for *_, licence in images]
        # By annotation id, which is the order they were written in and not that of the file.
        self.captions = [[text for _, text in sorted(captions[identity])] for identity in self.ids]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        return Sample(
            key=file,
            image=(self.folder / file).read_bytes(),
            captions=list(self.captions[index]),
            meta={"image_id": self.ids[index], "image_licence": self.licences[index]},
        )
