"""GenEval 2 with Soft-TIFA: how likely does a VLM find each atom of a prompt (object, count, relation, ...)?

Kamath et al. (2025), "GenEval 2: Addressing Benchmark Drift in Text-to-Image Evaluation" (arXiv 2512.16853),
as its `evaluation.py` asks and its `soft_tifa_analysis.py` counts.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator

from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import read_jsonl
from vugen_cli.metrics.bootstrap import by_prompt, resampled_means
from vugen_cli.metrics.prompted_images import Prompted, PromptedImages, score_of
from vugen_cli.metrics.report import Score
from vugen_cli.metrics.vqa import YesNoJudge

SKILLS = ("object", "attribute", "count", "position", "verb")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WORDS = " Answer in one word."
JUDGE = "Qwen3-VL-8B-Instruct"  # of the published scores


class Item(BaseModel):
    """A line of `geneval2_data.jsonl`: a prompt, and a question and its answer for each of its atoms."""

    prompt: str
    atom_count: int
    vqa_list: Annotated[list[tuple[str, str]], Field(min_length=1)]
    skills: list[str]

    @model_validator(mode="after")
    def _each_has_its_skill(self) -> "Item":
        if len(self.skills) != len(self.vqa_list):
            raise ValueError(f"{len(self.vqa_list)} questions but {len(self.skills)} skills")
        if unknown := set(self.skills).difference(SKILLS):
            raise ValueError(f"the skill {min(unknown)} is none of {', '.join(SKILLS)}")
        return self


def read_geneval2(path: Path) -> dict[str, Item]:
    """What is asked about each prompt, by prompt, of the published `geneval2_data.jsonl`.

    Raises:
        VugenError: the file cannot be read or a line is in another layout.
    """
    path = Path(path)
    if not path.is_file():
        raise VugenError(
            f"--geneval2 {path} is no file: give geneval2_data.jsonl of the GenEval2 repository."
        )
    items = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            item = Item.model_validate(row)
        except ValidationError as error:
            raise VugenError(
                f"{path} object {number} is not as geneval2_data.jsonl's: {first_line(error)}."
            ) from error
        items[" ".join(item.prompt.split())] = item
    if not items:
        raise VugenError(f"{path} is empty: give geneval2_data.jsonl of the GenEval2 repository.")
    return items


def answers_of(question: str, answer: str) -> list[str]:
    """How a right answer may be written, as published: a number in letters or digits, else yes.

    Args:
        question: begins with "How many" where a number is asked for.
        answer: a number in letters, from "one" to "ten".
    """
    if not question.startswith("How many"):
        return ["Yes", "yes", " yes", " Yes"]
    digits = str(NUMBERS.index(answer) + 1) if answer in NUMBERS else "other"
    return [space + word for word in (answer, answer.capitalize(), digits) for space in ("", " ")]


def geneval2_scores(pairs: PromptedImages, items: dict[str, Item], judge: YesNoJudge) -> list[Score]:
    """Soft-TIFA x 100: means over prompts, over the atoms of each skill, and over prompts of as many atoms.

    An atom's score is the probability of the right answer among all answers. A prompt's is their geometric
    mean (GM: is all of it there?) or arithmetic mean (AM: how much of it?), and the mean of those over its
    images where it has several.

    Args:
        pairs: images whose prompts are the benchmark's; see `PromptedImages.refuse_others`.
        items: from `read_geneval2`.
        judge: answers the questions.

    Returns:
        Scores, GM first.

    Raises:
        VugenError: the set cannot be read or the VLM cannot be asked.
    """

    def ask_all(batch: list[Prompted]) -> list[list[float]]:
        return [
            [judge.probability(image, q + WORDS, answers_of(q, a)) for q, a in items[prompt].vqa_list]
            for _, prompt, image in batch
        ]

    judged = pairs.judged(ask_all, "GenEval 2")
    prompts, atoms = [prompt for _, prompt, _ in judged], [atoms for _, _, atoms in judged]
    with np.errstate(divide="ignore"):  # the logarithm of an answer that cannot be: its mean is 0
        whole = [float(np.exp(np.log(each).mean())) for each in atoms]
    means = [float(np.mean(each)) for each in atoms]
    found = [
        _overall("gm", "GM (prompts)", prompts, whole, items, judge),
        _overall("am", "AM (atoms)", prompts, means, items, judge),
    ]
    of_skill: dict[str, list[tuple[str, float]]] = {}
    of_count: dict[int, list[tuple[str, float]]] = {}
    for prompt, each, value in zip(prompts, atoms, whole, strict=True):
        of_count.setdefault(items[prompt].atom_count, []).append((prompt, value))
        for skill, atom in zip(items[prompt].skills, each, strict=True):
            of_skill.setdefault(skill, []).append((prompt, atom))
    found += [_part(skill, f"AM, {skill}", of_skill[skill]) for skill in SKILLS if skill in of_skill]
    return found + [_part(f"{n}_atoms", f"GM, {n} atoms", of_count[n]) for n in sorted(of_count)]


def _overall(
    key: str, name: str, prompts: list[str], values: list[float], items: dict[str, Item], judge: YesNoJudge
) -> Score:
    """The mean x 100 over prompts of the means over their images."""
    totals, counts = by_prompt(prompts, values)
    means = totals / counts
    score = score_of(
        f"geneval2_{key}",
        f"GenEval 2 Soft-TIFA {name}",
        100 * float(means.mean()),
        100 * resampled_means(means),
        parameters={
            **judge.describe(),
            "question": "{question}" + WORDS,
            "answer": "p of the right answer's first tokens, among all tokens",
            "images": len(values),
            "prompts": len(means),
            "prompts_of_the_benchmark": len(items),
        },
        warning=_warning(len(means), len(items), judge),
    )
    score.by_item = dict(zip(dict.fromkeys(prompts), (100 * means).tolist(), strict=True))
    return score


def _part(key: str, name: str, values: list[tuple[str, float]]) -> Score:
    """The mean x 100 of the values of some prompts' atoms or images."""
    prompts, each = [prompt for prompt, _ in values], [value for _, value in values]
    totals, counts = by_prompt(prompts, each)
    return score_of(
        f"geneval2_{key}",
        f"GenEval 2 {name}",
        100 * float(np.mean(each)),
        100 * resampled_means(totals, counts),
        parameters={"answers" if "AM" in name else "images": len(each), "prompts": len(counts)},
    )


def _warning(prompts: int, of: int, judge: YesNoJudge) -> str | None:
    few = f"Only {prompts} of {of} prompts have images." if prompts < of else None
    other = f"Published scores are by {JUDGE}, not by {judge.name}." if judge.name != JUDGE else None
    return " ".join(filter(None, (few, other, judge.warning))) or None
