"""Folders of images: one folder a class, or flat with captions in the file names."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vugen_cli.data.listing import Listing
from vugen_cli.data.sample import Sample
from vugen_cli.errors import VugenError

IMAGE_SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".avif",
        ".jp2",
        ".tga",
        # Not read without a plugin of Pillow: but listed as what was skipped, and not passed over.
        ".heic",
        ".heif",
        ".jxl",
    )
)

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "test", "testing"),
}
_SPLIT_IN_NAME = re.compile(rf"(?:^|[-_.])({'|'.join(sum(SPLIT_NAMES.values(), ()))})(?=[-_.\d])")


def split_folder(path: Path, split: str) -> Path:
    """The folder of a split: `path/train` or `path/val` (also validation, test), whatever their case, where
    there are such, else `path`.

    Raises:
        VugenError: `path` is missing or no folder, has only the other split, or is itself named as the other
            split.
    """
    check_folder(path)
    folders = {name.lower(): name for name in _folders(path)}
    for name in SPLIT_NAMES[split]:
        if name in folders:
            return path / folders[name]
    other = "val" if split == "train" else "train"
    if path.name.lower() == other:
        raise VugenError(f"{path} is a folder of the {other} split: use --split {other} or another --source")
    if others := [folders[name] for name in SPLIT_NAMES[other] if name in folders]:
        raise VugenError(
            f"{path} has a {others[0]}/ folder but no {SPLIT_NAMES[split][0]}/: use --split {other} or "
            f"point --source at the folder to use"
        )
    return path


def files_of_split(files: list[Path], split: str) -> list[Path]:
    """Those files whose names say that they are of a split, as in `train-0.tar` and `cc3m-validation-0.tar`.

    Where no name says any split, all of them. "val" takes those of test where there are no others.
    """
    named: dict[str, list[Path]] = {}
    for file in files:
        if found := _SPLIT_IN_NAME.search(file.name):
            named.setdefault(found[1], []).append(file)
    if not named:
        return files
    return next((named[name] for name in SPLIT_NAMES[split] if name in named), [])


def given_source(source: Path | None, variable: str, advice: str) -> Path:
    """`source`, else the folder that an environment variable names.

    Raises:
        VugenError: neither is given; the message is `advice`.
    """
    if source is not None:
        return source
    if folder := os.environ.get(variable):
        return Path(folder)
    raise VugenError(advice)


def check_folder(path: Path) -> None:
    """Say clearly what is wrong with a path that should be a folder.

    Raises:
        VugenError: it is missing, a tar, or another file.
    """
    if not path.exists():
        raise VugenError(f"there is no {path}: check --source")
    if path.is_dir():
        return
    if path.name.endswith((".tar", ".tar.gz", ".tgz", ".zip")):
        raise VugenError(
            f"{path} is an archive where a folder is expected: unpack it and point --source at the folder"
        )
    raise VugenError(f"{path} is a file where a folder is expected: point --source at the folder")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Without asking the disk once more, but for a link; one that leads to itself is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry))


def image_paths(folder: Path, below: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """The images below a folder as sorted relative paths with forward slashes, hidden ones left out.

    A folder's names are sorted as the paths are that go on from them, so that only they are held at a time.
    Links are followed, but to a folder that they stand in.

    Args:
        folder: where to look.
        below: a folder in it to begin at, ending in a slash.
        above: the folders that led there, as they are without links.
    """
    above = (*above, os.path.realpath(folder / below))
    with os.scandir(folder / below) as entries:
        names = [e.name + "/" * _is_folder(e) for e in entries if not e.name.startswith(".")]
    for name in sorted(names):
        if name.endswith("/"):
            within = f"{os.path.realpath(folder / below / name)}/"
            if not any(f"{one}/".startswith(within) for one in above):
                yield from image_paths(folder, below + name, above)
        elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            yield below + name


class ImageFolder:
    """Images in class folders, the folder's name as caption; or all in one folder, their names as captions.

    Underscores in a class name become spaces. In a file name, dashes and underscores do, and a number at the
    end goes: `a-red_car-01.jpg` says "a red car".

    Args:
        path: the folder, or one with `train/` and `val/` (or validation/, test/) in it.
        split: which of them.

    Raises:
        VugenError: no images, images both in class folders and beside them, or file names that say nothing.
    """

    name = "folder"
    licence = "that of the source"
    classes: Sequence[str]

    def __init__(self, path: str | Path, split: str = "train"):
        self.folder = split_folder(Path(path), split)
        self.origin = str(path)
        self.paths = Listing(image_paths(self.folder))
        if not len(self.paths):
            found = sorted(entry.name for entry in self.folder.iterdir())[:5]
            raise VugenError(
                f"{self.folder} holds no images; found {', '.join(found) or 'nothing'}: point --source at "
                f"a folder of class folders or of images"
            )
        flat = next((path for path in self.paths if "/" not in path), None)
        folders = {path.partition("/")[0] for path in self.paths if "/" in path}
        if flat and folders:
            raise VugenError(
                f"{self.folder} has images both in class folders and beside them ({flat}): move those "
                f"into a class folder or out"
            )
        if flat:
            refuse_class(self.folder, Path(path), split)
        self.classes = sorted({name.replace("_", " ") for name in folders})
        self.labels = {name: label for label, name in enumerate(self.classes)}
        if flat and not any(map(_words, self.paths)):
            raise VugenError(
                f"file names such as {flat} in {self.folder} say nothing: use class folders, or "
                f"--dataset captions with a .txt beside each image"
            )
        self.fingerprint = self.paths.fingerprint

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        path = self.paths[index]
        image = (self.folder / path).read_bytes()
        if not self.classes:
            return Sample(key=path, image=image, captions=[_words(path)])
        name = path.partition("/")[0].replace("_", " ")
        return Sample(
            key=path, image=image, captions=[name], meta={"class": name, "label": self.labels[name]}
        )


def refuse_class(folder: Path, path: Path, split: str) -> None:
    """A flat folder that is named as a split may be a class (trains) beside others, which would be left out.

    Args:
        folder: from `split_folder`, with images right in it.
        path: what was given.
        split: the one asked for.

    Raises:
        VugenError: there are other folders with images beside it.
    """
    if folder == path:
        return
    splits = {name for names in SPLIT_NAMES.values() for name in names}
    others = [name for name in _folders(path) if name.lower() not in splits and not name.startswith(".")]
    beside = [name for name in others if any(image_paths(path, f"{name}/"))]
    if beside:
        raise VugenError(
            f"{path} has {folder.name}/ beside {', '.join(beside[:3])}: rename it if it is a class "
            f"too, or point --source at {folder} if it is the {split} split"
        )


def _words(file: str) -> str:
    """What a file name says: "a-red_car-01.jpg" -> "a red car"."""
    return re.sub(r"[-_\s]*\d*$", "", os.path.splitext(file)[0].replace("-", " ").replace("_", " ")).strip()
