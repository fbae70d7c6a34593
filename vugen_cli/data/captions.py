"""Captioned images: a `.txt` beside each image, or a table of paths and captions."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vugen_cli.data.folder import image_paths, refuse_class, split_folder
from vugen_cli.data.listing import Listing, by_first
from vugen_cli.data.sample import Sample, decoded, texts_of
from vugen_cli.errors import VugenError

PATH_COLUMNS = ("path", "file", "image", "filename", "file_name", "filepath", "image_path")
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description")

TABLES = (".csv", ".tsv", ".jsonl")


class CaptionedImages:
    """Images with captions of their own.

    Args:
        path: a folder of images with a `.txt` of the same name beside each (a caption a line), at any depth;
            a `.csv`, `.tsv` or `.jsonl` table; or a folder with one such table in it. A table names its
            columns: one of `PATH_COLUMNS`, relative to the table, and one of `CAPTION_COLUMNS`. A path on
            several lines has several captions; in JSON lines a caption may be a list, or null for none.
        split: with `train/` and `val/` in the folder, which of them.

    Raises:
        VugenError: nothing captioned there, a table that cannot be read, or a path that leaves the table's
            folder.
    """

    name = "captions"
    licence = "that of the source"
    classes: Sequence[str] = ()

    def __init__(self, path: str | Path, split: str = "train"):
        path = Path(path)
        self.origin = str(path)
        if path.is_file() and path.suffix.lower() in TABLES:
            self._read_table(path)
        else:
            folder = split_folder(path, split)
            beside = Listing([name, _size(_beside(folder / name))] for name in image_paths(folder))
            tables = tables_in(folder)
            captioned = any(size >= 0 for _, size in beside)
            if captioned and tables:
                raise VugenError(
                    f"{folder} has images with a .txt beside them and {tables[0].name} too: point --source "
                    f"at {tables[0]}, or move it elsewhere"
                )
            if folder != path and any("/" not in name for name, _ in beside):
                refuse_class(folder, path, split)
            if captioned:  # then those without are missing theirs: they are skipped, and listed
                self.folder, self.rows = folder, beside
            elif len(tables) == 1:
                self._read_table(tables[0])
            else:
                names = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
                raise VugenError(
                    f"{folder} has no images with a .txt beside them and not exactly one .csv, .tsv or "
                    f".jsonl table; found {names}: add captions, or point --source at the table"
                )
        self.fingerprint = self.rows.fingerprint
        self.order, self.bounds = by_first(path for path, _ in self.rows)

    def _read_table(self, table: Path) -> None:
        self.folder = table.parent
        named = ((line, *_row(table, line, row)) for line, row in table_rows(table))
        self.rows = Listing([inside(table, f"line {line}", path), found] for line, path, found in named)
        if not len(self.rows):
            raise VugenError(
                f"{table} has no lines below its header: expected an image path and a caption on each"
            )

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Sample:
        rows = [self.rows[int(row)] for row in self.order[self.bounds[index] : self.bounds[index + 1]]]
        path = rows[0][0]
        file = self.folder / path
        if isinstance(rows[0][1], int):  # the size of the .txt beside the image
            captions = decoded(_beside(file).read_bytes(), path).splitlines()
        else:
            captions = [caption for _, found in rows for caption in found]
        return Sample(key=path, image=file.read_bytes(), captions=captions)


def _beside(image: Path) -> Path:
    return image.with_suffix(".txt")


def _size(file: Path) -> int:
    """Of a file in bytes, by which a changed one is told apart; -1 where there is none."""
    return file.stat().st_size if file.is_file() else -1


def tables_in(folder: Path) -> list[Path]:
    """The `.csv`, `.tsv` and `.jsonl` tables of a folder, hidden ones left out."""
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in files if file.suffix.lower() in TABLES)


def table_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a `.csv`, `.tsv` or `.jsonl` table: number, and values by column in lower case.

    Raises:
        VugenError: it cannot be read.
    """
    number = 0
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".jsonl":
                for number, text in enumerate(file, start=1):
                    if text.strip():
                        yield number, _columns(json.loads(text))
            else:
                # Captions hold stray quotation marks often enough; only CSV needs them to guard commas.
                tabs = table.suffix.lower() == ".tsv"
                reader = (
                    csv.DictReader(file, dialect="excel-tab", quoting=csv.QUOTE_NONE)
                    if tabs
                    else csv.DictReader(file, strict=True)
                )
                for row in reader:
                    number = reader.line_num
                    if any(row.pop(None, [])):
                        raise ValueError(
                            "more values than columns: "
                            + ("a tab in a caption" if tabs else "quote a caption with commas in it")
                        )
                    yield number, _columns(row)
    except OSError as error:
        raise VugenError(f"cannot read {table}: {error.strerror or error}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise VugenError(
            f"{table} cannot be read as UTF-8 {table.suffix[1:]}, about line {number}: {problem}"
        ) from error


def _columns(row: Any) -> dict[str, Any]:
    return {str(name).strip().lower(): value for name, value in row.items()} if isinstance(row, dict) else {}


def _row(table: Path, number: int, row: dict[str, Any]) -> tuple[str, list[str]]:
    path = next((row[name] for name in PATH_COLUMNS if name in row), None)
    column = next((name for name in CAPTION_COLUMNS if name in row), "")
    caption = row.get(column)
    null = caption is None and column and table.suffix.lower() == ".jsonl"
    if path and column and caption is None and not null:
        raise VugenError(f"{table} line {number} ends before its {column}")
    for found, kind, what in ((path, str, "path"), (caption, str | list, "caption")):
        if found and not isinstance(found, kind):
            raise VugenError(f"{table} line {number}: its {what} is no text but {found!r}")
    if path in ("", None) and set(PATH_COLUMNS) & row.keys() and column:
        raise VugenError(f"{table} line {number} names no image: remove the line")
    if not isinstance(path, str) or not (null or isinstance(caption, str | list)):
        raise VugenError(
            f"{table} line {number}: expected a column named {', '.join(PATH_COLUMNS[:4])} and one named "
            f"{', '.join(CAPTION_COLUMNS[:3])}; found {', '.join(row) or 'none'}"
        )
    try:
        return path, texts_of(caption)
    except ValueError as error:
        raise VugenError(f"{table} line {number}: {error}") from error


def inside(table: Path, where: str, path: str) -> str:
    """A path as relative to the table's folder. Paths only, links are the user's own: they are followed.

    Raises:
        VugenError: it leads out of that folder; says where in the table, as `line 3`.
    """
    root = os.path.abspath(table.parent)
    relative = os.path.relpath(os.path.join(root, path), root)
    if relative.startswith(os.pardir + os.sep) or relative == os.pardir or "\0" in path:
        raise VugenError(
            f"{table} {where}: the path {path!r} leaves the table's folder; only files below it are read"
        )
    return relative.replace(os.sep, "/")
