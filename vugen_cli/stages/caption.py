"""Captions by a VLM, beside those that a prepared data set has.

The result mirrors the data set shard by shard, its pictures byte for byte; only `.txt` and `.json` of a
sample grow. Long captions teach a sampler more than any change of architecture (Photoroom's PRX study).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vugen_cli.checkpoint import fingerprint
from vugen_cli.data.images import is_jpeg
from vugen_cli.data.loader import Chunk, ShardedImages
from vugen_cli.data.manifest import (
    FORMAT,
    CaptionOrigin,
    Counted,
    Manifest,
    ShardNote,
    Skipped,
    Split,
    read_manifest,
    this_tool,
    write_manifest,
    write_skipped,
)
from vugen_cli.data.sample import Meta
from vugen_cli.data.shapes import shape_name
from vugen_cli.data.writer import add_member, held, shard_file
from vugen_cli.errors import VugenError
from vugen_cli.processes import barrier, is_first
from vugen_cli.recipe import Captioning
from vugen_cli.stages.latent_cache import claim, damage_of, finished_notes, write_missing
from vugen_cli.vlm.chat import CHAT_BATCH, ask, asking
from vugen_cli.vlm.frozen import load_model

Captioner = Callable[[Tensor], list[list[str]]]  # uint8 [B, 3, S, S] -> by instruction, a caption of each


def write_captions(
    data: Path, out: Path, vlm: str, asked: Captioning, device: torch.device, workers: int = 0
) -> Manifest:
    """Write a data set with the VLM's captions after its own, and return its manifest.

    The processes of a job share out the shards. Killed, the same call goes on with those that are missing,
    and ends with the same bytes. A picture that cannot be read is left out, counted and listed.

    Args:
        data: a prepared data set.
        out: the folder to write.
        vlm: who describes: `nano`, a Hugging Face directory or a hub id; on a GPU in bfloat16.
        asked: what it is told.
        device: where it runs.
        workers: processes that read and decode pictures while others are described; 0: this one does.

    Raises:
        VugenError: a bad data set, a VLM that cannot be asked, no readable picture; `out` holds something
            else or cannot be written.
    """
    splits = {name: ShardedImages(data, name) for name in read_manifest(data).splits}
    if any(images.most_sources for images in splits.values()):
        raise VugenError(f"{data} holds edits, whose captions say what to change: caption other images")
    source = next(iter(splits.values())).manifest
    model, processor = load_model(vlm, device, "bfloat16" if device.type == "cuda" else "float32")
    model.eval().requires_grad_(False)
    describe = partial(_describe, model, processor, vlm, asked)
    first = next((pixels for images in splits.values() for pixels, _ in images.in_order(1)), None)
    if first is None:
        raise VugenError(f"no picture of {data} can be read: run `vugen prepare` again")
    describe(torch.from_numpy(first).permute(2, 0, 1)[None])  # one that cannot be asked is refused here
    weights = fingerprint(model)
    told = [
        CaptionOrigin(vlm=vlm, fingerprint=weights, instruction=each, tokens=asked.tokens)
        for each in asked.instructions
    ]
    manifest = Manifest(
        format=source.format if source.shapes else FORMAT,
        **source.model_dump(include={"dataset", "size", "licence", "classes", "source"}),
        **({"shapes": source.shapes} if source.shapes else {}),
        splits={},
        tool=this_tool(),
        captioned=[*(source.captioned or []), *told],
    )
    plan = {
        **manifest.model_dump(mode="json", exclude={"splits"} | ({"shapes"} - manifest.model_fields_set)),
        "images": {name: [s.sha256 for s in source.splits[name].shards] for name in splits},
    }
    known = len(source.captioned or [])
    with held(out) if is_first() else nullcontext():
        if is_first():
            claim(out, plan, "captions")
        barrier("captions planned")
        write = partial(_write_shard, out, describe=describe, known=known)
        write_missing(out, splits.values(), CHAT_BATCH, workers, write)
        barrier("captions written")
        if is_first():
            manifest.splits = {name: _split(out, name, images) for name, images in splits.items()}
            write_manifest(out, manifest)
    barrier("captions prepared")
    return read_manifest(out)


def _describe(model: Any, processor: Any, name: str, asked: Captioning, images: Tensor) -> list[list[str]]:
    """By instruction, a caption of each image in one line, empty where the VLM says nothing."""
    found = []
    for instruction in asked.instructions:
        with asking(name, instruction):
            answers = ask(model, processor, images, instruction, asked.tokens)
        found.append([" ".join(answer.split()) for answer in answers])
    return found


def _write_shard(
    out: Path,
    images: ShardedImages,
    shard: int,
    chunks: Iterator[Chunk],
    bar: Any,
    describe: Captioner,
    known: int,
) -> ShardNote:
    """Write a shard from its next chunks."""
    name, count = images.names[shard], int(images.counts[shard])
    captions, skipped = Counted(), []
    with shard_file(out / name) as (tar, facts):
        for first in range(0, count, CHAT_BATCH):
            rows, pixels, metas = next(chunks)
            told = zip(*describe(pixels), strict=True) if rows else ()
            samples = dict(zip(rows, zip(metas, told, strict=True), strict=True))
            for row in range(first, min(first + CHAT_BATCH, count)):
                if row not in samples:
                    skipped.append(Skipped(key=f"{name}/{row:09d}", reason=damage_of(images, shard, row)))
                    continue
                meta = with_captions(samples[row][0], samples[row][1], known)
                lines = meta.pop("captions")
                picture = images.stored(shard, row)[0]
                kind = "jpg" if is_jpeg(picture) else "png"
                add_member(tar, f"{row:09d}.{kind}", picture)
                add_member(tar, f"{row:09d}.json", json.dumps(meta, ensure_ascii=False).encode())
                add_member(tar, f"{row:09d}.txt", ("\n".join(lines) + "\n").encode())
                captions.add(lines)
            bar.update(min(CHAT_BATCH, count - first))
    shape = shape_name(images.shape(shard)) if len(images.shapes) > 1 else None
    return ShardNote(**facts, samples=captions.images, skipped=skipped, captions=captions, shape=shape)


def with_captions(meta: Meta, told: Sequence[str], known: int) -> Meta:
    """A sample's facts with new captions after its own, and where each comes from.

    Args:
        meta: with `captions`, and where it was captioned before with `caption_origins`.
        told: a caption of each instruction; an empty one is left out.
        known: how many instructions there were before.
    """
    old = meta["captions"]
    origins: Any = meta.get("caption_origins")
    # A set prepared again from a captioned one has numbers that its manifest does not explain.
    fits = isinstance(origins, list) and len(origins) == len(old)
    if not fits or any(number not in range(known + 1) for number in origins):
        origins = [0] * len(old)
    new = {number: text for number, text in enumerate(told, start=known + 1) if text}
    return {
        **meta,
        "captions": [*old, *new.values()],
        "caption_origins": [*origins, *new],
        "caption_count": len(old) + len(new),
    }


def _split(out: Path, name: str, images: ShardedImages) -> Split:
    """What the manifest says of a split, from the records of its shards; lists what was left out."""
    records, captions = finished_notes(out, images), Counted()
    for record in records:
        captions.merge(record.captions)
    write_skipped(out, name, records)
    return Split(
        count=captions.images,
        source=images.manifest.splits[name].source,
        shards=[record.shard for record in records if record.samples],
        skipped_count=sum(len(record.skipped) for record in records),
        captions=captions.summary(),
    )
