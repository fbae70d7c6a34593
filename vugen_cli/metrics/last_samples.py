"""What `vugen sample` left behind: the newest pictures, and what they should be compared with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vugen_cli.errors import VugenError
from vugen_cli.processes import from_first


def newest_samples(directory: Path) -> Path:
    """The folder, at most two below `directory`, whose `samples.jsonl` was written last.

    Raises:
        VugenError: there is none.
    """
    depths = ("samples.jsonl", "*/samples.jsonl", "*/*/samples.jsonl")
    listings = [path for pattern in depths for path in directory.glob(pattern) if path.is_file()]
    if not listings:
        raise VugenError(f"no samples under {directory}: draw some with `vugen sample`, or give --images.")
    return max(listings, key=lambda path: path.stat().st_mtime_ns).parent


def recorded_vlm(images: Path) -> str:
    """The VLM of the sampler that drew these images, as `samples.jsonl` names it; `nano` if nothing does."""
    from vugen_cli.metrics.image_sets import read_jsonl

    listing = images / "samples.jsonl"
    row = next(read_jsonl(listing), {}) if listing.is_file() else {}
    return str(row.get("vlm") or "nano")


def recorded_reference(images: Path, draw_missing: Callable[[Path, Path], None]) -> Path:
    """The data set that the sampler of these samples was trained on, drawn first if it is the embedded one.

    `samples.jsonl` names it ("reference"), or names the sampler whose card does ("sampler").

    Args:
        images: a folder that `vugen sample` wrote.
        draw_missing: (where, images) -> None: draws the embedded data set anew.

    Raises:
        VugenError: the samples do not say, or the data set they name is not on disk and cannot be drawn.
    """
    from vugen_cli.metrics.image_sets import read_jsonl

    listing = images / "samples.jsonl"
    if not listing.is_file():
        raise VugenError(f"{images} does not say what it should be compared with: give --reference.")
    row = next(read_jsonl(listing), {})
    recorded = row.get("reference") or _reference_of_sampler(row.get("sampler"))
    if not isinstance(recorded, str):
        raise VugenError(f"{listing} names no reference data set: give --reference.")
    # A relative path was relative to where `vugen sample` ran, which is most often here or above the samples.
    candidates = [Path(recorded), images / recorded, images.parent / recorded]
    # One answer for all processes of a job: they draw what is missing together.
    found = from_first(next((candidate for candidate in candidates if candidate.exists()), None))
    if found is not None:
        return found
    if row.get("dataset") != "openmoji":
        raise VugenError(
            f"the samples' data set {recorded} is not on disk: prepare it again, or give --reference."
        )
    draw_missing(Path(recorded), images)
    return Path(recorded)


def _reference_of_sampler(sampler: Any) -> Any:
    if not isinstance(sampler, str) or not Path(sampler).is_file():
        return None
    from vugen_cli.checkpoint import read_card

    data = read_card(Path(sampler)).get("data")
    return data.get("path") if isinstance(data, dict) else None
