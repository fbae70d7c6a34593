"""Edits: pictures to start from, an instruction, and the picture that it makes of them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vugen_cli.data.captions import TABLES, inside, table_rows, tables_in
from vugen_cli.data.folder import IMAGE_SUFFIXES, split_folder
from vugen_cli.data.hf import Tables, parquet_files, stored_picture
from vugen_cli.data.listing import Listing
from vugen_cli.data.sample import Meta, Sample, Source, decoded, facts_of, texts_of
from vugen_cli.data.shards import read_at, samples_of, shards_of, tar_members
from vugen_cli.errors import VugenError

# Column names of InstructPix2Pix, UltraEdit, OmniEdit, MagicBrush and of tables of one's own.
SOURCES = (
    "source",
    "sources",
    "source_image",
    "original_image",
    "src_img",
    "source_img",
    "input_image",
    "input",
)
TARGETS = ("target", "target_image", "edited_image", "edited_img", "target_img", "output_image", "output")
TEXTS = (
    "instruction",
    "instructions",
    "edit_prompt",
    "edited_prompt_list",
    "edit",
    "prompt",
    "caption",
    "text",
)
KINDS = ("edit_type", "task", "task_type")  # what kind of edit it is, kept in a sample's `.json`

# The middle of a picture's name in a shard, as in `000001.source.jpg`, `000001.source2.png`.
_SOURCE_MEMBER = re.compile(r"(?:source|src|input|original)[_-]?(\d*)$")
_TARGET_MEMBER = re.compile(r"(?:target|output|edited)$")


def open_edits(path: str | Path, split: str = "train") -> Source:
    """The edits at a path, by what lies there.

    Args:
        path: a `.csv`, `.tsv` or `.jsonl` table (or a folder with one in it); webdataset shards, a folder or
            one `.tar`; a `.parquet` file, a folder of such or a `save_to_disk` directory.
        split: "train" or "val", where the source has both.

    Raises:
        VugenError: none of these, or no edits in it.
    """
    path = Path(path)
    if not path.exists():
        raise VugenError(f"there is no {path}: point --source at a table, webdataset shards or parquet files")
    if path.is_file() and path.suffix.lower() in TABLES:
        return EditTable(path)
    if path.suffix == ".tar":
        return EditShards(path, split)
    if path.is_file() and path.suffix != ".parquet":
        raise VugenError(
            f"{path} is none of {', '.join(TABLES)}, .tar and .parquet: point --source at one of these or at "
            "a folder of them"
        )
    if path.is_file() or any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return EditRows(path, split)
    parquet = bool(parquet_files(path))
    folder = path if parquet else split_folder(path, split)
    if any(folder.glob("[!.]*.tar")):
        return EditShards(path, split)
    tables = tables_in(folder)
    if len(tables) == 1:
        return EditTable(tables[0])
    if parquet:
        return EditRows(path, split)
    if parquet_files(folder):  # `path/train`, of several splits
        return EditRows(folder, split)
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
    raise VugenError(
        f"{folder} holds no shards, no parquet files and not exactly one .csv, .tsv or .jsonl table; found "
        f"{found}: point --source at the table, or at the folder of the others"
    )


def _first(row: dict[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name)), None)


class EditTable:
    """A table of paths below its folder: source, target, instruction; in JSON lines, sources and instructions
    may be lists.

    Args:
        table: a `.csv`, `.tsv` or `.jsonl` file.

    A line of which a value is empty is an edit that cannot be used.

    Raises:
        VugenError: it cannot be read, lacks a column, or a path leaves its folder.
    """

    name = "edits"
    licence = "that of the source"
    classes: Sequence[str] = ()

    def __init__(self, table: Path):
        self.origin, self.table = str(table), table
        self.rows = Listing(self._read())
        if not len(self.rows):
            raise VugenError(f"{table} has no lines below its header: expected an edit on each")
        self.fingerprint = self.rows.fingerprint

    def _read(self) -> Iterator[list[Any]]:
        for line, row in table_rows(self.table):
            given = all(row.keys() & names for names in (SOURCES, TARGETS, TEXTS))
            target = _first(row, TARGETS) or ""
            try:
                sources, texts = texts_of(_first(row, SOURCES)), texts_of(_first(row, TEXTS))
            except ValueError:
                given = False
            if not given or not isinstance(target, str):
                raise VugenError(
                    f"{self.table} line {line}: expected source, target and instruction; found "
                    f"{', '.join(name for name, value in row.items() if value) or 'nothing'}"
                )
            where = f"line {line}"
            paths = [inside(self.table, where, path) for path in sources if path]
            yield [paths, target and inside(self.table, where, target), texts, _first(row, KINDS)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        sources, target, texts, kind = self.rows[index]
        folder, key = self.table.parent, f"{self.table.name}/{index}"
        if not sources or not target:
            raise OSError(0, f"no {'target' if sources else 'source'} picture on its line", key)
        return Sample(
            key=key,
            image=(folder / target).read_bytes(),
            captions=texts,
            meta={"edit": kind} if kind else {},
            sources=[(folder / source).read_bytes() for source in sources],
        )


class EditShards:
    """Webdataset shards: `KEY.source.jpg` (or `source0`, `source1`, ...), `KEY.target.jpg`, and instructions
    in `KEY.txt` (one a line) or in `KEY.json` under one of `TEXTS`.

    Args:
        path: a folder of `.tar` files, or one of them.
        split: see `shards.shards_of`.

    Raises:
        VugenError: no shards, a damaged one, or no edits in them.
    """

    name = "edits"
    licence = "that of the source"
    classes: Sequence[str] = ()

    def __init__(self, path: Path, split: str):
        self.origin = str(path)
        self.shards = shards_of(path, split)
        self.rows = Listing(row for number in range(len(self.shards)) for row in self._read(number))
        if not any(row[2] and row[3] for row in self.rows):
            found = [name for _, (name, *_) in zip(range(5), tar_members(self.shards[0]), strict=False)]
            raise VugenError(
                f"{path} holds no edits (KEY.source.jpg, KEY.target.jpg and KEY.txt); found "
                f"{', '.join(found) or 'nothing'} in {self.shards[0].name}"
            )
        self.fingerprint = self.rows.fingerprint

    def _read(self, number: int) -> Iterator[list[Any]]:
        """Of each sample: shard, key, places of sources, of the target, of `.txt` and of `.json`."""
        return (self._row(number, key, parts) for key, parts in samples_of(self.shards[number]))

    def _row(self, number: int, key: str, parts: dict[str, tuple[int, int]]) -> list[Any]:
        sources: list[tuple[int, tuple[int, int]]] = []
        target = None
        for kind, place in parts.items():
            role, _, suffix = kind.rpartition(".")
            if f".{suffix}" not in IMAGE_SUFFIXES:  # as the caption of a source, `KEY.source.txt`
                continue
            if found := _SOURCE_MEMBER.match(role):
                sources.append((int(found[1] or 0), place))
            elif _TARGET_MEMBER.match(role):
                target = place
        ordered = [place for _, place in sorted(sources)]
        return [number, key, ordered, target, parts.get("txt"), parts.get("json")]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        number, name, sources, target, text, facts = self.rows[index]
        shard = self.shards[number]
        key = f"{shard.name}/{name}"
        if not sources or not target:
            raise OSError(0, f"no {'target' if sources else 'source'} picture in the sample", key)
        meta: Meta = {}
        texts = decoded(read_at(shard, *text), key).splitlines() if text else []
        try:
            if facts:
                meta = facts_of(read_at(shard, *facts))
            texts = texts or texts_of(_first(meta, TEXTS))
        except (ValueError, TypeError, RecursionError) as error:
            raise OSError(0, f"damaged .json: {error}", key) from error
        kind = _first(meta, KINDS)
        return Sample(
            key=key,
            image=read_at(shard, *target),
            captions=texts,
            meta={"edit": kind} if kind else {},
            sources=[read_at(shard, *place) for place in sources],
        )


class EditRows:
    """Rows of parquet or Arrow files with a source column, a target column and one of instructions.

    Args:
        path: see `hf.HuggingFaceDataset`.
        split: "train" or "val".

    Raises:
        VugenError: pyarrow is missing, no such data, or not these columns.
    """

    name = "edits"
    licence = "that of the source"
    classes: Sequence[str] = ()

    def __init__(self, path: Path, split: str):
        self.origin = str(path)
        self.tables = Tables(path, split)
        columns = {name: name for name in self.tables.names}
        found = [_first(columns, names) for names in (SOURCES, TARGETS, TEXTS)]
        if None in found:
            raise VugenError(
                f"{path} has the columns {', '.join(columns)}: expected a source picture "
                f"({', '.join(SOURCES[:5])}), a target picture ({', '.join(TARGETS[:4])}) and an instruction "
                f"({', '.join(TEXTS[:4])})"
            )
        self.source, self.target, self.text = found
        self.kind = _first(columns, KINDS)
        self.fingerprint = self.tables.fingerprint

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, index: int) -> Sample:
        columns = [name for name in (self.source, self.target, self.text, self.kind) if name]
        key, row = self.tables.row(index, columns)
        sources = row[self.source] if isinstance(row[self.source], list) else [row[self.source]]
        if not sources:
            raise OSError(0, "no source picture in the row", key)
        return Sample(
            key=key,
            image=stored_picture(row[self.target], key),
            captions=texts_of(row[self.text]),
            meta={"edit": str(row[self.kind])} if row.get(self.kind) else {},
            sources=[stored_picture(source, key) for source in sources],
        )
