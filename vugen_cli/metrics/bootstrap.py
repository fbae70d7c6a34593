"""How far a mean would move with other draws from the same sources: the bootstrap, over images or prompts."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
SEED = 2020


def interval(means: np.ndarray) -> tuple[float, float]:
    """95% percentile interval of the means of some resamplings, from `resampled_means`."""
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def by_prompt(prompts: list[str], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt, in order of coming, the sum of its values, float [P], and their number, int [P]."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    index = np.array([place[prompt] for prompt in prompts])
    return np.bincount(index, values), np.bincount(index)


def resampled_means(totals: np.ndarray, counts: np.ndarray | None = None, seed: int = SEED) -> np.ndarray:
    """The mean of all values in each of 1000 resamplings of the images or prompts [R].

    Images of one prompt are no independent draws, so prompts are drawn, each with all its images. What else a
    value hangs on (the other set, the balls around its images) stays as it was given.

    Args:
        totals, counts: of each prompt [P], the sum and the number of its values; None: one value each.
        seed: of the resamplings.
    """
    counts = np.ones(len(totals)) if counts is None else counts
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for r in range(RESAMPLES):
        drawn = rng.integers(len(totals), size=len(totals))
        means[r] = totals[drawn].sum() / counts[drawn].sum()
    return means
