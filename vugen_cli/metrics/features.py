"""Features of an image set: what an extractor is, one pass over a set, and a cache of what came out.

The cache is keyed by content: the names and bytes of the images, and the extractor with the hash of its
weights. A set that was seen before is read from disk, wherever it lies now.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from vugen_cli.engine.precision import rounding
from vugen_cli.errors import VugenError
from vugen_cli.files import user_cache, whole_file
from vugen_cli.metrics.image_sets import ImageSet, image_batches
from vugen_cli.metrics.report import SetRecord
from vugen_cli.processes import broadcast, gather, is_first, world_size
from vugen_cli.progress import progress_bar

CACHE_FORMAT = 2


@dataclass(frozen=True)
class Extractor:
    """Turns images into features, and says what it is.

    Attributes:
        name: "inception", "vlm", "clip" or "dinov2"; only Inception's metrics bear their usual names.
        label: the features in words, kept in statistics files: only equal labels may be compared.
        resize: how an image reaches the network's input size.
        identity: hash of the weights, under the name that a score records it by.
        features: uint8 [B, 3, H, W] on the CPU -> named float [B, d] on any device: "features" of every
            extractor, and of Inception "logits" (for the Inception Score) and "spatial" (for sFID).
        warning: what a reader of the score must know about this extractor, or None.
        batch_size: images a forward pass, unless the user says.
    """

    name: str
    label: str
    resize: str
    identity: dict[str, str]
    features: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    warning: str | None = None
    batch_size: int = 64


def extract(
    images: ImageSet,
    extractor: Extractor,
    wanted: Collection[str],
    *,
    batch_size: int | None = None,
    cache: Path | None = None,
    role: str = "images",
) -> tuple[dict[str, np.ndarray], SetRecord]:
    """The features of every good image of a set, in the set's order.

    Args:
        images: the set; it is read once, and once more to find it in the cache if there is one.
        extractor: what looks at them.
        wanted: which of the extractor's features to keep: "features", "logits", "spatial".
        batch_size: images a forward pass; the features depend on it only through the network's rounding.
        cache: folder of cached features, None to read and leave none.
        role: what the set is, for the progress bar.

    Returns:
        The features [n, d] by name, and the set's record: `ImageSet.describe` and whether it was "cached".
        In a job of several processes they share the work, and the first has it all.

    Raises:
        VugenError: the set cannot be read or features are not finite.
    """
    files: dict[str, Path] = {}
    found: dict[str, np.ndarray] = {}
    if cache is not None and is_first():
        digest = images.digest()
        files = {name: cache / f"{_key(digest, extractor, name)}.safetensors" for name in wanted}
        for name, file in files.items():
            if (entry := _read_cached(file, name)) is not None:
                found[name], images.left_out = entry
                images.count = len(found[name])
    missing = broadcast([name for name in wanted if name not in found])
    if missing:
        found |= _extract(images, extractor, missing, batch_size or extractor.batch_size, role)
        if not images.unsure:
            for name in files.keys() & missing:
                _write_cached(files[name], name, found[name], images)
    else:  # only the first has read the cache
        images.count, images.left_out = broadcast((images.count, images.left_out))
    return found, images.describe().model_copy(update={"cached": not missing})


def _extract(
    images: ImageSet,
    extractor: Extractor,
    wanted: list[str],
    batch_size: int,
    role: str,
) -> dict[str, np.ndarray]:
    indices: list[int] = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    bar = progress_bar(total=images.total, desc=role, unit="img")
    with bar, torch.inference_mode(), full_float32():
        for of_batch, batch in image_batches(images, batch_size):
            outputs = extractor.features(torch.from_numpy(batch))
            indices += of_batch
            for name in wanted:
                parts[name].append(_rows(outputs[name]))
            bar.update(len(batch) * world_size())
    images.merge()
    order = np.argsort(np.concatenate(gather(np.array(indices, dtype=np.int64))))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    result = {}
    for name in wanted:
        rows = [part for of_process in gather(parts.pop(name)) for part in of_process]
        first = rows[0] if rows else np.empty((0, 0), np.float32)
        result[name] = np.empty((len(place), first.shape[1]), first.dtype)
        begin = 0
        while rows:  # let go of one by one: together they are as large as the result
            part = rows.pop(0)
            result[name][place[begin : begin + len(part)]] = part
            begin += len(part)
    return result


def _rows(features: torch.Tensor) -> np.ndarray:
    if features.dtype != torch.float64:
        features = features.float()  # bfloat16 has no numpy dtype
    rows = features.detach().cpu().numpy()
    if not np.isfinite(rows).all():
        raise VugenError("the extractor returned features that are not finite: its weights may be damaged.")
    return rows


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32, not even in convolutions, whose default it is: ten bits show in a FID's third digit."""
    with (
        rounding("float32", "cuda"),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


def cache_folder() -> Path:
    """Where features are cached: $VUGEN_CACHE, or `vugen` in the platform's folder for users' caches."""
    return user_cache() / "features"


def _key(digest: str, extractor: Extractor, name: str) -> str:
    parts = [CACHE_FORMAT, digest, extractor.label, extractor.resize, extractor.identity, name]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read_cached(file: Path, name: str) -> tuple[np.ndarray, dict[int, str]] | None:
    """The features in a cache file, and which images were left out; None where it is not what was written."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as stored:
            record = json.loads(stored.metadata()["vugen"])
            rows = stored.get_tensor(name)
        if hashlib.sha256(np.ascontiguousarray(rows).data).hexdigest() != record["sha256"]:
            raise ValueError("its hash is wrong")
        return rows, {int(index): why for index, why in record["left_out"].items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        tqdm.write(f"cached features {file} are damaged ({error}): extracting again", file=sys.stderr)
        return None


def _write_cached(file: Path, name: str, rows: np.ndarray, images: ImageSet) -> None:
    """Keep features for the next time; a cache that cannot be written costs a line, not the score."""
    digest = hashlib.sha256(rows.data).hexdigest()
    record = {"left_out": images.left_out, "sha256": digest, "path": str(images.path)}
    try:
        with whole_file(file) as temporary:
            save_file({name: rows}, temporary, {"vugen": json.dumps(record)})
    except (VugenError, OSError, SafetensorError) as error:
        tqdm.write(f"features are not cached: {error}", file=sys.stderr)
