"""Precision and recall, density and coverage: does each image lie where the other set's images are?

A set's manifold is the union of balls around its images that reach to their k-th nearest neighbour.
Precision and recall: Kynkäänniemi et al. (2019), "Improved Precision and Recall Metric", k = 3. Density and
coverage: Naeem et al. (2020), "Reliable Fidelity and Diversity Metrics", k = 5.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vugen_cli.errors import TooFewImages, VugenError

PRECISION_K = 3
DENSITY_K = 5
BLOCK = 1024  # rows of the distance matrix that are held at once


@dataclass(frozen=True)
class Manifold:
    """What holds for each image; the metrics are the means.

    Attributes:
        precision: bool [n], the generated image lies in a ball of the real ones; None if not asked for.
        recall: bool [m], the real image lies in a ball of the generated ones.
        density: float [n], balls of real images that hold the generated one, over k.
        coverage: bool [m], the real image's ball holds a generated one.
    """

    precision: np.ndarray | None = None
    recall: np.ndarray | None = None
    density: np.ndarray | None = None
    coverage: np.ndarray | None = None


def compare_manifolds(
    generated: np.ndarray,
    real: np.ndarray,
    precision_k: int | None = PRECISION_K,
    density_k: int | None = DENSITY_K,
) -> Manifold:
    """Compare features [n, d] of generated and [m, d] of real images, in blocks: memory is O(n + m).

    As published, a distance equal to the radius is inside for precision and recall and outside for density
    and coverage.

    Args:
        generated, real: the features.
        precision_k: neighbours for precision and recall; None leaves them out.
        density_k: neighbours for density and coverage; None leaves them out.

    Raises:
        TooFewImages: a set has no more images than neighbours.
        VugenError: the dimensions differ.
    """
    ks = [k for k in (precision_k, density_k) if k is not None]
    for rows, what in ((generated, "generated"), (real, "real")):
        if len(rows) <= max(ks):
            raise TooFewImages(
                f"neighbourhoods of {max(ks)} need at least {max(ks) + 1} {what} images, got {len(rows)}."
            )
    if generated.shape[1] != real.shape[1]:
        raise VugenError(
            f"features of dimensions {generated.shape[1]} and {real.shape[1]} cannot be compared."
        )
    # Distances do not change with the origin, and float32 keeps more of them near it.
    centre = real.mean(axis=0, dtype=np.float64)
    g, r = (torch.from_numpy((rows - centre).astype(np.float32)) for rows in (generated, real))
    real_radii = _radii(r, ks)
    n, m = len(g), len(r)
    precision, recall = torch.zeros(n, dtype=torch.bool), torch.zeros(m, dtype=torch.bool)
    balls, coverage = torch.zeros(n, dtype=torch.long), torch.zeros(m, dtype=torch.bool)
    generated_radii = _radii(g, [precision_k]) if precision_k is not None else {}
    for start, squares in _squared_distances(r, g):
        block = slice(start, start + BLOCK)
        if precision_k is not None:
            precision |= (squares <= real_radii[precision_k][block, None]).any(dim=0)
            recall[block] = (squares <= generated_radii[precision_k]).any(dim=1)
        if density_k is not None:
            inside = squares < real_radii[density_k][block, None]
            balls += inside.sum(dim=0)
            coverage[block] = inside.any(dim=1)
    return Manifold(
        precision=precision.numpy() if precision_k is not None else None,
        recall=recall.numpy() if precision_k is not None else None,
        density=balls.double().numpy() / density_k if density_k is not None else None,
        coverage=coverage.numpy() if density_k is not None else None,
    )


def _radii(rows: torch.Tensor, ks: list[int]) -> dict[int, torch.Tensor]:
    """Squared distance of every row to its k-th nearest other row, by k."""
    radii = {k: torch.empty(len(rows)) for k in ks}
    for start, squares in _squared_distances(rows, rows):
        squares.diagonal(start).fill_(-1)  # itself comes first, whatever rounding says
        nearest = squares.topk(max(ks) + 1, dim=1, largest=False).values
        for k in ks:
            radii[k][start : start + BLOCK] = nearest[:, k]
    return radii


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of rows of the squared distances between a [n, d] and b [m, d], with where each starts."""
    b_norms = b.square().sum(dim=1)
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        scale = rows.square().sum(dim=1)[:, None] + b_norms
        squares = torch.addmm(scale, rows, b.T, alpha=-2)
        # What rounding cannot tell from equal is equal: copies of one image are at distance 0.
        yield start, squares.masked_fill_(squares < 1e-6 * scale, 0)
