"""`vugen prepare`: turn images and captions into shards."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vugen_cli.commands.options import Answer, DeviceOption, VlmOption, beside, going_on, refuse_address
from vugen_cli.errors import VugenError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vugen_cli.data.sample import Source


Dataset = Literal[
    "openmoji", "imagenet", "coco", "folder", "captions", "webdataset", "edits", "openmoji-edits", "hf"
]
DRAWN = ("openmoji", "openmoji-edits")


SourceOption = Annotated[
    Path | None,
    typer.Option(help="Where the data is; imagenet and coco also look in $IMAGENET_DIR and $COCO_DIR."),
]
OutOption = Annotated[Path | None, typer.Option(help="Folder to write.  [default: data/DATASET]")]
SizeOption = Annotated[
    int | None, typer.Option(min=8, max=8192, help="Side in pixels.  [default: 256; openmoji 64]")
]
ShapesOption = Annotated[
    str | None,
    typer.Option(
        help="Instead of --size: several shapes in pixels, a square among them, as 64x64,48x80,80x48; each "
        "picture is cut to the nearest."
    ),
]
CountOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Take a random subset of this many.  [default: all; openmoji 40000 train, 2000 val]"
    ),
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes.  [default: all cores]")]
PairsOption = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="openmoji: share of the scenes with two subjects.  [default: 0.25]"),
]
CountsOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="openmoji: share of those with two or three of one subject.  [default: a fifth of the rest]",
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Fail on the first picture that cannot be used.")
]
LatentsOption = Annotated[
    Path | None,
    typer.Option(help="Instead: write the latents that this checkpoint's reducer makes of a data set."),
]
LatentDataOption = Annotated[
    str | None,
    typer.Option(help="With --latents: the data set.  [default: the one the checkpoint was trained on]"),
]
FlipOption = Annotated[
    bool | None,
    typer.Option(help="With --latents: of mirrored images too.  [default: data.flip of its recipe]"),
]


SHARD_SIZE = 1000


def prepare(
    dataset: Annotated[Dataset | None, typer.Option(help="What kind of data to prepare.")] = None,
    source: SourceOption = None,
    out: OutOption = None,
    split: Annotated[Literal["train", "val"], typer.Option(help="Which split to prepare.")] = "train",
    size: SizeOption = None,
    shapes: ShapesOption = None,
    count: CountOption = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = SHARD_SIZE,
    workers: WorkersOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle, and of drawn scenes.")] = 0,
    pairs: PairsOption = None,
    counts: CountsOption = None,
    strict: StrictOption = False,
    latents: LatentsOption = None,
    data: LatentDataOption = None,
    flip: FlipOption = None,
    vlm: VlmOption = None,
    device: DeviceOption = None,
) -> Answer:
    """Turn images and captions into webdataset shards with a manifest.

    Resizes and crops to squares, or to --shapes, keeps every caption, shuffles, and writes
    train-000000.tar, ... and dataset.json. Pictures that cannot be used are skipped and listed in
    skipped-train.jsonl. Interrupted, the same command goes on where it stopped.

    \b
    Sources:
      openmoji    drawn scenes with captions; needs no --source
      imagenet    ILSVRC2012: the official tar, class tars, or extracted train/ and val/ folders
      coco        COCO captions: annotations/ with train2017/ and val2017/
      folder      class folders, or images whose file names are the captions
      captions    images with a .txt beside each, or a .csv, .tsv or .jsonl of path and caption
      webdataset  existing shards, such as img2dataset writes
      hf          a Hugging Face save_to_disk directory or parquet files
      edits       source, instruction and target: a table of paths, webdataset shards or parquet files
      openmoji-edits  drawn scenes and what a change makes of them; needs no --source

    \b
    Examples:
      vugen prepare --dataset openmoji --split val
      vugen prepare --dataset imagenet --source /data/ILSVRC2012_img_train.tar --out data/imagenet
      vugen prepare --dataset coco --source /data/coco --count 10000
      vugen prepare --dataset captions --source photos.csv --size 512 --strict
      vugen prepare --dataset captions --source photos.csv --shapes 256x256,192x336,336x192
      vugen prepare --dataset edits --source pairs.jsonl --out data/edits
      vugen prepare --latents reducer.safetensors --out data/mine-latents
    """
    if (dataset is None) == (latents is None):
        raise VugenError("give --dataset (images to prepare) or --latents (a checkpoint), one of the two")
    if latents is None and (data or flip is not None or vlm or device):
        raise VugenError("--data, --flip, --vlm and --device go with --latents")
    if (pairs is not None or counts is not None) and dataset != "openmoji":
        raise VugenError("--pairs and --counts go with --dataset openmoji")
    laid = split != "train" or seed or shard_size != SHARD_SIZE
    if dataset is None and (source or count or strict or size or shapes is not None or laid):
        raise VugenError(
            "--source, --split, --size, --shapes, --count, --shard-size, --seed and --strict go with "
            "--dataset: --latents makes those of a whole data set"
        )
    if latents is not None:
        return prepare_latents(latents, data, out, vlm, device, flip, workers)
    assert dataset is not None
    if shapes is not None:
        check_shapes(dataset, size)
    out = out or Path("data") / dataset
    size = size or (64 if dataset in DRAWN else 256)
    opened = partial(open_source, dataset, source, split, size, count, seed, pairs, counts)
    return prepare_images(opened, out, split, size, shapes, shard_size, workers, seed, count, strict)


def check_shapes(dataset: Dataset, size: int | None) -> None:
    """Refuse what does not go with `--shapes`."""
    if size or dataset in DRAWN:
        raise VugenError("--shapes goes without --size, and with pictures of your own: drawn ones are square")


def prepare_images(
    opened: "Callable[[], Source]",
    out: Path,
    split: str,
    size: int,
    shapes: str | None,
    shard_size: int,
    workers: int | None,
    seed: int,
    count: int | None,
    strict: bool,
) -> Answer:
    """Write one split of a data set and say what it holds; arguments as of `write_dataset`."""
    from vugen_cli.commands.answers import Prepared
    from vugen_cli.data.shards import cores
    from vugen_cli.data.writer import write_dataset
    from vugen_cli.processes import meet

    meet()
    with going_on(out):
        manifest = write_dataset(
            opened(), out, split, size, shard_size, workers or cores(), seed, count, strict, shapes=shapes
        )
    entry = manifest.splits[split]
    listed = f"skipped-{split}.jsonl"
    skipped = f", {entry.skipped_count} skipped (listed in {listed})" if entry.skipped_count else ""
    of = Counter[str]()
    for shard in entry.shards:
        of[shard.shape or str(manifest.size)] += shard.samples
    parts = ", ".join(f"{count} of {shape}" for shape, count in of.items())
    images = f"{entry.count} images: {parts} px" if shapes else f"{entry.count} images of {size} px"
    names, more = manifest.classes or [], ""
    if names:  # shown, because folders of other things are taken for classes
        more = f"; {len(names)} classes: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
    typer.echo(f"{out}: {split}, {images} in {len(entry.shards)} shards{skipped}{more}")
    return Prepared(
        out=str(out),
        split=split,
        count=entry.count,
        size=manifest.size,
        shards=len(entry.shards),
        skipped_count=entry.skipped_count,
    )


def prepare_latents(
    checkpoint: Path,
    data: str | None,
    out: Path | None,
    vlm: str | None,
    device: str | None,
    flip: bool | None,
    workers: int | None,
) -> Answer:
    """Write the latent cache of a data set."""
    from vugen_cli.checkpoint import read_card
    from vugen_cli.commands.answers import Prepared
    from vugen_cli.data.remote import is_remote
    from vugen_cli.data.shards import cores
    from vugen_cli.engine.device import pick_device
    from vugen_cli.processes import meet
    from vugen_cli.stages.latent_cache import write_latents

    meet()
    known = read_card(checkpoint).data
    if data is None and known.mixture:
        raise VugenError(
            f"{checkpoint} was trained on a mixture: give --data, once for each of its data sets"
        )
    if data is None:
        refuse_address(known.path)
    elif is_remote(data):
        raise VugenError(
            f"--data {data}: latents are made of a data set on disk; training reads addresses too"
        )
    images = Path(known.path if data is None else data)
    out = out or beside(images, "latents")
    with going_on(out):
        manifest = write_latents(checkpoint, images, out, pick_device(device), vlm, flip, workers or cores())
    count = sum(entry.count for entry in manifest.splits.values())
    damaged = sum(entry.skipped_count for entry in manifest.splits.values())
    listed = f", {damaged} damaged (listed in skipped-SPLIT.jsonl)" if damaged else ""
    typer.echo(
        f"{out}: latents of {count} images{listed}; "
        f"next: vugen train-sampler --reducer {checkpoint} --data {out}"
    )
    shards = sum(len(entry.shards) for entry in manifest.splits.values())
    return Prepared(out=str(out), count=count, size=manifest.size, shards=shards, skipped_count=damaged)


def open_source(
    dataset: Dataset,
    source: Path | None,
    split: str,
    size: int,
    count: int | None,
    seed: int,
    pairs: float | None = None,
    counts: float | None = None,
) -> "Source":
    """The source that `--dataset` and `--source` name.

    Raises:
        VugenError: nothing there, or not in a layout that is known.
    """

    if dataset == "openmoji":
        from vugen_cli.nano.scenes import PAIRS, OpenMojiScenes

        if source is not None:
            raise VugenError("--dataset openmoji draws its own pictures: leave --source out")
        count = count or {"train": 40_000, "val": 2_000}[split]
        pairs = PAIRS if pairs is None else pairs
        if counts is not None and counts > 1 - pairs:
            raise VugenError(f"--counts {counts:g} and --pairs {pairs:g} are more than all scenes together")
        return OpenMojiScenes(count, split, size, seed, pairs, counts)
    if dataset == "openmoji-edits":
        from vugen_cli.nano.edits import OpenMojiEdits

        if source is not None:
            raise VugenError("--dataset openmoji-edits draws its own pictures: leave --source out")
        return OpenMojiEdits(count or {"train": 40_000, "val": 2_000}[split], split, size, seed)
    if dataset == "imagenet":
        from vugen_cli.data.imagenet import ImageNet, find_imagenet

        return ImageNet(find_imagenet(source), split)
    if dataset == "coco":
        from vugen_cli.data.coco import CocoCaptions, find_coco

        return CocoCaptions(find_coco(source), split)
    if source is None:
        raise VugenError(f"--dataset {dataset} needs --source: where the data is")
    if dataset == "folder":
        from vugen_cli.data.folder import ImageFolder

        return ImageFolder(source, split)
    if dataset == "captions":
        from vugen_cli.data.captions import CaptionedImages

        return CaptionedImages(source, split)
    if dataset == "webdataset":
        from vugen_cli.data.shards import WebDatasetShards

        return WebDatasetShards(source, split)
    if dataset == "edits":
        from vugen_cli.data.edits import open_edits

        return open_edits(source, split)
    from vugen_cli.data.hf import HuggingFaceDataset

    return HuggingFaceDataset(source, split)
