"""Diversity of the pictures of one prompt (the paper's Figure 5): do seeds differ, or repeat themselves?"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.special import entr

from vugen_cli.errors import VugenError
from vugen_cli.metrics.bootstrap import resampled_means
from vugen_cli.metrics.features import Extractor, extract
from vugen_cli.metrics.prompted_images import PromptedImages, score_of
from vugen_cli.metrics.report import Report, versions
from vugen_cli.pictures import save_grid
from vugen_cli.processes import is_first

SHOWN = 64  # pictures of one prompt in the grid
NOT_CENTRED = "none"
Groups = dict[tuple[str, ...], tuple[list[str], np.ndarray]]  # by prompt, its images' names and features


def pairwise_distance(similarities: np.ndarray) -> float:
    """Mean of 1 - cosine over all pairs of different images, from their similarities [n, n]; 0: all alike."""
    count = len(similarities)
    return float(1 - (similarities.sum() - np.trace(similarities)) / (count * (count - 1)))


def vendi_score(similarities: np.ndarray) -> float:
    """The number of images that really differ, from 1 to n: exp of the entropy of the eigenvalues of K / n.

    Friedman & Dieng (2023), "The Vendi Score", with the cosine as similarity.

    Args:
        similarities: K [n, n], ones on its diagonal.
    """
    eigenvalues = np.linalg.eigvalsh(similarities / len(similarities)).clip(0)
    return float(np.exp(entr(eigenvalues).sum()))


def score_diversity(
    images: PromptedImages,
    extractor: Extractor,
    *,
    reference: PromptedImages | None = None,
    batch_size: int | None = None,
    cache: Path | None = None,
    picture: Path | None = None,
) -> Report:
    """Mean over prompts of the pairwise distance and the Vendi score of each prompt's images.

    Features are centred first: most of a feature is common to all images whatsoever, and a cosine between
    such is near 1 whether images differ or not. What is taken off is the reference's mean, or without one the
    mean over the set's own prompts.

    Args:
        images: a set with prompts, several images to a prompt.
        extractor: the features that are compared.
        reference: real images with captions, whose mean is the centre; those with a caption in common are
            scored in the same way.
        batch_size: images a forward pass.
        cache: folder of cached features (`features.cache_folder`), None for none.
        picture: a PNG to write, of the prompt with the most images.

    Returns:
        A report; an empty one on all but the first process of a job.

    Raises:
        VugenError: no prompt has two images.
    """
    found = _by_prompt(images, extractor, batch_size, cache)
    real = _by_prompt(reference, extractor, batch_size, cache) if reference else {}
    if not is_first():
        return Report()
    centre, named = _centre(found, real)
    found, real = (
        {prompt: group for prompt, group in groups.items() if len(group[0]) > 1} for groups in (found, real)
    )
    if not found:
        raise VugenError(
            f"no prompt of {images.images.path} has two images: draw several with `vugen sample -n 16`"
        )
    if picture:
        names, _ = max(found.values(), key=lambda group: len(group[0]))
        save_grid(torch.from_numpy(images.images.pictures(names[:SHOWN])), picture)
    sizes = sorted({len(features) for _, features in found.values()})
    scores = []
    for metric, name, measure in (
        ("pairwise_distance", "pairwise distance", pairwise_distance),
        ("vendi", "Vendi score", vendi_score),
    ):
        values, of_real = (_of_each(groups, centre, measure) for groups in (found, real))
        beside = f" (real: {of_real.mean():.3f})" if len(of_real) else ""
        scores.append(
            score_of(
                f"{metric}_{extractor.name}",
                f"{name} of one prompt's images, {extractor.name} features{beside}",
                float(values.mean()),
                resampled_means(values),
                parameters={
                    "features": extractor.label,
                    **extractor.identity,
                    "resize": extractor.resize,
                    "centre": named,
                    "prompts": len(found),
                    "images_of_a_prompt": sizes,
                    "real": float(of_real.mean()) if len(of_real) else None,
                    "real_captions": len(real),
                },
                warning=_warning(metric, sizes, named),
            )
        )
    return Report(
        scores=scores,
        images=images.images.describe(),
        reference=None,
        versions=versions(),
        warning=extractor.warning,
    )


def _by_prompt(
    images: PromptedImages,
    extractor: Extractor,
    batch_size: int | None,
    cache: Path | None,
) -> Groups:
    """The names and the features, float64 [n, d], of the images of each prompt."""
    found, _ = extract(
        images.images,
        extractor,
        ["features"],
        batch_size=batch_size,
        cache=cache,
        role="diversity",
    )
    if not is_first():
        return {}
    features = found["features"].astype(np.float64)
    groups: dict[tuple[str, ...], list[int]] = {}
    names, drawn = images.images.good_names(), {s.file: s.asked for s in images.images.samples}
    for i, name in enumerate(names):  # one text with other pictures is another prompt
        groups.setdefault(drawn.get(name, (images.prompts[name],)), []).append(i)
    return {prompt: ([names[i] for i in rows], features[rows]) for prompt, rows in groups.items()}


def _centre(found: Groups, real: Groups) -> tuple[np.ndarray | float, str]:
    """What is common to all images [d], and whose mean it is."""
    if real:
        return np.concatenate([rows for _, rows in real.values()]).mean(axis=0), "mean of the reference"
    if len(found) > 1:  # each prompt counts alike, however many images it has
        return np.mean([rows.mean(axis=0) for _, rows in found.values()], axis=0), "mean over the prompts"
    return 0.0, NOT_CENTRED


def _warning(metric: str, sizes: list[int], centre: str) -> str | None:
    if centre == NOT_CENTRED:
        return "one prompt's own mean is no centre, so what all images share counts: give --reference."
    if metric == "vendi" and len(sizes) > 1:
        return "prompts have different numbers of images, on which a Vendi score depends."
    return None


def _of_each(
    groups: Groups, centre: np.ndarray | float, measure: Callable[[np.ndarray], float]
) -> np.ndarray:
    """A measure of the cosines of each prompt's images, about the centre."""
    values = []
    for _, rows in groups.values():
        unit = rows - centre
        length = np.linalg.norm(unit, axis=1, keepdims=True)
        unit /= length.clip(1e-12)
        similarities = unit @ unit.T
        # What lies at the centre, to float32's rounding, has no direction: such images are all alike.
        still = (length < 1e-5 * np.linalg.norm(rows, axis=1, keepdims=True))[:, 0]
        similarities[still] = similarities[:, still] = 0
        similarities[np.ix_(still, still)] = 1
        values.append(measure(similarities))
    return np.array(values)
