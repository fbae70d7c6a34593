"""ImageNet (ILSVRC2012; Russakovsky et al. 2015) in the layouts it is found in, read in place."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vugen_cli.data.folder import IMAGE_SUFFIXES, given_source
from vugen_cli.data.sample import Sample, hash_of
from vugen_cli.data.shards import read_at, tar_members
from vugen_cli.errors import VugenError
from vugen_cli.progress import progress_bar

_ANY_NAME = ("utf-8", "surrogatepass")  # as Python has file names that are not UTF-8
_WNID = re.compile(r"n\d{8}")
_DOWNLOAD = (
    "from image-net.org (Download, ILSVRC2012, after registering) get ILSVRC2012_img_train.tar, and for "
    "--split val ILSVRC2012_img_val.tar"
)


def find_imagenet(source: Path | None) -> Path:
    """`source`, else `$IMAGENET_DIR`.

    Raises:
        VugenError: neither is given; says what to download and where to point.
    """
    return given_source(
        source,
        "IMAGENET_DIR",
        f"ImageNet is not bundled: {_DOWNLOAD}, and point --source or $IMAGENET_DIR at the folder with "
        f"them (the train tar need not be unpacked) or at an extracted copy with train/ and val/",
    )


def class_names() -> dict[str, list[str]]:
    """The 1000 classes: WordNet id -> every lemma of its synset, in WordNet's order."""
    text = Path(__file__).with_name("imagenet_classes.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return {wnid: lemmas.split(", ") for wnid, lemmas in rows}


class ImageNet:
    """ImageNet images, each captioned with every lemma of its class ("tench", "Tinca tinca").

    Args:
        path: one of
            - the official `ILSVRC2012_img_train.tar`, a tar of class tars, which is read without unpacking;
            - a folder with `train/` and `val/`, or one that directly holds class folders (`n01440764/`);
            - a folder of class tars (`n01440764.tar`), also within `train/`;
            - a plain tar of `train/n01440764/*.JPEG`, or of `n01440764/*.JPEG`;
            - a folder with the official tars in it;
            - for val, a flat folder or the official tar of `ILSVRC2012_val_*.JPEG`, with
              `LOC_val_solution.csv` (Kaggle) or `val.txt` (file name and class index a line) beside it, since
              the pictures carry no labels.
        split: "train" or "val".

    Raises:
        VugenError: another layout, an unknown class, or a damaged tar.
    """

    name = "imagenet"
    licence = "ImageNet terms of access: non-commercial research and education"
    classes: Sequence[str]

    def __init__(self, path: str | Path, split: str = "train"):
        self.origin = str(path)
        # Parallel lists over the pictures; a million of them must travel to every worker, so they become
        # arrays.
        self.files: list[str] = []  # where the bytes lie: a tar, or the folder that names are relative to
        entries = _find(Path(path), split, self.files)
        if not entries:
            raise VugenError(f"{path} holds no images of the {split} split: {_layout_help(split)}")
        entries.sort(key=lambda entry: entry[0])  # class by class, whatever order the file system gives
        names, wnids, files, offsets, sizes = zip(*entries, strict=True)
        table = class_names()
        if unknown := sorted(set(wnids) - table.keys()):
            raise VugenError(
                f"{path} has {len(unknown)} folders that are no ILSVRC2012 class: "
                f"{', '.join(unknown[:5])}; remove them, or use --dataset folder"
            )
        found = sorted(set(wnids))
        labels = {wnid: label for label, wnid in enumerate(found)}
        self.lemmas = [table[wnid] for wnid in found]
        self.wnids = found
        self.classes = [", ".join(lemmas) for lemmas in self.lemmas]
        self.names = np.array([name.encode(*_ANY_NAME) for name in names], dtype=np.bytes_)
        self.labels = np.array([labels[wnid] for wnid in wnids], dtype=np.int16)
        self.places = np.array(
            [files, offsets, sizes], dtype=np.int64
        ).T  # [images, 3]; offset -1: a file of its own
        self.fingerprint = hash_of([*names, *sizes])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        label, name = int(self.labels[index]), self.names[index].decode(*_ANY_NAME)
        file, offset, size = self.places[index].tolist()
        place = self.files[file]
        image = Path(place, name).read_bytes() if offset < 0 else read_at(place, offset, size)
        return Sample(
            key=name,
            image=image,
            captions=list(self.lemmas[label]),
            meta={"class": self.classes[label], "label": label, "wnid": self.wnids[label]},
        )


_Entry = tuple[str, str, int, int, int]  # name, wnid, index into files, offset, size


def _layout_help(split: str) -> str:
    want = "class folders such as n01440764/" + (" or tars such as n01440764.tar" if split == "train" else "")
    return f"expected {want}, {split}/ with them, or the official tar; {_DOWNLOAD}"


def _find(path: Path, split: str, files: list[str]) -> list[_Entry]:
    """Recognise the layout and list the pictures; appends to `files` what the entries index."""
    if not path.exists():
        raise VugenError(f"there is no {path}: {_layout_help(split)}")
    if path.is_file():
        if path.suffix != ".tar":
            raise VugenError(f"{path} is neither a tar nor a folder: {_layout_help(split)}")
        return _in_tar(path, split, files)
    other = "val" if split == "train" else "train"
    for folder in (
        path / split,
        path / "ILSVRC" / "Data" / "CLS-LOC" / split,
        path,
    ):  # the second is Kaggle's
        if not folder.is_dir():
            continue
        if folder.name == other:
            raise VugenError(
                f"{folder} is a folder of the {other} split: use --split {other} or another --source"
            )
        with os.scandir(folder) as listing:
            names = sorted(entry.name for entry in listing)
        if wnids := [name for name in names if _WNID.fullmatch(name) and (folder / name).is_dir()]:
            return _in_folders(folder, wnids, files)
        if tars := [name for name in names if re.fullmatch(r"n\d{8}\.tar", name)]:
            entries: list[_Entry] = []
            for name in tars:
                files.append(str(folder / name))
                entries += _class_tar(name[:9], tar_members(folder / name), len(files) - 1)
            return entries
        if (official := f"ILSVRC2012_img_{split}.tar") in names:
            return _in_tar(folder / official, split, files)
        if split == "val" and (flat := [name for name in names if name.startswith("ILSVRC2012_val_")]):
            labels = _val_labels(folder, path)
            files.append(str(folder))
            return [(name, _label_of(name, labels, folder), len(files) - 1, -1, -1) for name in flat]
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise VugenError(f"{path} holds no ImageNet {split} split (found {found}): {_layout_help(split)}")


def _in_folders(folder: Path, wnids: Iterable[str], files: list[str]) -> list[_Entry]:
    files.append(str(folder))
    entries: list[_Entry] = []
    for wnid in wnids:
        with os.scandir(folder / wnid) as listing:
            names = [entry.name for entry in listing if _is_image(entry.name)]
        entries += [(f"{wnid}/{name}", wnid, len(files) - 1, -1, -1) for name in names]
    return entries


def _class_tar(wnid: str, members: Iterable[tuple[str, int, int]], file: int) -> list[_Entry]:
    return [
        (f"{wnid}/{os.path.basename(name)}", wnid, file, offset, size)
        for name, offset, size in members
        if _is_image(os.path.basename(name))
    ]


def _in_tar(path: Path, split: str, files: list[str]) -> list[_Entry]:
    """The pictures of a tar of class tars, of a tar of class folders, or of the flat val tar."""
    files.append(str(path))
    entries: list[_Entry] = []
    flat: list[tuple[str, int, int]] = []
    splits: set[str] = set()
    number = len(files) - 1
    for name, offset, size in progress_bar(
        tar_members(path), desc=f"listing {path.name}", unit="", leave=False, delay=2
    ):
        *folders, base = name.removeprefix("./").split("/")
        if _WNID.fullmatch(base[:-4]) and base.endswith(".tar"):
            entries += _class_tar(base[:9], tar_members(path, inside=(name, offset, size)), number)
        elif folders and _WNID.fullmatch(folders[-1]) and _is_image(base):
            splits.add(folders[-2] if len(folders) > 1 else split)
            if len(folders) == 1 or folders[-2] == split:
                entries.append((f"{folders[-1]}/{base}", folders[-1], number, offset, size))
        elif base.startswith("ILSVRC2012_val_"):
            flat.append((base, offset, size))
    if not entries and flat and split == "val":
        labels = _val_labels(path.parent, path.parent.parent)
        return [(name, _label_of(name, labels, path), number, offset, size) for name, offset, size in flat]
    if not entries:
        found = (
            f"found {', '.join(sorted(splits))}/"
            if splits
            else "found the val pictures"
            if flat
            else "found neither"
        )
        raise VugenError(f"{path} holds no ImageNet {split} split ({found}): {_layout_help(split)}")
    return entries


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _val_labels(folder: Path, above: Path) -> dict[str, str]:
    """The classes of the flat val pictures: file name without its ending -> wnid.

    Args:
        folder: of the pictures.
        above: another that the list may lie in: Kaggle's lies in the folder that its archive was unpacked to.
    """
    wnids = sorted(class_names())
    places = (folder, folder.parent, above)
    for file in (place / "LOC_val_solution.csv" for place in places):
        if file.exists():
            rows = [line.split(",") for line in file.read_text(encoding="utf-8-sig").splitlines()[1:]]
            return {row[0]: row[1][:9] for row in rows if len(row) == 2}
    for file in (place / "val.txt" for place in places):
        if file.exists():
            try:
                pairs = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines()]
                labels = {pair[0].partition(".")[0]: int(pair[1]) for pair in pairs if pair}
                if min(labels.values(), default=0) < 0:
                    raise ValueError(f"{min(labels.values())} is no class")
                return {name: wnids[label] for name, label in labels.items()}
            except (ValueError, IndexError) as error:
                raise VugenError(
                    f"{file} should give a file name and a class index 0 to 999 a line: {error}"
                ) from error
    raise VugenError(
        f"the val pictures in {folder} are flat and carry no labels: put LOC_val_solution.csv (Kaggle) or "
        "val.txt (file name and class index a line) beside them, or sort them into class folders "
        "val/n01440764/"
    )


def _label_of(name: str, labels: dict[str, str], where: Path) -> str:
    try:
        return labels[name.partition(".")[0]]
    except KeyError:
        raise VugenError(
            f"{name} in {where} has no label in the list beside it: get the whole list"
        ) from None
