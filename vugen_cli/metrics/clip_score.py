"""CLIPScore: how near an image's CLIP embedding is to its prompt's.

Hessel et al. (2021), "CLIPScore: A Reference-free Evaluation Metric for Image Captioning".
"""

import numpy as np
import torch
from PIL import Image

from vugen_cli.metrics.bootstrap import by_prompt, resampled_means
from vugen_cli.metrics.encoders import Clip
from vugen_cli.metrics.prompted_images import Prompted, PromptedImages, score_of
from vugen_cli.metrics.report import Score

WEIGHT = 2.5
PREFIX = "A photo depicts "  # what the authors put before every caption
CLIP_BATCH = 64


def clip_scores(pairs: PromptedImages, clip: Clip) -> list[Score]:
    """CLIPScore, its variance over images and over seeds of a prompt, and the plain cosine that papers quote.

    CLIPScore is 2.5 max(cos, 0) with "A photo depicts " before the prompt, as its authors compute it; papers
    on generation mostly quote 100 cos of the prompt as it is. The variance over images is that of all scores;
    that over seeds is the mean, over prompts with several images, of the unbiased variance within a prompt.

    Returns:
        Four scores.

    Raises:
        VugenError: the set cannot be read.
    """

    def embed(batch: list[Prompted]) -> list[tuple[float, float, bool]]:
        """Cosines with the prefix and without, and whether the prompt is longer than CLIP reads."""
        texts = [prompt for _, prompt, _ in batch]
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for _, _, image in batch]
        seen = _unit(clip.encode_pictures(pictures))
        prefixed, too_long = clip.encode_texts([PREFIX + text for text in texts])
        plain, _ = clip.encode_texts(texts)
        both = ((seen * _unit(words)).sum(1).tolist() for words in (prefixed, plain))
        return list(zip(*both, too_long.tolist(), strict=True))

    judged = pairs.judged(embed, "CLIPScore", CLIP_BATCH)
    prompts = [prompt for _, prompt, _ in judged]
    cut = {prompt for _, prompt, (_, _, long) in judged if long}
    values = np.array([cosines for _, _, (*cosines, _) in judged])
    scores, plain = WEIGHT * values[:, 0].clip(0), 100 * values[:, 1]
    how = {
        "clip": clip.name,
        "weights_fingerprint": clip.fingerprint,
        "resize": clip.resize,
        "images": len(prompts),
        "prompts": len(set(prompts)),
    }
    warning = None
    if cut:
        warning = (
            f"{len(cut)} of {len(set(prompts))} prompts are longer than {clip.architecture} reads: it saw "
            "only their beginnings."
        )
    found = []
    for metric, name, each, text in (
        ("clip_score", "CLIPScore", scores, PREFIX + "{prompt}"),
        ("clip_cosine", "CLIP cosine x 100", plain, "{prompt}"),
    ):
        totals, counts = by_prompt(prompts, each.tolist())
        score = score_of(
            metric,
            f"{name} ({clip.architecture})",
            float(each.mean()),
            resampled_means(totals, counts),
            parameters={**how, "text": text},
            warning=warning if metric == "clip_score" else None,
        )
        score.std = float(each.std(ddof=1)) if len(each) > 1 else None
        found.append(score)
    over_images = float(scores.var(ddof=1)) if len(scores) > 1 else None
    over_seeds, drawn_often = seed_variance(prompts, scores)
    name = "CLIPScore's variance over"
    found.append(score_of("clip_score_variance", f"{name} images", over_images, parameters=how))
    found.append(
        score_of(
            "clip_score_seed_variance",
            f"{name} seeds",
            over_seeds,
            parameters={**how, "prompts_with_several_images": drawn_often},
            warning=None if drawn_often else "no prompt has two images: draw several with `vugen sample -n`.",
        )
    )
    return found


def seed_variance(prompts: list[str], scores: np.ndarray) -> tuple[float | None, int]:
    """The mean over prompts of the unbiased variance of each one's scores, and how many prompts have two.

    None where no prompt has two scores.
    """
    groups: dict[str, list[float]] = {}
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        groups.setdefault(prompt, []).append(score)
    variances = [np.var(group, ddof=1) for group in groups.values() if len(group) > 1]
    return (float(np.mean(variances)) if variances else None), len(variances)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1)
