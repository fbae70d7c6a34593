"""`dataset.json`: what a prepared data set holds, as typed models that it is read and written through."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from vugen_cli.card import DataCard
from vugen_cli.data.remote import fetched_bytes, is_remote
from vugen_cli.data.sample import Source, encodable
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import whole_file, write_json
from vugen_cli.version import __version__

SHAPED = 3  # of a data set of pictures of several shapes, which readers of 2 would find damaged
FORMAT = (
    2  # 1 had the skipped pictures in dataset.json, no index beside a shard, and was read in another order
)

# A name goes into addresses and paths: it must not lead out of the data set.
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Facts(BaseModel):
    """A part of the manifest; keys that this version does not know are passed over."""

    model_config = ConfigDict(extra="ignore")


@pydantic.dataclasses.dataclass(slots=True)  # there may be 100,000: a model would take four times the memory
class Shard:
    """One tar of samples."""

    name: PlainName
    samples: int = Field(ge=0, description="how many it holds")
    bytes: int = Field(ge=0, description="its length")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="over all of it")
    shape: str | None = None  # of its pictures, WIDTHxHEIGHT, where they are of several

    @model_serializer(mode="wrap")
    def _plain(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a shape where there is none."""
        return {key: value for key, value in dumped(self).items() if key != "shape" or value}


SHARD_KEYS = {"name", "samples", "bytes", "sha256"}


class Captions(Facts):
    """What the captions of a split are like."""

    count: int = Field(description="captions of all images")
    per_image: float = Field(description="their mean number")
    words_mean: float = Field(description="words in a caption")
    words_max: int = Field(description="words in the longest")
    characters_max: int = Field(description="characters in the longest")


class Split(Facts):
    """One part of a data set."""

    count: int = Field(ge=0, description="images")
    items: int | None = Field(None, description="items of the source that were taken, skipped ones included")
    seed: int | None = Field(None, description="of the shuffle")
    shard_size: int | None = Field(None, description="items a shard, skipped ones included")
    listing: str | None = Field(None, description="hash over the source's listing")
    source: str | None = Field(None, description="where the images came from")
    shards: list[Shard] = Field(
        description="the tars in order: `name`, `samples`, `bytes`, `sha256`; `shape` if there are several"
    )
    skipped_count: int = Field(
        0,
        ge=0,
        description="pictures that could not be used, which a latent cache counts too; each has a line in "
        "`skipped-SPLIT.jsonl`",
    )
    captions: Captions | None = Field(None, description="statistics of the captions")
    sources: int = Field(0, ge=0, description="of edits: pictures that one is made from, at most")


class Latents(Facts):
    """What made a latent cache; beside these, the recipe's keys that z̃ depends on."""

    model_config = ConfigDict(extra="allow")

    grid: tuple[int, int] = Field(description="places of z̃: height, width")
    grids: dict[str, tuple[int, int]] | None = Field(
        None, description="of images of several shapes: places of z̃ of each, by WIDTHxHEIGHT"
    )
    channels: int = Field(gt=0, description="of z̃")
    flip: bool = Field(description="whether z̃ of the mirrored image is stored too")
    dtype: str = Field(description="of the stored numbers")
    reducer: str = Field(description="SHA-256 fingerprint of the reducer's weights")
    vlm: str = Field(description="SHA-256 fingerprint of the VLM's vision weights")
    vae: str | None = Field(None, description="SHA-256 fingerprint of the VAE, where that made the latents")


class CaptionOrigin(Facts):
    """What captions a VLM was asked for by `vugen caption`."""

    vlm: str = Field(description="a directory, a hub id or `nano`")
    fingerprint: str = Field(description="hash of its weights")
    instruction: str = Field(description="what it was told beside the picture")
    tokens: int = Field(description="longest answer")


class Manifest(Facts):
    """`dataset.json`."""

    format: int = Field(ge=1, le=SHAPED, description="version of the layout; 3 only where there are `shapes`")
    dataset: str = Field(description="name of the data set")
    size: int = Field(gt=0, description="pixels a side")
    shapes: list[Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*$")]] | None = Field(
        None, description="WIDTHxHEIGHT, where pictures are of several: the square one has `size` a side"
    )
    splits: dict[str, Split] = Field(description="`train` and `val`, or one of them")
    classes: list[str] | None = Field(None, description="names that `label` in a sample's `.json` counts")
    source: str | None = Field(None, description="where the images came from")
    licence: str | None = Field(None, description="of the images")
    tool: str | None = Field(None, description="and version that wrote it")
    captioned: list[CaptionOrigin] | None = Field(
        None,
        description="what wrote captions; `caption_origins` in a sample's `.json` has for each caption the "
        "number of one of these, from 1, or 0 for the source",
    )
    data: DataCard | None = Field(None, description="of a latent cache: the card of its images")
    latents: Latents | None = Field(None, description="of a latent cache: what made it")
    images: dict[str, list[str]] | None = Field(
        None, description="of a latent cache: SHA-256 of the images' shards, by split"
    )

    def plain(self) -> dict[str, Any]:
        """As it stands in the file."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def sha256(self) -> str:
        """Over the SHA-256 of all its shards."""
        return self._hash(self.splits)

    def _hash(self, splits: Iterable[str]) -> str:
        hashes = {name: [shard.sha256 for shard in self.splits[name].shards] for name in splits}
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @property
    def held_out(self) -> str:
        """The split to look at and to compare with: `val`, or `train` where there is none."""
        return "val" if "val" in self.splits and self.splits["val"].shards else "train"

    def card(self, path: str | Path) -> DataCard:
        """What checkpoints remember of it."""
        if self.data:  # a cache leads back to its images
            return self.data
        return DataCard(
            path=encodable(str(path)),
            dataset=self.dataset,
            size=self.size,
            licence=self.licence,
            counts={name: split.count for name, split in self.splits.items()},
            sha256=self.sha256,
            train_sha256=self._hash(["train"]) if "train" in self.splits else None,
            shapes=self.shapes,
        )


def read_manifest(path: str | Path) -> Manifest:
    """The `dataset.json` of a prepared data set.

    Raises:
        VugenError: the directory or its manifest is missing, damaged or not one of ours.
    """
    if is_remote(path):
        return _parse(fetched_bytes(str(path), "dataset.json"), f"dataset.json of {path}", "look there")
    directory = Path(path)
    file = directory / "dataset.json"
    if not directory.exists():
        raise VugenError(f"no data set at {directory}: make one with `vugen prepare --out {directory}`")
    if not file.is_file():
        kind = "webdataset" if any(directory.glob("*.tar")) else "folder"
        raise VugenError(
            f"{directory} has no dataset.json: prepare it first, for example "
            f"`vugen prepare --dataset {kind} --source {directory} --out data/mine`"
        )
    return _parse(file.read_bytes(), str(file), "run `vugen prepare` again")


def _parse(text: bytes, what: str, advice: str) -> Manifest:
    try:
        return Manifest.model_validate(json.loads(text, object_hook=_shard))
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise VugenError(f"{what} is damaged ({first_line(error)}): {advice}") from error
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        if place == "format" and first["type"] != "missing":
            raise VugenError(
                f"{what} has another format than this version reads (1 to {SHAPED}): {advice}, or "
                f"`pip install -U vugen-cli`"
            ) from error
        if place == "name":
            raise VugenError(
                f"{what} names a shard {first['input']!r}, which is no plain file name: {advice}"
            ) from error
        raise VugenError(
            f"{what} is damaged or no manifest of `vugen prepare` ({place + ': ' if place else ''}"
            f"{first['msg']}): {advice}"
        ) from error


def _shard(found: dict[str, Any]) -> Any:
    """A shard as soon as it is parsed: a hundred thousand plain objects would be large."""
    return Shard(**found) if found.keys() - {"shape"} == SHARD_KEYS else found


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Write `dataset.json`, whole or not at all."""
    write_json(out / "dataset.json", manifest.plain())


# --- what the writer notes of a shard, and how notes become a split


class Skipped(Facts):
    """A picture that could not be used."""

    key: str
    reason: str


class Counted(Facts):
    """Captions counted while a shard is written; notes of several shards add up."""

    images: int = 0
    captions: int = 0
    words: int = 0
    words_max: int = 0
    characters_max: int = 0
    sources: int = 0

    def add(self, captions: list[str], sources: int = 0) -> None:
        """Count the captions of one more image, and the pictures that it is made from."""
        words = [len(caption.split()) for caption in captions]
        self.images += 1
        self.captions += len(captions)
        self.words += sum(words)
        self.words_max = max(self.words_max, *words)
        self.characters_max = max(self.characters_max, *map(len, captions))
        self.sources = max(self.sources, sources)

    def merge(self, other: "Counted") -> None:
        """Count another shard's."""
        for key in ("images", "captions", "words"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for key in ("words_max", "characters_max", "sources"):
            setattr(self, key, max(getattr(self, key), getattr(other, key)))

    def summary(self) -> Captions:
        """For the manifest."""
        return Captions(
            count=self.captions,
            per_image=round(self.captions / max(self.images, 1), 3),
            words_mean=round(self.words / max(self.captions, 1), 3),
            words_max=self.words_max,
            characters_max=self.characters_max,
        )


class ShardNote(Facts):
    """What is noted of a finished shard."""

    name: PlainName
    samples: int
    bytes: int
    sha256: str
    skipped: list[Skipped] = []
    captions: Counted = Counted()
    shape: str | None = None

    @property
    def shard(self) -> Shard:
        return Shard(self.name, self.samples, self.bytes, self.sha256, self.shape)


class Plan(Facts):
    """What decides the bytes of a split; noted before its first shard."""

    dataset: str
    size: int
    shapes: str | None = None
    seed: int
    shard_size: int
    items: int
    listing: str
    tool: str | None = None


def read_written(out: Path) -> Manifest | None:
    """The manifest of an earlier run that wrote to `out`, if there is one.

    Raises:
        VugenError: something else is there, or it was written in another format.
    """
    path = out / "dataset.json"
    if not path.exists():
        return None
    try:
        manifest = _parse(path.read_bytes(), str(path), "choose another --out")
    except OSError as error:
        raise VugenError(f"cannot read {path}: {error.strerror}; choose another --out") from error
    if manifest.format < FORMAT:
        raise VugenError(
            f"{path} has format {manifest.format}, this version writes {FORMAT}: choose another --out"
        )
    return manifest


def all_classes(manifest: Manifest | None, source: Source) -> list[str]:
    """The classes of a data set with a split added, which labels index.

    The list stays as the first source gives it, ImageNet's two cranes included, or grows.
    """
    known, classes = (manifest and manifest.classes) or [], [encodable(name) for name in source.classes]
    return [*known, *(name for name in classes if not known or name not in known)]


def add_split(
    manifest: Manifest | None, source: Source, split: str, plan: Plan, records: Iterable[ShardNote]
) -> Manifest:
    """The manifest with a split added to those it has; records are taken one at a time."""
    totals, shards, skipped = Counted(), [], 0
    for record in records:
        totals.merge(record.captions)
        skipped += len(record.skipped)
        if record.samples:
            shards.append(record.shard)
    entry = Split(
        count=totals.images,
        items=plan.items,
        seed=plan.seed,
        shard_size=plan.shard_size,
        listing=plan.listing,
        source=encodable(source.origin),
        shards=shards,
        skipped_count=skipped,
        captions=totals.summary(),
        **({"sources": totals.sources} if totals.sources else {}),
    )
    splits = dict(sorted({**(manifest.splits if manifest else {}), split: entry}.items()))
    return Manifest(
        format=SHAPED if plan.shapes else FORMAT,
        dataset=source.name,
        size=plan.size,
        **({"shapes": plan.shapes.split(",")} if plan.shapes else {}),
        splits=splits,
        classes=all_classes(manifest, source),
        source=next(iter(splits.values())).source,
        licence=source.licence,
        tool=this_tool(),
    )


def write_skipped(out: Path, split: str, records: Iterable[ShardNote]) -> None:
    """Write `skipped-SPLIT.jsonl`, a line for each skipped picture; no file where there is none."""
    path = out / f"skipped-{split}.jsonl"
    path.unlink(missing_ok=True)
    lines = (item.model_dump_json() for record in records for item in record.skipped)
    if (first := next(lines, None)) is None:
        return
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.write(first + "\n")
        file.writelines(line + "\n" for line in lines)


def read_skipped(out: Path, split: str) -> Iterator[Skipped]:
    """The skipped pictures of a split that was prepared in `out`."""
    path = out / f"skipped-{split}.jsonl"
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield Skipped(**json.loads(line))


def this_tool() -> str:
    """The tool and its version, as notes and manifests have it."""
    return f"vugen-cli {__version__}"
