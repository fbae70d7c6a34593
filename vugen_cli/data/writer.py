"""Writes a source as webdataset shards with a manifest, so that the bytes depend on the plan alone.

The plan is fixed before the first picture is read: a seeded permutation of the source, cut into shards. A
worker writes one whole shard under a temporary name and renames it; a note beside it in `.progress/` lets an
interrupted run go on. Nothing that differs between runs (times, users, worker counts) reaches a file, so
neither interruptions nor the number of workers change a byte.

Shards are written with `tarfile`, not webdataset's TarWriter: the same format, but importing webdataset
imports torch, two seconds that every worker would pay even for drawn pictures.
"""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vugen_cli.data.images import adm_crop, decode, encode, is_lossless
from vugen_cli.data.index import index_path, list_members, write_index
from vugen_cli.data.manifest import (
    Counted,
    Manifest,
    Plan,
    ShardNote,
    Skipped,
    add_split,
    all_classes,
    read_skipped,
    read_written,
    this_tool,
    write_manifest,
    write_skipped,
)
from vugen_cli.data.remote import READ_PAUSE, READ_TRIES, wait_again
from vugen_cli.data.sample import MOST_SOURCES, PICTURE, Sample, Source, encodable, hash_of
from vugen_cli.data.shapes import Shape, nearest, parse_shapes, shape_name
from vugen_cli.data.shuffle import Shuffled
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import locked, whole_file, write_json
from vugen_cli.processes import barrier, end_with_parent, is_first, rank, world_size
from vugen_cli.progress import progress_bar

LOSSLESS_UP_TO = 128
"""Pictures from lossless files stay lossless up to this size; above it JPEG costs nothing one can see."""

# Errors of the system, not of a picture: they pass, or else touch every picture that comes after.
_PASSING = frozenset(
    (
        errno.EIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
    )
)

_STAGES = ("planned", "written", "prepared")  # at which the processes of a job wait for each other


@dataclass
class _Job:
    """What a worker needs to write any shard of the plan."""

    source: Source
    out: Path
    split: str
    size: int
    shapes: list[Shape]
    shard_size: int
    order: Shuffled
    strict: bool
    labels: list[int]  # of the source's classes among those of all splits; empty where they are the same


class _Stopped(Exception):
    """The run was interrupted: leave the shard at hand."""


def write_dataset(
    source: Source,
    out: str | Path,
    split: str = "train",
    size: int = 256,
    shard_size: int = 1000,
    workers: int = 1,
    seed: int = 0,
    count: int | None = None,
    strict: bool = False,
    shapes: str | None = None,
) -> Manifest:
    """Write one split of a data set and return its manifest, which `out/dataset.json` then holds.

    A shard `train-000000.tar` holds for each sample `KEY.jpg` or `KEY.png` (`size` x `size`, RGB), `KEY.txt`
    (a caption a line) and `KEY.json` (the sample's meta with `source_key`, `width`, `height` and
    `caption_count`), where KEY is the position in the plan; positions of skipped pictures stay empty. An edit
    has the pictures that it is made from too, `KEY.source0.jpg` and so on, and their `source_count`. Its
    index lies beside it (see `index`), and `skipped-train.jsonl` lists the skipped pictures. Another split of
    the same data set may already be in `out` and is kept; a `label` counts the classes of all splits. A
    finished split is recognised and left as it is; missing shards of it are written again.

    With `shapes`, each picture is cut to that of the nearest aspect ratio, and items that would share a shard
    go into one for each shape, `train-000000-48x80.tar` and so on.

    Args:
        source: the pictures. A `fingerprint` attribute, where it has one, is a hash over its listing and
            tells another source under the same name.
        out: the directory to write to; made if missing.
        split: "train" or "val".
        size: side of the stored pictures in pixels.
        shard_size: items a shard, skipped ones included.
        workers: processes. 1 works in this process; more start fresh ones, so a script that calls this must
            guard its main part with `if __name__ == "__main__"`.
        seed: of the shuffle.
        count: take a random subset of this many items (all if the source has fewer), skipped ones included.
        strict: the first picture that cannot be used ends the run.
        shapes: see `parse_shapes`; `size` is then the side of the square among them.

    Raises:
        VugenError: bad arguments, an empty source or one that the system will not read, `out` in use,
            unwritable, full or holding something else, a picture that cannot be used with `strict`, not one
            that can without, or a worker that died.
        KeyboardInterrupt: interrupted; what is finished stays and another run goes on from there.
    """
    if size < 8 or shard_size < 1 or workers < 1 or (count is not None and count < 1):
        raise VugenError(
            f"--size must be 8 or more and --shard-size, --workers and --count 1 or more, not "
            f"{size}, {shard_size}, {workers} and {count}"
        )
    cuts = [(size, size)] if shapes is None else parse_shapes(shapes)
    size = next(height for height, width in cuts if height == width)
    if len(source) == 0:
        raise VugenError(f"{source.origin} holds no pictures: nothing to prepare")
    out = Path(out)
    order = Shuffled(len(source), seed, count)
    plan = Plan(
        dataset=source.name,
        size=size,
        shapes=",".join(map(shape_name, cuts)) if shapes else None,
        seed=seed,
        shard_size=shard_size,
        items=len(order),
        listing=_listing(source),
    )
    job = _Job(source, out, split, size, cuts, shard_size, order, strict, [])
    if not is_first():
        return _help(job, plan, workers)
    with held(out):
        manifest = read_written(out)
        job.labels = _labels(source, manifest)
        if manifest and split in manifest.splits:
            manifest = _repair(job, plan, manifest)
            for stage in _STAGES:
                barrier(stage)
            return manifest
        _check_other_splits(out, manifest, plan)
        _claim(out, split, plan)
        barrier("planned")
        _write_shards(job, workers)
        barrier("written")
        missing = sum(1 for shard in range(_shard_count(job)) if _finished(job, shard) is None)
        if missing:
            raise VugenError(
                f"{missing} shards are missing from {out}: --out must be a folder that all processes of the "
                "job share; run the same command again to write them"
            )
        manifest = add_split(manifest, source, split, plan, _records(job))
        if not manifest.splits[split].count:
            reasons = _all_skipped(source, (item for record in _records(job) for item in record.skipped))
            _forget_progress(out, split)  # so that a run after the cause is mended reads the pictures again
            raise VugenError(reasons)
        write_skipped(out, split, _records(job))
        write_manifest(out, manifest)
        _forget_progress(out, split)
    barrier("prepared")
    return manifest


def _help(job: _Job, plan: Plan, workers: int) -> Manifest:
    """Write this process's share of a plan that the first process of the job has laid; its manifest.

    Raises:
        VugenError: the first process laid another: they do not see the same source, or were asked otherwise.
    """
    barrier("planned")
    note = job.out / ".progress" / f"{job.split}.json"
    if note.exists():  # else the split was there already
        laid = Plan.model_validate_json(note.read_bytes()).model_dump()
        if different := _different(laid, plan, "for the first process", "here"):
            raise VugenError(
                f"the processes of this job do not prepare the same ({different}): they must be given one "
                "--source and the same options"
            )
        job.labels = _labels(job.source, read_written(job.out))
        _write_shards(job, workers)
    barrier("written")
    barrier("prepared")
    manifest = read_written(job.out)
    assert manifest  # the first process has just written it
    return manifest


# --- the plan and what earlier runs left behind


def _listing(source: Source) -> str:
    given = getattr(source, "fingerprint", None)
    return given or hash_of([source.name, source.origin, len(source), *source.classes])


def _labels(source: Source, manifest: Manifest | None) -> list[int]:
    """See `_Job`.

    Raises:
        VugenError: other classes than the data set has, two of one name among them.
    """
    own, classes = [encodable(name) for name in source.classes], all_classes(manifest, source)
    if own == classes[: len(own)]:
        return []
    if len(set(own)) < len(own) or len(set(classes)) < len(classes):
        raise VugenError(
            f"{source.origin} has other classes than the splits that are there, and two of one name, which "
            "labels cannot tell apart: choose another --out"
        )
    return [classes.index(name) for name in own]


def held(out: Path) -> AbstractContextManager[None]:
    """Hold `out` against other runs of `vugen prepare`."""
    return locked(out, f"another vugen prepare is writing to {out}: wait for it or choose another --out")


def _check_other_splits(out: Path, manifest: Manifest | None, plan: Plan) -> None:
    """All splits of a data set share its name and the size and shapes of its pictures."""
    if manifest and (manifest.captioned or manifest.latents):
        what = "latents" if manifest.latents else "captions of `vugen caption`"
        raise VugenError(f"{out} holds {what}, made from another data set: choose another --out")
    if manifest:
        _check_plan(out, _of_all(manifest), plan, "data set")


def _of_all(manifest: Manifest) -> dict[str, object]:
    """What the plans of all splits share."""
    shapes = ",".join(manifest.shapes) if manifest.shapes else None
    return {"dataset": manifest.dataset, "size": manifest.size, "shapes": shapes}


def _different(found: Mapping[str, object], plan: Plan, theirs: str = "there", ours: str = "now") -> str:
    """In what a plan differs from what was found, in words."""
    words = {"listing": "source files", "items": "--count or number of pictures", "tool": "version"}
    different = []
    for key, value in plan.model_dump(exclude_unset=True).items():
        if key in found and found[key] != value:
            name = words.get(key, "--" + key.replace("_", "-"))
            different.append(name if key == "listing" else f"{name} {found[key]} {theirs}, {value} {ours}")
    return "; ".join(different)


def _check_plan(out: Path, found: Mapping[str, object], plan: Plan, what: str) -> None:
    if different := _different(found, plan):
        raise VugenError(
            f"{out} holds a {what} prepared otherwise ({different}): choose another --out, or "
            f"delete {out} to start over"
        )


def _claim(out: Path, split: str, plan: Plan) -> None:
    """Note the plan before the first shard; refuse another plan's shards, and shards that are not ours."""
    note = out / ".progress" / f"{split}.json"
    noted = plan.model_copy(update={"tool": this_tool()})
    if note.exists():
        try:
            found = Plan.model_validate_json(note.read_bytes())
        except (OSError, ValueError) as error:
            raise VugenError(
                f"{note} is damaged ({first_line(error)}): delete {out} and prepare again"
            ) from error
        # Another version of the tool or of what it draws with may give other bytes: do not mix them.
        _check_plan(out, found.model_dump(), noted, f"half-finished {split} split")
    elif foreign := sorted(out.glob(f"{split}-*.tar")):
        raise VugenError(
            f"{out} already holds {foreign[0].name}, which no dataset.json there describes: choose another "
            f"--out, or delete the shards"
        )
    else:
        write_json(note, noted.model_dump())
    for leftover in [*out.glob(f".{split}-*"), *note.parent.glob(f".{split}*")]:  # of a run that was killed
        leftover.unlink(missing_ok=True)


def _paths(job: _Job, shard: int) -> list[Path]:
    """The tars that the items of a shard go into, one for each shape."""
    stem = f"{job.split}-{shard:06d}"
    names = [f"{stem}-{shape_name(shape)}" for shape in job.shapes] if len(job.shapes) > 1 else [stem]
    return [job.out / f"{name}.tar" for name in names]


def _shard_count(job: _Job) -> int:
    return -(-len(job.order) // job.shard_size)


def _note_of(path: Path) -> Path:
    return path.parent / ".progress" / f"{path.stem}.json"


def _finished(job: _Job, shard: int) -> list[ShardNote] | None:
    """The records of a shard that an interrupted run of this plan finished, one for each shape."""
    found = [finished_shard(job.out, _note_of(path)) for path in _paths(job, shard)]
    records = [record for record in found if record]
    skipped = job.strict and any(record.skipped for record in records)
    return None if skipped or len(records) < len(found) else records


def _records(job: _Job) -> Iterator[ShardNote]:
    """The records of all shards, in order; read a few at a time, for there may be a hundred thousand."""
    return (record for shard in range(_shard_count(job)) for record in _finished(job, shard) or ())


def finished_shard(out: Path, note: Path) -> ShardNote | None:
    """The record of a shard that an earlier run noted, if the shard is in `out` in full length."""
    try:
        record = ShardNote.model_validate_json(note.read_bytes())
        whole = not record.samples or (out / record.name).stat().st_size == record.bytes
    except (OSError, ValueError):
        return None
    return record if whole else None


def _forget_progress(out: Path, split: str) -> None:
    folder = out / ".progress"
    shutil.rmtree(folder / "again", ignore_errors=True)  # of a repair that was killed
    # The plan's note goes last: killed in between, the rest is still known as ours.
    for note in [*folder.glob(f"{split}-*.json"), folder / f"{split}.json"]:
        note.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _repair(job: _Job, plan: Plan, manifest: Manifest) -> Manifest:
    """A split that is complete: check that it is the one asked for, and write again shards that were lost."""
    entry = manifest.splits[job.split]
    found = {**entry.model_dump(exclude={"shards"}), **_of_all(manifest)}
    _check_plan(job.out, found, plan, f"{job.split} split")
    if job.strict and (first := next(read_skipped(job.out, job.split), None)):
        raise VugenError(
            f"{first.key}: {first.reason} (--strict; the split in {job.out} was prepared without it)"
        )
    lost = 0
    again = replace(job, out=job.out / ".progress" / "again")  # aside, until the bytes are known to be those
    for listed in entry.shards:
        path = job.out / listed.name
        if path.is_file() and path.stat().st_size == listed.bytes:
            continue
        try:
            records = _write_shard(again, int(path.stem.removeprefix(f"{job.split}-").partition("-")[0]))
            if listed.sha256 not in [record.sha256 for record in records]:
                raise VugenError(
                    f"{path} was lost, and writing it again gave other bytes than dataset.json notes "
                    f"(changed pictures or libraries): delete {job.out} and prepare again"
                )
            for file in (index_path(path), path):
                os.replace(again.out / file.name, file)
        finally:
            shutil.rmtree(again.out, ignore_errors=True)
        lost += 1
    did = f"{lost} lost shards written again" if lost else "nothing to do"
    print(f"{job.out} already holds this {job.split} split: {did}", file=sys.stderr)
    if (job.out / ".progress").exists():  # of the repair, or of a run killed just before it cleared up
        _forget_progress(job.out, job.split)
    return manifest


# --- workers

_job: _Job  # of a worker process, with the two shared values below
_stop: Any
_done: Any


def _start_worker(job: _Job, stop: Any, done: Any) -> None:
    global _job, _stop, _done
    _job, _stop, _done = job, stop, done
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch, which is imported later: one core a worker
    end_with_parent()


def _write_shard_in_worker(shard: int) -> None:
    def tick() -> None:
        if _stop.value:
            raise _Stopped
        with _done.get_lock():
            _done.value += 1

    with suppress(_Stopped):
        _write_shard(_job, shard, tick)


def _write_shards(job: _Job, workers: int) -> None:
    """Write those of this process's shards that are not finished: every `world_size`-th of the plan."""
    mine = range(rank(), _shard_count(job), world_size())
    todo = [shard for shard in mine if _finished(job, shard) is None]
    items = {s: min(job.shard_size, len(job.order) - s * job.shard_size) for s in mine}
    workers = min(workers, len(todo))
    bar = progress_bar(
        total=sum(items.values()),
        initial=sum(items.values()) - sum(items[s] for s in todo),
        unit="img",
        desc=f"{job.out}: {job.split}",
        smoothing=0.05,
    )
    with bar:
        if workers > 1:
            _in_processes(job, todo, workers, bar)
        else:
            for shard in todo:
                _write_shard(job, shard, bar.update)


def _in_processes(job: _Job, todo: list[int], workers: int, bar: Any) -> None:
    # spawn: the caller may hold threads (torch, a progress bar), and those do not survive a fork.
    context = multiprocessing.get_context("spawn")
    stop, done = context.Value("b", 0), context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, stop, done))
    try:
        # Ctrl-C reaches the whole process group. Workers inherit this mask and hear of it through `stop`
        # instead.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            left = iter(todo)  # given out as they are taken: a hundred thousand tasks are slow to wait for
            waiting: set[Future[None]] = {
                pool.submit(_write_shard_in_worker, s) for s in islice(left, 2 * workers)
            }
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        shown = 0
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            for task in finished:
                task.result()  # raises what the worker raised
            waiting |= {pool.submit(_write_shard_in_worker, s) for s in islice(left, len(finished))}
            now = done.value
            bar.update(now - shown)
            shown = now
    except (BrokenProcessPool, MemoryError):
        raise VugenError(
            "a worker died, most likely for want of memory: run again with fewer --workers; finished shards "
            "are kept"
        ) from None
    finally:
        stop.value = 1  # after success nobody is left to read it
        pool.shutdown(wait=True, cancel_futures=True)


# --- one shard


def _write_shard(job: _Job, shard: int, tick: Any = lambda: None) -> list[ShardNote]:
    """Write a shard, or one for each shape, with notes, and return what these say.

    `tick()` is called for each item and may raise to leave all unwritten.
    """
    first, paths = shard * job.shard_size, _paths(job, shard)
    skipped: list[Skipped] = []
    captions = [Counted() for _ in paths]
    with ExitStack() as stack:
        files = [stack.enter_context(shard_file(path)) for path in paths]
        for position, item in enumerate(job.order.part(first, first + job.shard_size), start=first):
            tick()
            key = None
            try:
                sample = _sample(job.source, int(item))
                key = sample.key
                members, which = _members(sample, job)
            except (OSError, ValueError, RecursionError) as error:
                # A source that fails to read names the item in its message; without a key, say which it
                # was.
                key = key or getattr(error, "filename", None) or f"item {item}"
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                if job.strict:
                    raise VugenError(
                        f"{key}: {reason} (--strict; without it the picture is skipped)"
                    ) from error
                skipped.append(Skipped(key=encodable(str(key)), reason=encodable(reason)))
                continue
            for kind, data in members:
                add_member(files[which][0], f"{position:09d}.{kind}", data)
            captions[which].add(sample.captions, len(sample.sources))
    records = []
    for path, (_, facts), counted, shape in zip(paths, files, captions, job.shapes, strict=True):
        if not counted.images:
            path.unlink(missing_ok=True)
            index_path(path).unlink(missing_ok=True)
        named = shape_name(shape) if len(paths) > 1 else None
        records.append(ShardNote(**facts, samples=counted.images, captions=counted, shape=named))
    records[0].skipped = skipped
    for path, record in zip(paths, records, strict=True):
        write_json(_note_of(path), record.model_dump(exclude_none=True))
    return records


def _sample(source: Source, item: int) -> Sample:
    """An item of the source, asked for again where the system fails.

    Raises:
        OSError, ValueError: it cannot be read.
        VugenError: the system still fails.
    """
    for left in reversed(range(READ_TRIES)):
        try:
            return source[item]
        except OSError as error:
            if error.errno not in _PASSING and not (error.errno == errno.ENOENT and _is_gone(source.origin)):
                raise
            if not left:
                raise VugenError(
                    f"cannot read {error.filename or f'item {item}'} of {source.origin}: {error.strerror}; "
                    "mend that and run the same command again, which goes on"
                ) from error
        wait_again(READ_PAUSE, READ_TRIES - 1 - left)
    raise AssertionError("unreachable")


def _is_gone(origin: str) -> bool:
    """Whether what pictures are read from is no more there: unmounted, so that each would be skipped."""
    try:
        with os.scandir(origin) as entries:  # not a list: there may be millions, and many pictures missing
            return next(entries, None) is None
    except NotADirectoryError:
        return False
    except FileNotFoundError:  # or a set on the hub (hf:...), whose files were all there at the start
        return True


def _members(sample: Sample, job: _Job) -> tuple[list[tuple[str, bytes]], int]:
    """A sample's members in a shard: image, meta, captions, sources; and the number of its shape.

    The captions are cleaned in place.

    Raises:
        ValueError: the picture cannot be used, or no caption is left.
    """
    sample.captions = [line for line in (" ".join(caption.split()) for caption in sample.captions) if line]
    if not sample.captions:
        raise ValueError("no caption")
    pixels, lossless = _pixels(sample.image, job.size)
    height, width = pixels.shape[:2]
    which = nearest(job.shapes, (height, width))
    meta = {
        **sample.meta,
        "source_key": sample.key,
        "width": width,
        "height": height,
        "caption_count": len(sample.captions),
    }
    if job.labels and "label" in meta:
        meta["label"] = job.labels[meta["label"]]
    sources = _sources(sample, job.size, job.shapes[which])
    if sources:
        meta["source_count"] = len(sources)
    text = "\n".join(sample.captions) + "\n"
    members = [
        encode(adm_crop(pixels, job.shapes[which]), lossless),
        ("json", json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace")),
        ("txt", text.encode("utf-8", "replace")),
        *sources,
    ]
    return members, which


@contextmanager
def shard_file(path: Path) -> Iterator[tuple[tarfile.TarFile, dict[str, Any]]]:
    """Yields a tar to fill, which becomes a shard with its index beside it, whole or not at all; and what its
    record says of it: `name`, and once the tar is closed `bytes` and `sha256`.

    Raises:
        VugenError: the folder cannot be written or the disk is full.
    """
    facts: dict[str, Any] = {"name": path.name}
    with whole_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            yield tar, facts
        index = list_members(temporary)
        with open(temporary, "rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            facts["bytes"] = os.fstat(file.fileno()).st_size
    write_index(index_path(path), index)


def _sources(sample: Sample, size: int, shape: Shape) -> list[tuple[str, bytes]]:
    """The members `source0.png`, ... of an edit, cut to the shape of its picture.

    Raises:
        ValueError: one cannot be used, or an instruction places another number of them.
    """
    if len(sample.sources) > MOST_SOURCES:
        raise ValueError(f"{len(sample.sources)} source pictures, more than {MOST_SOURCES}")
    members = []
    for number, source in enumerate(sample.sources):
        try:
            pixels, lossless = _pixels(source, size)
        except ValueError as error:
            raise ValueError(f"source picture {number}: {error}") from error
        kind, data = encode(adm_crop(pixels, shape), lossless)
        members.append((f"source{number}.{kind}", data))
    for caption in sample.captions if members else []:
        if caption.count(PICTURE) not in (0, len(members)):
            raise ValueError(f"an instruction places {caption.count(PICTURE)} pictures of {len(members)}")
    return members


def _pixels(image: bytes | Image.Image, size: int) -> tuple[np.ndarray, bool]:
    """A picture decoded, and whether it is to be stored without loss."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB")), True
    return decode(image), size <= LOSSLESS_UP_TO and is_lossless(image)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # owner, group and time stay zero: the same bytes everywhere
    info.size, info.mode = len(data), 0o444
    tar.addfile(info, io.BytesIO(data))


def _all_skipped(source: Source, skipped: Iterable[Skipped]) -> str:
    reasons: Counter[str] = Counter()
    first = None
    for item in skipped:
        reasons[item.reason] += 1
        first = first or item.key
    common = max(reasons, key=lambda reason: reasons[reason])
    return (
        f"not one of {reasons.total()} pictures of {source.origin} can be used, most often for: {common} "
        f"(first: {first}); check that --source and --dataset belong together"
    )
