"""Questions to a VLM about an image with the probability of its answer, and VQAScore: is the prompt shown?

Lin et al. (2024), "Evaluating Text-to-Visual Generation with Image-to-Text Generation".
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vugen_cli.checkpoint import fingerprint
from vugen_cli.errors import VugenError
from vugen_cli.metrics.bootstrap import by_prompt, resampled_means
from vugen_cli.metrics.prompted_images import Prompted, PromptedImages, score_of
from vugen_cli.metrics.report import Score
from vugen_cli.vlm.chat import asking, question_inputs
from vugen_cli.vlm.frozen import load_model

SUFFIX = " Please answer yes or no."
NANO = "nano was not trained on such questions and answers at random: take a larger model with --vlm."
QUESTION = 'Does this figure show "{prompt}"?'  # with the suffix, VQAScore's own template


class YesNoJudge:
    """A VLM that is asked questions of yes or no.

    The answer is the probability of the first token of "yes" against that of "no", each summed over how it
    may be written ("yes", "Yes", "YES", with and without a space before), normalised over the two. VQAScore
    as published takes the probability of "Yes" among all answers: with a model that mostly answers yes or no,
    the two are alike.

    Args:
        name: of any image-text-to-text model: nano, a Hugging Face directory, or a hub id.
        device: where it runs; on a GPU in bfloat16.

    Attributes:
        warning: what a reader of its scores must know, or None.

    Raises:
        VugenError: it cannot be loaded, or its tokenizer begins "yes" and "no" with the same token.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        precision = "bfloat16" if torch.device(device).type == "cuda" else "float32"
        model, self.processor = load_model(name, device, precision)
        self.model = model.eval().requires_grad_(False)
        self.path, self.name = name, Path(name).name
        self.fingerprint = fingerprint(model)
        self.warning = NANO if name == "nano" else None
        yes, no = (
            _first_tokens(
                self.processor.tokenizer,
                (space + text for text in (word, word.capitalize(), word.upper()) for space in ("", " ")),
            )
            for word in ("yes", "no")
        )
        self.yes, self.no = sorted(yes - no), sorted(no - yes)
        if not self.yes or not self.no:
            raise VugenError(f"{name} writes yes and no with the same first token: judge with another --vlm.")

    def __call__(self, image: torch.Tensor, question: str) -> float:
        """The probability of yes to a question about an image (uint8 [3, H, W]), in [0, 1].

        Raises:
            VugenError: the VLM cannot be asked.
        """
        log_p = self._log_probabilities(image, question + SUFFIX)
        yes, no = (log_p[tokens].logsumexp(0) for tokens in (self.yes, self.no))
        return torch.sigmoid(yes - no).item()

    def probability(self, image: torch.Tensor, question: str, answers: Sequence[str]) -> float:
        """The probability, among all first tokens, of those that some spellings of an answer begin with.

        Raises:
            VugenError: the VLM cannot be asked.
        """
        tokens = sorted(_first_tokens(self.processor.tokenizer, answers))
        return self._log_probabilities(image, question)[tokens].exp().sum().item()

    @torch.no_grad()
    def _log_probabilities(self, image: torch.Tensor, text: str) -> torch.Tensor:
        """Of the answer's first token, float64 [vocabulary].

        Every question is asked by itself: padding of others would change it in the last digits.
        """
        with asking(self.path, text):
            inputs = question_inputs(self.model, self.processor, image[None], text)
            # By `generate`, which knows each model's positions and computes only the last token's logits.
            out = self.model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.logits[0][0].double().log_softmax(0)

    def describe(self) -> dict[str, object]:
        """How the answers are obtained, as a record."""
        return {
            "vlm": self.path,
            "vlm_fingerprint": self.fingerprint,
            "precision": str(self.model.dtype).removeprefix("torch."),
            "answer": "p(yes) / (p(yes) + p(no)), of the first token",
            "yes_tokens": self.yes,
            "no_tokens": self.no,
        }


def _first_tokens(tokenizer: Any, spellings: Iterable[str]) -> set[int]:
    found = set()
    for text in spellings:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids and tokenizer.decode(ids[:1]).strip():  # a token of only the space says nothing
            found.add(int(ids[0]))
    return found


def vqa_scores(pairs: PromptedImages, judge: YesNoJudge) -> list[Score]:
    """The mean probability of yes to 'Does this figure show "{prompt}"? Please answer yes or no.'

    Returns:
        One score.

    Raises:
        VugenError: the set cannot be read or the VLM cannot be asked.
    """

    def say(batch: list[Prompted]) -> list[float]:
        return [judge(image, QUESTION.replace("{prompt}", prompt)) for _, prompt, image in batch]

    judged = pairs.judged(say, "VQAScore")
    prompts, values = [prompt for _, prompt, _ in judged], [value for _, _, value in judged]
    totals, counts = by_prompt(prompts, values)
    score = score_of(
        "vqa_score",
        f"VQAScore, judged by {judge.name}",
        float(np.mean(values)),
        resampled_means(totals, counts),
        parameters={
            **judge.describe(),
            "question": QUESTION + SUFFIX,
            "images": len(values),
            "prompts": len(totals),
        },
        warning=judge.warning,
    )
    score.std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return [score]
