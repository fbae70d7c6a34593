"""`dataset.json`: what a prepared data set holds, written by the writer and read by everything else."""

import json
from pathlib import Path
from typing import Any

from vugen_cli.data.remote import is_remote, opened
from vugen_cli.data.sample import Source
from vugen_cli.errors import VugenError
from vugen_cli.version import __version__


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The `dataset.json` of a prepared data set.

    Raises:
        VugenError: the directory or its manifest is missing or damaged.
    """
    if is_remote(path):
        with opened(str(path), "dataset.json") as stream:
            text = stream.read()
        try:
            manifest: dict[str, Any] = json.loads(text)
            manifest["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise VugenError(f"dataset.json of {path} is damaged ({error})") from error
        return manifest
    directory = Path(path)
    file = directory / "dataset.json"
    if not directory.exists():
        raise VugenError(f"no data set at {directory}: make one with `vugen prepare --out {directory}`")
    if not file.is_file():
        raise VugenError(
            f"{directory} has no dataset.json: prepare it first, for example "
            f"`vugen prepare --dataset webdataset --source {directory} --out data/mine`"
        )
    try:
        manifest = json.loads(file.read_text())
        manifest["splits"]
    except (ValueError, KeyError) as error:
        raise VugenError(f"{file} is damaged ({error}): run `vugen prepare` again") from error
    return manifest


def dataset_card(path: str | Path) -> dict[str, Any]:
    """What checkpoints remember of a data set: where it is and what it holds."""
    manifest = read_manifest(path)
    if "latents" in manifest:  # a cache leads back to its images
        card: dict[str, Any] = manifest["data"]
        return card
    return {
        "path": str(path),
        "dataset": manifest["dataset"],
        "size": manifest["size"],
        "licence": manifest.get("licence"),
        "counts": {split: facts["count"] for split, facts in manifest["splits"].items()},
    }


FORMAT = 1


Record = dict[str, Any]


def read_written(out: Path) -> dict[str, Any]:
    """The manifest of an earlier run, or an empty one."""
    path = out / "dataset.json"
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise VugenError(
                f"{path} has format {manifest['format']}, this version writes {FORMAT}: choose another --out"
            )
        for entry in manifest["splits"].values():
            entry["shards"], entry["listing"], entry["skipped"]
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VugenError(
            f"{path} is no manifest of vugen prepare ({error!r}): choose another --out"
        ) from error


def add_split(
    manifest: dict[str, Any], source: Source, split: str, plan: dict[str, Any], records: list[Record]
) -> dict[str, Any]:
    """The manifest with a split added to those it has."""
    totals = dict.fromkeys(("images", "captions", "words", "words_max", "characters_max"), 0)
    for record in records:
        for key, value in record["captions"].items():
            totals[key] = max(totals[key], value) if key.endswith("_max") else totals[key] + value
    skipped = [item for record in records for item in record["skipped"]]
    entry = {
        "count": totals["images"],
        "items": plan["items"],
        "seed": plan["seed"],
        "shard_size": plan["shard_size"],
        "listing": plan["listing"],
        "source": source.origin,
        "shards": [
            {k: r[k] for k in ("name", "samples", "bytes", "sha256")} for r in records if r["samples"]
        ],
        "skipped_count": len(skipped),
        "skipped": skipped,
        "captions": {
            "count": totals["captions"],
            "per_image": round(totals["captions"] / max(totals["images"], 1), 3),
            "words_mean": round(totals["words"] / max(totals["captions"], 1), 3),
            "words_max": totals["words_max"],
            "characters_max": totals["characters_max"],
        },
    }
    splits = dict(sorted({**manifest.get("splits", {}), split: entry}.items()))
    known = manifest.get("classes", [])
    # Labels index this list: it stays as the source gives it, ImageNet's two cranes included, or grows.
    new = [name for name in source.classes if name not in known] if known else source.classes
    return {
        "format": FORMAT,
        "dataset": source.name,
        "size": plan["size"],
        "splits": splits,
        "classes": [*known, *new],
        "source": next(iter(splits.values()))["source"],
        "licence": source.licence,
        "tool": this_tool(),
    }


def this_tool() -> str:
    return f"vugen-cli {__version__}"
