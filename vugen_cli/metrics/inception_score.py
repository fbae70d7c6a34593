"""The Inception Score: how sure the classifier is of each image, and how varied its answers are.

Salimans et al. (2016), "Improved Techniques for Training GANs", with the splits and the shuffle of
torch-fidelity.
"""

from dataclasses import dataclass

import numpy as np
import torch

from vugen_cli.errors import TooFewImages

SPLITS = 10
SEED = 2020
RESAMPLES = 200


@dataclass(frozen=True)
class InceptionScore:
    """The score over splits of the images.

    Attributes:
        mean, std: over the splits.
        standard_error: of the mean, by the bootstrap.
    """

    mean: float
    std: float
    standard_error: float


def inception_score(logits: np.ndarray, splits: int = SPLITS) -> InceptionScore:
    """exp(E KL(p(y|x) || p(y))) of logits [n, classes], the mean over `splits` parts of the shuffled images.

    The error is the spread of that mean over 200 resamplings of each part's images. Only the spread is
    used: the resampled scores themselves lie lower, as repeated images vary less.

    Raises:
        TooFewImages: fewer images than splits.
    """
    n = len(logits)
    if n < splits:
        raise TooFewImages(f"an Inception Score over {splits} splits needs as many images, got {n}.")
    order = np.random.RandomState(SEED).permutation(n)
    rng = np.random.default_rng(SEED)
    scores, resampled = [], np.zeros(RESAMPLES)
    for i in range(splits):
        part = torch.from_numpy(logits[order[i * n // splits : (i + 1) * n // splits]]).double()
        p, log_p = part.softmax(dim=1), part.log_softmax(dim=1)
        marginal = p.mean(dim=0, keepdim=True)
        kl = torch.where(p > 0, p * (log_p - marginal.log()), 0.0).sum(dim=1)
        scores.append(kl.mean().exp().item())
        # E KL(p || q) = E Σ p log p - Σ q log q: one product for all the marginals q of the resamplings.
        weights = torch.from_numpy(rng.multinomial(len(p), np.full(len(p), 1 / len(p)), RESAMPLES) / len(p))
        q = weights @ p
        entropies = weights @ torch.special.xlogy(p, p).sum(dim=1)
        resampled += (entropies - torch.special.xlogy(q, q).sum(dim=1)).exp().numpy() / splits
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), float(resampled.std()))
