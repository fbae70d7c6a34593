"""Latent caches: z̃ of a prepared data set, computed once, so that stage 2 needs no encoder.

A cache mirrors its data set shard by shard and sample by sample, the damaged ones included, so that the
loader's order over it is that over the images: training sees the same samples at the same steps.
"""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vugen_cli.card import Card
from vugen_cli.checkpoint import fingerprint
from vugen_cli.data.images import is_jpeg
from vugen_cli.data.loader import Chunk, Damaged, ShardedImages, StoredChunks, batches
from vugen_cli.data.manifest import (
    FORMAT,
    Manifest,
    ShardNote,
    Skipped,
    read_manifest,
    write_manifest,
    write_skipped,
)
from vugen_cli.data.shapes import shape_name
from vugen_cli.data.writer import add_member, finished_shard, held, shard_file
from vugen_cli.engine.precision import passes, wants_bfloat16
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import write_json
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.reducer import merge
from vugen_cli.processes import barrier, is_first, rank, world_size
from vugen_cli.progress import progress_bar
from vugen_cli.recipe import USE_OF_VLM, Recipe
from vugen_cli.sampling.trained import load_autoencoder
from vugen_cli.vlm.frozen import FrozenVLM, vlm_of

# Images, which of their shards, the chunks left, its own first, and a progress bar -> the shard's note.
WriteShard = Callable[[ShardedImages, int, Iterator[Chunk], Any], ShardNote]

# Images encoded together; part of the format, since kernels may round otherwise at another size.
ENCODE_BATCH = 64


def latent_facts(autoencoder: Autoencoder, vlm: FrozenVLM, recipe: Recipe, card: Card) -> Any:
    """What the z̃ of an image depends on, as `dataset.json` keeps it."""
    of_vae = autoencoder.vae is not None and autoencoder.reducer.recipe.kind == "vae"
    return {
        "reducer": fingerprint(autoencoder.reducer, "autoencoder.reducer."),
        "vlm": vlm.vision,
        "vae": fingerprint(autoencoder.vae.model) if of_vae and autoencoder.vae else None,
        "grid": list(card.latents.grid),
        "channels": card.latents.channels,
        **recipe.model_dump(mode="json", include=set(USE_OF_VLM) - {"instruction"}),
    }


@torch.no_grad()
def check_size(
    images: ShardedImages, autoencoder: Autoencoder, vlm: FrozenVLM, card: Card, checkpoint: Path
) -> None:
    """Refuse pictures of another size than a checkpoint's, if their z̃ lies on another grid than it notes.

    Raises:
        VugenError: names both grids.
    """
    if images.size == card.data.size == card.image_size:
        return
    grey = torch.full((1, 3, images.size, images.size), 127, dtype=torch.uint8)
    z = autoencoder.z(vlm, grey)  # on the VLM's device, which need not be the reducer's
    (rows, columns), grid = merge(z, autoencoder.reducer.recipe.merge).shape[1:3], card.latents.grid
    if (rows, columns) != grid:
        raise VugenError(
            f"pictures of {images.size} px have latents of {rows} x {columns} places, and {checkpoint} is "
            f"for {grid[0]} x {grid[1]}: make one for them that keeps its reducer, by "
            f"`vugen train-reducer --reducer {checkpoint} --data {images.directory}`"
        )


def check_cache(images: ShardedImages, facts: dict[str, Any], flip: bool) -> None:
    """Refuse a cache that another reducer, VLM or use of it made, or without the mirrored images it needs.

    Raises:
        VugenError: says what differs.
    """
    if images.sets != [images]:
        for part in images.sets:
            check_cache(part, facts, flip)
        return
    assert images.manifest.latents and images.manifest.data
    made = images.manifest.latents.model_dump(mode="json")
    different = [key for key, value in facts.items() if made.get(key) != value]
    if different:
        raise VugenError(
            f"{images.directory} holds the latents of another {' and another '.join(different)}: make them "
            f"again with `vugen prepare --latents REDUCER --data {images.manifest.data.path}`"
        )
    if flip and not made["flip"]:
        raise VugenError(
            f"{images.directory} has no mirrored images, which data.flip asks for: prepare it with --flip, "
            "or train with --set data.flip=false"
        )


def write_latents(
    checkpoint: Path,
    data: Path,
    out: Path,
    device: torch.device,
    vlm: str | None = None,
    flip: bool | None = None,
    workers: int = 0,
) -> Manifest:
    """Write the latent cache of every split of a data set and return its manifest.

    The processes of a job share out the shards. Killed, the same call goes on with those that are missing.
    Damaged pictures are counted and listed.

    Args:
        checkpoint: a reducer or sampler, whose reducer makes the z̃.
        data: a prepared data set.
        out: the folder to write.
        device: where to encode.
        vlm: where the VLM is now, if not where the card says.
        flip: keep z̃ of the mirrored images too; default as the checkpoint's recipe has `data.flip`.
        workers: processes that read and decode the images while these are encoded; 0: this one does.

    Raises:
        VugenError: a bad checkpoint, VLM or data set; a shard with more damaged pictures than
            `data.max_corrupt` of the checkpoint's recipe allows; `out` holds something else or cannot be
            written.
    """
    autoencoder, _, card = load_autoencoder(checkpoint, device)
    frozen = vlm_of(card, checkpoint, vlm, device)
    splits = {name: ShardedImages(data, name) for name in read_manifest(data).splits}
    first = next(iter(splits.values()))
    check_size(first, autoencoder, frozen, card, checkpoint)
    source = first.manifest
    flip = frozen.recipe.data.flip if flip is None else flip
    precision = frozen.recipe.train_sampler.precision  # z̃ is then what that stage would compute itself
    grids = {}
    for shape in first.shapes if source.shapes else []:
        grids[shape_name(shape)] = list(autoencoder.grid(frozen, shape))
    plan = {
        "format": source.format if source.shapes else FORMAT,
        **source.model_dump(include={"dataset", "size", "licence", "classes"}),
        **({"shapes": source.shapes} if source.shapes else {}),
        "data": source.card(data).model_dump(mode="json"),
        "latents": {
            **latent_facts(autoencoder, frozen, frozen.recipe, card),
            "dtype": "float16",
            "precision": "bfloat16" if wants_bfloat16(precision, device) else "float32",
            "flip": flip,
            **({"grids": grids} if source.shapes else {}),
        },
        "images": {name: [s.sha256 for s in source.splits[name].shards] for name in splits},
    }
    with held(out) if is_first() else nullcontext():
        if is_first():
            claim(out, plan, "latents")
        barrier("latents planned")
        encode = partial(_encode, autoencoder, frozen, flip)
        most = frozen.recipe.data.max_corrupt

        def write(images: ShardedImages, shard: int, chunks: Iterator[Chunk], bar: Any) -> ShardNote:
            with passes(precision, device, training=True)():
                return _write_shard(out, images, shard, chunks, encode, bar, most)

        write_missing(out, splits.values(), ENCODE_BATCH, workers, write)
        barrier("latents written")
        if is_first():
            entries = {name: _split(out, name, images) for name, images in splits.items()}
            write_manifest(out, Manifest.model_validate({**plan, "splits": entries}))
    barrier("latents prepared")
    return read_manifest(out)


def write_missing(
    out: Path, sets: Iterable[ShardedImages], size: int, workers: int, write: WriteShard
) -> None:
    """Write those of this process's shards that are not there yet, and note each that is finished.

    Args:
        out: the folder, whose plan is noted.
        sets: what the shards are made of.
        size: samples in a chunk.
        workers: processes that read them ahead.
        write: one shard.
    """
    shards = [(images, shard) for images in sets for shard in range(len(images.names))]
    mine = shards[rank() :: world_size()]
    notes = {(images, shard): note_of(out, images.names[shard]) for images, shard in mine}
    missing = [which for which in mine if finished_shard(out, notes[which]) is None]
    chunks = batches(StoredChunks(missing, size), workers if missing else 0)
    total = sum(int(images.counts[shard]) for images, shard in missing)
    with progress_bar(total=total, unit="img", desc=f"{out}") as bar:
        for images, shard in missing:
            record = write(images, shard, chunks, bar)
            write_json(notes[images, shard], record.model_dump(exclude_none=True))


def note_of(out: Path, shard: str) -> Path:
    """Where it is noted that a shard is finished."""
    return out / ".progress" / f"{shard}.json"


def finished_notes(out: Path, images: ShardedImages) -> list[ShardNote]:
    """What is noted of the shards made of a split's.

    Raises:
        VugenError: one is not there.
    """
    found = [note for shard in images.names if (note := finished_shard(out, note_of(out, shard)))]
    if len(found) < len(images.names):
        raise VugenError(f"shards are missing from {out}: all processes of the job must share --out")
    return found


def _split(out: Path, name: str, images: ShardedImages) -> dict[str, Any]:
    """What the manifest says of a split, from the records of its shards; lists the damaged pictures."""
    written = finished_notes(out, images)
    write_skipped(out, name, written)
    skipped = sum(len(record.skipped) for record in written)
    return {
        "count": len(images),
        "shards": [record.shard for record in written],
        **({"skipped_count": skipped} if skipped else {}),
        **({"sources": images.most_sources} if images.most_sources else {}),
    }


def claim(out: Path, plan: dict[str, Any], what: str) -> None:
    """Note what is to be written before the first shard; refuse a folder that holds something else.

    Args:
        out: the folder.
        plan: all that decides the bytes of its shards, as JSON.
        what: the shards hold, for messages.

    Raises:
        VugenError: it holds other shards, or such as were written by another plan.
    """
    note = out / ".progress" / "plan.json"
    try:
        found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else None
    except (OSError, ValueError) as error:
        raise VugenError(f"{note} is damaged ({error}): delete {out} and prepare again") from error
    if found is None and any(out.glob("*.tar")):
        raise VugenError(f"{out} already holds shards without {what} of this tool: choose another --out")
    if found:
        # The same shards may be seen elsewhere, and a split may have come to them.
        if found.get("images"):
            found["images"] = plan["images"] | found["images"]
        if found.get("data") and plan.get("data"):
            keys = ("path", "counts", "sha256", "train_sha256")  # the shards are compared one by one
            found["data"] |= {key: plan["data"][key] for key in keys if key in plan["data"]}
    if found not in (None, plan):
        different = ", ".join(key for key in plan if found.get(key) != plan[key])
        raise VugenError(
            f"{out} holds {what} prepared otherwise ({different}): choose another --out, or delete {out}"
        )
    write_json(note, plan)
    # Of a run that was killed.
    for leftover in [*out.glob(".*.tar.*"), *out.glob(".*.npy.*"), *note.parent.glob(".*.json.*")]:
        leftover.unlink(missing_ok=True)


@torch.no_grad()
def _write_shard(
    out: Path,
    images: ShardedImages,
    shard: int,
    chunks: Iterator[Chunk],
    encode: Callable[[torch.Tensor], np.ndarray],
    bar: Any,
    most: float,
) -> ShardNote:
    """Write a shard of latents from its next chunks, unless a larger share than `most` is damaged."""
    name, count, skipped = images.names[shard], int(images.counts[shard]), []
    with shard_file(out / name) as (tar, facts):
        for first in range(0, count, ENCODE_BATCH):
            rows, pixels, metas = next(chunks)
            latents = encode(pixels) if rows else np.empty(0)
            samples = dict(zip(rows, zip(latents, metas, strict=True), strict=True))
            for row in range(first, min(first + ENCODE_BATCH, count)):
                if row not in samples:  # the loader puts another sample there, as it does for the image
                    add_member(tar, f"{row:09d}.json", b'{"damaged": true}')
                    skipped.append(Skipped(key=f"{name}/{row:09d}", reason=damage_of(images, shard, row)))
                    continue
                latent, meta = samples[row]
                captions, sources = meta.pop("captions"), meta.pop("sources", [])
                stored = io.BytesIO()
                np.save(stored, latent, allow_pickle=False)
                add_member(tar, f"{row:09d}.npy", stored.getvalue())
                add_member(tar, f"{row:09d}.txt", ("\n".join(captions) + "\n").encode())
                add_member(tar, f"{row:09d}.json", json.dumps(meta, ensure_ascii=False).encode())
                for number, source in enumerate(sources):  # as they are: the VLM reads their pixels
                    kind = "jpg" if is_jpeg(source) else "png"
                    add_member(tar, f"{row:09d}.source{number}.{kind}", source)
            bar.update(min(ENCODE_BATCH, count - first))
        if len(skipped) > math.ceil(most * count):  # of a shard of three, one may be
            raise VugenError(
                f"{len(skipped)} of {count} pictures of {images.directory}/{name} are damaged "
                f"({skipped[0].reason}), more than data.max_corrupt={most:g} allows: copy that shard or "
                "prepare its data set again"
            )
    shape = shape_name(images.shape(shard)) if len(images.shapes) > 1 else None
    return ShardNote(**facts, samples=count, skipped=skipped, shape=shape)


def damage_of(images: ShardedImages, shard: int, row: int) -> str:
    """Why a sample was left out."""
    try:
        images.read(shard, row)
    except Damaged as error:
        return first_line(error)
    return "could not be read a moment ago"


def _encode(autoencoder: Autoencoder, vlm: FrozenVLM, flip: bool, images: torch.Tensor) -> np.ndarray:
    """float16 [B, 1 or 2, h, w, c]: z̃ of the images, then of the mirrored ones.

    Raises:
        VugenError: a value does not fit float16.
    """
    views = [images, images.flip(-1)] if flip else [images]
    z = torch.stack([autoencoder.encode(vlm, view) for view in views], 1).half()
    if not z.isfinite().all():
        raise VugenError("a latent is beyond the range of float16: this reducer cannot be cached")
    return z.cpu().numpy()
