"""Diversity of the pictures of one prompt (the paper's Figure 5): do seeds differ, or repeat themselves?"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vugen_cli.errors import VugenError
from vugen_cli.metrics.bootstrap import resampled_means
from vugen_cli.metrics.features import Extractor, extract
from vugen_cli.metrics.prompted_images import PromptedImages, score_of
from vugen_cli.metrics.report import Report, versions
from vugen_cli.pictures import save_grid
from vugen_cli.processes import is_first

SHOWN = 64  # pictures of one prompt in the grid


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
    positive = eigenvalues[eigenvalues > 0]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def score_diversity(
    images: PromptedImages,
    extractor: Extractor,
    *,
    reference: PromptedImages | None = None,
    batch_size: int | None = None,
    cache: Path | None = None,
    picture: Path | None = None,
    progress: bool = True,
) -> Report:
    """Mean over prompts of the pairwise distance and the Vendi score of each prompt's images.

    Args:
        images: a set with prompts, several images to a prompt.
        extractor: the features that are compared.
        reference: real images with captions; those with a caption in common are scored in the same way.
        batch_size: images a forward pass.
        cache: folder of cached features (`features.cache_folder`), None for none.
        picture: a PNG to write, of the prompt with the most images.
        progress: show a bar on standard error.

    Returns:
        A report; an empty one on all but the first process of a job.

    Raises:
        VugenError: no prompt has two images.
    """
    found = _by_prompt(images, extractor, batch_size, cache, progress)
    real = _by_prompt(reference, extractor, batch_size, cache, progress) if reference else {}
    if not is_first():
        return Report()
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
        values, of_real = (_of_each(groups, measure) for groups in (found, real))
        beside = f" (real: {of_real.mean():.3f})" if len(of_real) else ""
        scores.append(
            score_of(
                f"{metric}_{extractor.name}",
                f"{name} of one prompt's images, {extractor.name} features{beside}",
                float(values.mean()),
                resampled_means(values, np.ones(len(values))),
                parameters={
                    "features": extractor.label,
                    **extractor.identity,
                    "resize": extractor.resize,
                    "prompts": len(found),
                    "images_of_a_prompt": sizes,
                    "real": float(of_real.mean()) if len(of_real) else None,
                    "real_captions": len(real),
                },
                warning="prompts have different numbers of images, on which a Vendi score depends."
                if metric == "vendi" and len(sizes) > 1
                else None,
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
    progress: bool,
) -> dict[str, tuple[list[str], np.ndarray]]:
    """The names and the unit features, float64 [n, d], of the images of each prompt that has at least two."""
    found, _ = extract(
        images.images,
        extractor,
        ["features"],
        batch_size=batch_size,
        cache=cache,
        role="diversity",
        progress=progress,
    )
    if not is_first():
        return {}
    features = found["features"].astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    groups: dict[str, list[int]] = {}
    names = images.images.good_names()
    for i, name in enumerate(names):
        groups.setdefault(images.prompts[name], []).append(i)
    return {
        prompt: ([names[i] for i in rows], features[rows]) for prompt, rows in groups.items() if len(rows) > 1
    }


def _of_each(
    groups: dict[str, tuple[list[str], np.ndarray]], measure: Callable[[np.ndarray], float]
) -> np.ndarray:
    return np.array([measure(features @ features.T) for _, features in groups.values()])
