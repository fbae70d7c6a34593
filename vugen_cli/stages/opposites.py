"""Captions and their opposites, left for right: what a sampler must tell apart, and hardly learns by itself.

Who stands on the left takes three things together: the word, the order of the nouns, and the place in the
picture. None of them says anything alone, so the flow's loss has no slope to begin on, and a sampler draws
either side for as long as its VLM does not bind them in its text. The difference between a caption and its
opposite, at the same noise, has one: all that both captions share cancels. Contrastive flow matching
(arXiv 2506.05350) takes any other sample's velocity as the negative; here it is the nearest miss.
"""

import re

import torch
from torch import Tensor

OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}
EARLY = 0.35  # places are given out before this time; later the noised latents show them, whatever is said
MARGIN = 0.2  # of the error: a sampler that knows its sides errs by a quarter more with the opposite

# "The left", since "right next to" and "what is left" say no side.
_WORDS = re.compile(r"(?<=\bthe )(?:left|right)\b|\b(?:above|below)\b", re.IGNORECASE)


def opposite(caption: str) -> str | None:
    """The caption with every side exchanged for its opposite; None if it names none, or both of two.

    What has something on the left and on the right of it is the same when they are exchanged.
    """
    sides = {word.lower() for word in _WORDS.findall(caption)}
    if not sides or any(OPPOSITES[side] in sides for side in sides):
        return None
    return _WORDS.sub(lambda found: OPPOSITES[found[0].lower()], caption)


def contrast(told: Tensor, opposed: Tensor, target: Tensor) -> Tensor:
    """By how much of `MARGIN` each velocity does not fit better than that of the opposite caption; [K].

    Args:
        told: velocity for K captions, [K, h, w, c].
        opposed: for their opposites, at the same points and times.
        target: the true velocity.
    """
    error, other = ((v.float() - target).square().flatten(1).mean(1) for v in (told, opposed))
    return (MARGIN - (other - error) / error.detach()).clamp_min(0)


def early(t: Tensor) -> list[int]:
    """Which of the times [B] are early enough for captions and their opposites to differ."""
    return torch.nonzero(t < EARLY).flatten().tolist()
