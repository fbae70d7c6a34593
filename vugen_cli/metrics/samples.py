"""What `vugen sample` left behind: its listing, the newest pictures, and what to compare them with."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, ValidationError

from vugen_cli.checkpoint import read_card
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import read_jsonl
from vugen_cli.processes import broadcast

if TYPE_CHECKING:
    from vugen_cli.metrics.image_sets import ImageSet


UNFINISHED = ".drawing"  # until a drawing has finished; the listing of the one before, if there was one


class DrawnImage(BaseModel):
    """A line of `samples.jsonl`: one picture. Other tools' lines may know less, or more."""

    file: str = Field(description="name of the picture, within the folder")
    prompt: str | None = Field(None, description="what was asked for")
    index: int | None = Field(None, description="which of the prompt's pictures")
    seed: int | None = Field(None, description="from which, with prompt and index, the noise is drawn")
    steps: int | None = Field(None, description="of the solver")
    guidance: float | None = Field(None, description="how far the prompt is overstressed; 1: not at all")
    sources: list[str] = Field(
        [], description="the prompt's pictures, as the VLM saw them, within the folder"
    )
    image_guidance: float | None = Field(None, description="as `guidance`, by these pictures")
    solver: str | None = Field(None, description="`euler`, `heun` or `midpoint`")
    guidance_interval: tuple[float, float] | None = Field(None, description="between which times")
    precision: str | None = Field(None, description="of drawing, as the recipe's `sampling.precision`")
    sampler: str | None = Field(None, description="the checkpoint")
    step: int | None = Field(None, description="how long that was trained")
    card: str | None = Field(None, description="the first 12 digits of the SHA-256 of that one's card")
    size: str | None = Field(None, description="of the picture, WIDTHxHEIGHT, if not the sampler's own")
    decoder: str | None = Field(None, description="the file whose decoder drew, if not the sampler's own")
    adapters: list[str] | None = Field(None, description="added to it, as `file` or `file:weight`")
    vlm: str | None = Field(None, description="the VLM that it drew with")
    dataset: str | None = Field(None, description="name of the data it was trained on")
    reference: str | None = Field(None, description="where those are: what to compare with")
    study: bool = Field(False, description="for a study or a comparison: not the last samples")

    @property
    def asked(self) -> tuple[str, ...]:
        """What it was drawn for: the prompt's text, and the names of its pictures, which are hashes."""
        return (self.prompt or "", *self.sources)


def read_samples(folder: Path) -> list[DrawnImage]:
    """The lines of a folder's `samples.jsonl`. What else the folder holds (a grid) is no sample.

    Raises:
        VugenError: the listing cannot be read, a line is not as `vugen sample` writes it, or it names a file
            outside the folder.
    """
    listing = folder / "samples.jsonl"
    samples = []
    for number, row in enumerate(read_jsonl(listing), start=1):
        try:
            sample = DrawnImage.model_validate(row)
        except ValidationError as error:
            raise VugenError(
                f"{listing} line {number} is not as `vugen sample` writes it: {first_line(error)}."
            ) from error
        for name in (sample.file, *sample.sources):
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise VugenError(f"{listing} line {number} names '{name}', which is outside its folder.")
        samples.append(sample)
    return samples


def pick_images(given: Path | None) -> Path:
    """The given images, or the last samples here, which is said.

    Raises:
        VugenError: there are none.
    """
    if given is not None:
        return given
    path = newest_samples(Path.cwd())
    print(f"images: {path}, the last samples here")
    return path


def newest_samples(directory: Path) -> Path:
    """The folder, at most two below `directory`, whose `samples.jsonl` was written last; of no study.

    Raises:
        VugenError: there is none.
    """
    depths = ("samples.jsonl", "*/samples.jsonl", "*/*/samples.jsonl")
    listings = [path for pattern in depths for path in directory.glob(pattern) if path.is_file()]
    for path in sorted(listings, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if not next(iter(read_jsonl(path)), {}).get("study"):
            return path.parent
    raise VugenError(f"no samples under {directory}: draw some with `vugen sample`, or give --images.")


def recorded_vlm(images: "ImageSet") -> str:
    """The VLM of the sampler that drew these images, as their listing names it; `nano` if nothing does."""
    return next((sample.vlm for sample in images.samples[:1] if sample.vlm), "nano")


def recorded_reference(images: "ImageSet", draw_missing: Callable[[Path], None]) -> Path:
    """The data set that the sampler of these images was trained on, drawn first if it is the embedded one.

    Their listing names it ("reference"), or names the sampler whose card does ("sampler").

    Args:
        images: what `vugen sample` wrote.
        draw_missing: draws the embedded data set anew, into a folder.

    Raises:
        VugenError: the samples do not say, or the data set they name is not on disk and cannot be drawn.
    """
    if not images.samples:
        raise VugenError(f"{images.path} does not say what it should be compared with: give --reference.")
    sample = images.samples[0]
    recorded = sample.reference or _reference_of(sample.sampler)
    if recorded is None:
        raise VugenError(f"{images.path / 'samples.jsonl'} names no reference data set: give --reference.")
    # A relative path was relative to where `vugen sample` ran, which is most often here or above the samples.
    candidates = [Path(recorded), images.path / recorded, images.path.parent / recorded]
    # One answer for all processes of a job: they draw what is missing together.
    found = broadcast(next((candidate for candidate in candidates if candidate.exists()), None))
    if found is not None:
        return found
    if "openmoji" not in (sample.dataset or "").split(" + "):
        raise VugenError(
            f"the samples' data set {recorded} is not on disk: prepare it again, or give --reference."
        )
    draw_missing(Path(recorded))
    return Path(recorded)


def _reference_of(sampler: str | None) -> str | None:
    """What the card of a sampler says that it was trained on, where the sampler is on disk."""
    if not sampler or not Path(sampler).is_file():
        return None
    return read_card(sampler).data.path
