"""Hugging Face data sets on disk: a `save_to_disk` directory or parquet files, read with pyarrow alone."""

import bisect
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vugen_cli.data.captions import CAPTION_COLUMNS
from vugen_cli.data.folder import SPLIT_NAMES, files_of_split
from vugen_cli.data.sample import Meta, Sample, hash_of, texts_of
from vugen_cli.errors import VugenError

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
MOST_OPEN = 256  # files kept open: of the 1024 that a process may have as a rule


class Tables:
    """The rows of a data set's Arrow or parquet files.

    Args:
        path: see `HuggingFaceDataset`.
        split: "train" or "val".

    Attributes:
        names: of the columns.
        features: what `datasets` says of them.

    Raises:
        VugenError: pyarrow is missing, or no such data.
    """

    def __init__(self, path: Path, split: str):
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise VugenError("parquet and Arrow files need pyarrow: pip install 'vugen-cli[hf]'") from None
        if not path.exists():
            raise VugenError(
                f"there is no {path}: point --source at a save_to_disk directory or parquet files"
            )
        self.files = _find_files(path, split)
        # Opened where they are needed, and not sent to workers.
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._group: tuple[Any, Any] = None, None  # the last row group read, and which it is
        self.ends: list[int] = []
        rows = 0
        for number in range(len(self.files)):
            rows += self._rows(number)
            self.ends.append(rows)
        self.names, self.features = self._columns()
        self.fingerprint = hash_of([(file.name, file.stat().st_size) for file in self.files])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": OrderedDict(), "_group": (None, None)}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def row(self, index: int, columns: list[str]) -> tuple[str, Meta]:
        """A row's key and its values in some columns."""
        number = bisect.bisect_right(self.ends, index)
        row = self._row(number, index - (self.ends[number - 1] if number else 0), columns)
        return f"{self.files[number].name}/{index}", row

    def _open(self, number: int) -> Any:
        """A file, opened; the longest unused one is closed."""
        if number in self._tables:
            self._tables.move_to_end(number)
            return self._tables[number]
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = self.files[number]
        with _mapped(file) as memory:
            if file.suffix == ".parquet":
                self._tables[number] = pq.ParquetFile(memory)
            else:
                self._tables[number] = pa.ipc.open_stream(memory).read_all()
        while len(self._tables) > MOST_OPEN:
            self._tables.popitem(last=False)  # nobody else holds it: it is closed
        return self._tables[number]

    def _rows(self, number: int) -> int:
        import pyarrow.parquet as pq

        file = self.files[number]
        if file.suffix != ".parquet":
            return int(self._open(number).num_rows)
        with _mapped(file) as memory:
            return int(pq.read_metadata(memory).num_rows)

    def _columns(self) -> tuple[list[str], dict[str, Any]]:
        """Column names, and the features that `datasets` left in the schema's metadata."""
        table = self._open(0)
        schema = table.schema_arrow if self.files[0].suffix == ".parquet" else table.schema
        try:
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError):
            features = {}
        return schema.names, {name: value for name, value in features.items() if isinstance(value, dict)}

    def _row(self, number: int, row: int, columns: list[str]) -> Meta:
        table = self._open(number)
        if self.files[number].suffix == ".parquet":
            group = 0
            while row >= (rows := table.metadata.row_group(group).num_rows):
                row, group = row - rows, group + 1
            wanted = number, group, tuple(columns)
            if self._group[0] != wanted:
                self._group = None, None  # before another is in memory
                self._group = wanted, table.read_row_group(group, columns=columns)
            table = self._group[1]
        try:
            return table.select(columns).slice(row, 1).to_pylist()[0]
        except KeyError as error:  # columns are told from the first file
            raise OSError(0, f"a column is missing ({error.args[0]})", str(self.files[number])) from error


@contextmanager
def _mapped(file: Path) -> Iterator[Any]:
    """A file in memory, for pyarrow to read; it stays open while what reads it is held."""
    import pyarrow as pa

    try:
        yield pa.memory_map(os.fsencode(file))  # bytes: pyarrow takes no text that is not UTF-8
    except (pa.ArrowException, OSError) as error:
        raise VugenError(f"{file} cannot be read ({error}): copy or download it again") from error


def stored_picture(image: Any, key: str) -> bytes:
    """The file's bytes of an image column's value.

    Raises:
        OSError: there are none; names the row.
    """
    if isinstance(image, dict):
        data, path = image.get("bytes"), image.get("path")
        if (
            data is None and path
        ):  # a reference to a file beside the data set, or anywhere on the writer's disk
            raise OSError(0, f"the picture is not stored but lies at {path}: embed it (datasets.Image)", key)
        image = data
    if not isinstance(image, bytes):
        raise OSError(0, "no image in the row", key)
    return image


class HuggingFaceDataset:
    """Rows with an image and captions, or an image and a class label whose names the data set's features
    give.

    The image column holds the file's bytes, or a struct of `bytes` and `path`, which is how `datasets` stores
    images. An Arrow directory is memory-mapped; of parquet, the row group around a picture is read,
    and kept for the next, which lies in another one unless the file has few (`datasets` writes groups of
    100); that is several times slower.

    Args:
        path: a directory that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, a `.parquet` file,
            or a folder of them (also within `data/`), named `train-*.parquet` and so on where it has several
            splits.
        split: "train" or "val" (also "validation", "dev" and "test" where there is no other).

    Raises:
        VugenError: pyarrow is missing, no such data, or no image and caption columns in it.
    """

    name = "hf"
    licence = "that of the source"
    classes: Sequence[str]

    def __init__(self, path: str | Path, split: str = "train"):
        self.origin = str(path)
        self.tables = Tables(Path(path), split)
        names, features = self.tables.names, self.tables.features
        self.image_column = next((name for name in IMAGE_COLUMNS if name in names), "")
        self.caption_column = next((name for name in CAPTION_COLUMNS if name in names), "")
        self.label_column = next((name for name in _LABEL_COLUMNS if name in names), "")
        self.classes = features.get(self.label_column, {}).get("names") or []
        if not self.image_column or not (self.caption_column or self.classes):
            raise VugenError(
                f"{path} has the columns {', '.join(names)}: expected an image column "
                f"({', '.join(IMAGE_COLUMNS)}) and a caption column ({', '.join(CAPTION_COLUMNS)}) or a "
                "label column with class names"
            )
        self.fingerprint = self.tables.fingerprint

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, index: int) -> Sample:
        columns = [name for name in (self.image_column, self.caption_column, self.label_column) if name]
        key, row = self.tables.row(index, columns)
        image = stored_picture(row[self.image_column], key)
        meta: Meta = {}
        label = row.get(self.label_column)
        if self.classes and isinstance(label, int) and 0 <= label < len(self.classes):
            meta = {"class": self.classes[label], "label": label}
        captions = row.get(self.caption_column) or (meta["class"].replace("_", " ") if meta else [])
        return Sample(
            key=key,
            image=image,
            captions=texts_of(captions),
            meta=meta,
        )


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files of a folder and of `data/` in it, in order, of whatever split."""
    return [*sorted(folder.glob("[!.]*.parquet")), *sorted(folder.glob("data/[!.]*.parquet"))]


def _find_files(path: Path, split: str) -> list[Path]:
    """The Arrow or parquet files of a split, in order."""
    if path.is_file():
        if path.suffix == ".parquet":
            return [path]
        raise VugenError(
            f"{path} is no parquet file: point --source at a save_to_disk directory or parquet files"
        )
    names = SPLIT_NAMES[split]
    if (path / "dataset_dict.json").exists():
        folder = next((path / name for name in names if (path / name).is_dir()), None)
        if folder is None:
            found = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
            raise VugenError(f"{path} has no {split} split (found {found}): choose another --split")
        path = folder
    if (path / "state.json").exists():
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            files = [path / Path(entry["filename"]).name for entry in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VugenError(f"{path}/state.json is damaged ({error!r}): save the data set again") from error
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise VugenError(
                f"{path} is a selection stored by an old version of datasets: flatten_indices() and save "
                "again"
            )
        if not files:
            raise VugenError(f"{path}/state.json names no files: save the data set again")
        return files
    files = parquet_files(path)
    files = files_of_split(files, split)
    if not files:
        listing = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise VugenError(
            f"{path} holds no {split} split of a Hugging Face data set (found {listing}): expected "
            f"dataset_dict.json, state.json or {split}-*.parquet"
        )
    return files
