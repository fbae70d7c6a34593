"""GenEval: are the objects of a prompt there, as many, of that colour, on that side?

Ghosh et al. (2023), "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", as its
`evaluate_images.py` and `summary_scores.py` decide and count.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, PositiveInt, ValidationError, model_validator

from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import read_jsonl
from vugen_cli.metrics.bootstrap import SEED, by_prompt, resampled_means
from vugen_cli.metrics.detectors import Detector, Found
from vugen_cli.metrics.encoders import Clip
from vugen_cli.metrics.prompted_images import Prompted, PromptedImages, score_of
from vugen_cli.metrics.report import Score

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
POSITIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEXTS = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
BACKGROUND = "#999"  # what lies around an object's mask when its colour is asked
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16  # of a class in an image
POSITION_THRESHOLD = 0.1

# COCO's classes have several spellings; GenEval has one and renames three.
SPELLINGS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
    "keyboard": "computer keyboard",
    "mouse": "computer mouse",
    "remote": "tv remote",
}


class Clause(BaseModel):
    """An object that a prompt asks for; `position` is its side of the object at that place of the list."""

    name: str = Field(alias="class")
    count: PositiveInt
    color: str | None = None
    position: tuple[str, int] | None = None


class Asked(BaseModel):
    """A line of `evaluation_metadata.jsonl`: what one prompt asks for."""

    tag: str
    prompt: str = Field(pattern=r"\S")
    include: list[Clause] = Field(min_length=1)
    exclude: list[Clause] = []

    @model_validator(mode="after")
    def _is_of_the_benchmark(self) -> "Asked":
        if self.tag not in TASKS:
            raise ValueError(f"tag {self.tag!r} is none of {', '.join(TASKS)}")
        for place, clause in enumerate([*self.include, *self.exclude]):
            if clause.color not in (None, *COLORS):
                raise ValueError(f"{clause.color!r} is none of its colors")
            side, other = clause.position or (POSITIONS[0], -1)
            if clause.position and (side not in POSITIONS or other not in range(place)):
                raise ValueError(
                    f"position {clause.position} is not a side and the place of an earlier object"
                )
        return self


Objects = dict[str, list[Found]]
Colors = Callable[[Sequence[Found], str], list[str]]


def read_geneval(path: Path) -> dict[str, Asked]:
    """What each prompt asks for, by prompt, of the published `evaluation_metadata.jsonl`.

    Raises:
        VugenError: the file cannot be read or a line is in another layout.
    """
    path = Path(path)
    if not path.is_file():
        raise VugenError(
            f"--geneval {path} is no file: give prompts/evaluation_metadata.jsonl of the GenEval repository."
        )
    asked = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            line = Asked.model_validate(row)
        except ValidationError as error:
            raise VugenError(
                f"{path} object {number} is not as GenEval's evaluation_metadata.jsonl has them: "
                f"{first_line(error)}."
            ) from error
        asked[" ".join(line.prompt.split())] = line
    if not asked:
        raise VugenError(f"{path} is empty: give GenEval's prompts/evaluation_metadata.jsonl.")
    return asked


def keep_objects(found: Sequence[Found], tag: str) -> Objects:
    """The objects that count, by class in GenEval's spelling, the surest first.

    Over 0.3 in confidence (0.9 when counting), at most sixteen of a class. Boxes that overlap all stay: the
    published script suppresses them only where told to.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept: Objects = {}
    for each in sorted(found, key=lambda each: -each.score):
        if each.score > threshold:
            kept.setdefault(SPELLINGS.get(each.label, each.label), []).append(each)
    return {name: several[:MAX_OBJECTS] for name, several in kept.items()}


def sides(one: Found, other: Found) -> set[str]:
    """On which sides of another an object lies, none if they are too near: "left of", "above", ...

    Of the offset of the boxes' centres counts what exceeds a tenth of both boxes' sizes; a side is one where
    that is more than half of the offset.
    """
    a, b = (np.array(each.box).reshape(2, 2) for each in (one, other))
    offset = a.mean(axis=0) - b.mean(axis=0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {side for side, true in holds.items() if true}


def failure(asked: Asked, objects: Objects, colors: Colors) -> str | None:
    """Why an image is not what its prompt asks for, or None if it is.

    As published: of each class only as many objects as are asked for are looked at, the surest; all of them
    must have the colour, and be on that side of all those they are to be beside; of what is excluded there
    must be fewer.

    Args:
        asked: a line of the metadata.
        objects: from `keep_objects`.
        colors: (objects, class) -> the colour of each.
    """
    reasons: list[str] = []
    groups: list[list[Found] | None] = []  # what was found for each clause, None if it fails
    for clause in asked.include:
        name, count = clause.name, clause.count
        found = objects.get(name, [])[:count]
        reason = None
        if len(found) < count:
            reason = f"expected {name}>={count}, found {len(found)}"
        elif clause.color and (seen := colors(found, name)).count(clause.color) < count:
            reason = f"expected {clause.color} {name}>={count}, found {', '.join(seen)}"
        elif clause.position:
            side, target = clause.position
            others = groups[target]
            if others is None:
                reason = f"no target for {name} to be {side}"
            elif missing := [sides(a, b) for a in found for b in others if side not in sides(a, b)]:
                where = " and ".join(sorted(missing[0])) or "no side of"
                reason = f"expected {name} {side} target, found {where} target"
        groups.append(found if reason is None else None)
        if reason:
            reasons.append(reason)
    for clause in asked.exclude:
        name, count = clause.name, clause.count
        if (n := len(objects.get(name, []))) >= count:
            reasons.append(f"expected {name}<{count}, found {n}")
    return "; ".join(reasons) or None


def color_namer(clip: Clip) -> Callable[[torch.Tensor, Sequence[Found], str], list[str]]:
    """CLIP's choice among ten colours for each object of an image, from its crop on a grey ground.

    Each colour is the normalised mean of three texts' embeddings, as CLIP's zero-shot classifier has it.

    Returns:
        (uint8 RGB [3, H, W], objects, class) -> a colour for each object.
    """
    classifiers: dict[str, torch.Tensor] = {}

    def name_colors(image: torch.Tensor, objects: Sequence[Found], name: str) -> list[str]:
        if name not in classifiers:
            texts = [text.format(color=color, name=name) for color in COLORS for text in COLOR_TEXTS]
            rows, _ = clip.encode_texts(texts)
            each = torch.nn.functional.normalize(rows.float(), dim=1).view(len(COLORS), len(COLOR_TEXTS), -1)
            classifiers[name] = torch.nn.functional.normalize(each.mean(dim=1), dim=1)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        crops = [_crop(picture, each) for each in objects]
        likeness = clip.encode_pictures(crops).float() @ classifiers[name].T
        return [COLORS[index] for index in likeness.argmax(dim=1).tolist()]

    return name_colors


def _crop(picture: Image.Image, found: Found) -> Image.Image:
    if found.mask is not None:
        ground = Image.new("RGB", picture.size, BACKGROUND)
        picture = Image.composite(picture, ground, Image.fromarray(found.mask))
    left, top, right, bottom = (round(side) for side in found.box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def check_geneval(asked: dict[str, Asked], pairs: PromptedImages, path: Path, detector: Detector) -> None:
    """Refuse images of other prompts, and a detector that does not know what the prompts ask for.

    Raises:
        VugenError: names the first image or class.
    """
    pairs.refuse_others(asked, path, str(path.with_name("generation_prompts.txt")))
    known = {SPELLINGS.get(label, label) for label in detector.labels}
    for prompt in pairs.prompts.values():
        for clause in (*asked[prompt].include, *asked[prompt].exclude):
            if clause.name not in known:
                raise VugenError(
                    f"--detector {detector.name} knows no {clause.name}, which {path} asks for: give one "
                    "that was trained on COCO."
                )


def geneval_scores(
    pairs: PromptedImages,
    asked: dict[str, Asked],
    detector: Detector,
    clip: Clip,
) -> list[Score]:
    """GenEval's overall score, the mean over its six tasks, and each task's: the share of correct images.

    Args:
        pairs: images whose prompts are the benchmark's; see `check_geneval`.
        asked: from `read_geneval`.
        detector: finds the objects.
        clip: names their colours.

    Returns:
        Scores, the overall one first; it has no value where a task has no images.

    Raises:
        VugenError: the set cannot be read.
    """
    name_colors = color_namer(clip)
    prompts: dict[str, list[str]] = {}
    correct: dict[str, list[float]] = {}
    failures: list[dict[str, str]] = []

    def find_fault(batch: list[Prompted]) -> list[str | None]:
        rows = [(asked[prompt], image) for _, prompt, image in batch]
        return [
            failure(row, keep_objects(detector.find(image), row.tag), partial(name_colors, image))
            for row, image in rows
        ]

    for name, prompt, reason in pairs.judged(find_fault, "GenEval"):
        row = asked[prompt]
        prompts.setdefault(row.tag, []).append(prompt)
        correct.setdefault(row.tag, []).append(float(reason is None))
        if reason:
            failures.append({"image": name, "tag": row.tag, "reason": reason})
    tasks, shares, resampled = [], [], []
    for place, task in enumerate(task for task in TASKS if task in correct):
        totals, counts = by_prompt(prompts[task], correct[task])
        shares.append(float(totals.sum() / counts.sum()))
        resampled.append(resampled_means(totals, counts, SEED + place))
        tasks.append(
            score_of(
                f"geneval_{task}",
                f"GenEval {task}",
                shares[-1],
                resampled[-1],
                parameters={"images": int(counts.sum()), "prompts": len(counts)},
            )
        )
    scored = sum(len(set(each)) for each in prompts.values())
    warnings = ["Published scores are by mmdet's Mask2Former Swin-S and CLIP ViT-L-14:openai."]
    if scored < len(asked):
        warnings.insert(0, f"Only {scored} of {len(asked)} prompts have images.")
    if missing := [task for task in TASKS if task not in correct]:
        warnings.insert(0, f"No overall score: no images of {', '.join(missing)}.")
    overall = score_of(
        "geneval",
        "GenEval",
        None if missing else float(np.mean(shares)),
        np.mean(resampled, axis=0),
        parameters={
            "detector": detector.name,
            "detector_type": detector.kind,
            "detector_fingerprint": detector.fingerprint,
            "clip": clip.name,
            "weights_fingerprint": clip.fingerprint,
            "resize": clip.resize,
            "threshold": THRESHOLD,
            "counting_threshold": COUNTING_THRESHOLD,
            "max_objects": MAX_OBJECTS,
            "position_threshold": POSITION_THRESHOLD,
            "color_texts": list(COLOR_TEXTS),
            "images": sum(map(len, correct.values())),
            "prompts": scored,
            "prompts_of_the_benchmark": len(asked),
        },
        warning=" ".join(warnings),
    )
    overall.failures = failures
    return [overall, *tasks]
