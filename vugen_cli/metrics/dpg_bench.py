"""DPG-Bench: long prompts cut into yes/no questions, of which some only count if others hold.

Hu et al. (2024), "ELLA: Equip Diffusion Models with LLM for Enhanced Semantic Alignment", as its
`compute_dpg_bench.py` scores.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

from vugen_cli.errors import VugenError
from vugen_cli.metrics.bootstrap import by_prompt, resampled_means
from vugen_cli.metrics.prompted_images import Prompted, PromptedImages, score_of
from vugen_cli.metrics.report import Score
from vugen_cli.metrics.vqa import SUFFIX, YesNoJudge

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
TABLE = "dpg_bench.csv"


@dataclass(frozen=True)
class Question:
    """One question about an image.

    Attributes:
        text: as published.
        parents: ids of the questions that must be answered yes for this one to count.
        category: the broad one: global, entity, attribute, relation or other.
    """

    text: str
    parents: tuple[int, ...]
    category: str


@dataclass
class Item:
    """One prompt with its questions by id, in the file's order.

    Attributes:
        id: the name of its prompt file and of its image in the published layout.
        prompts: the prompt, as the table and as `prompts/<id>.txt` have it.
        questions: by their "proposition_id".
    """

    id: str
    prompts: list[str]
    questions: dict[int, Question] = field(default_factory=dict)


def read_dpg_bench(directory: Path) -> list[Item]:
    """The benchmark as it is published: `dpg_bench.csv`, and `prompts/<item_id>.txt` where they are there.

    Raises:
        VugenError: the table is missing or is in another layout.
    """
    table = Path(directory) / TABLE
    if not table.is_file():
        raise VugenError(
            f"--dpg-bench {directory} has no {TABLE}: give the folder dpg_bench/ of the ELLA repository."
        )
    items: dict[str, Item] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise VugenError(
                    f"{table} has no column {', '.join(missing)}: it is not DPG-Bench's; fetch it again."
                )
            for row in rows:
                _add_question(items, row, f"{table} line {rows.line_num}")
    except (OSError, ValueError, csv.Error) as error:
        raise VugenError(f"{table} cannot be read: {' '.join(str(error).split())}.") from error
    if not items:
        raise VugenError(f"{table} holds no questions: fetch it again.")
    for item in items.values():
        text = Path(directory) / "prompts" / f"{item.id}.txt"
        if text.is_file():
            item.prompts.append(_squeeze(text.read_text(encoding="utf-8-sig", errors="replace")))
    return list(items.values())


def _add_question(items: dict[str, Item], row: dict[str, str], where: str) -> None:
    if any(row[name] is None for name in COLUMNS):
        raise VugenError(f"{where} has too few columns: fetch the table again.")
    name, text = row["item_id"].strip(), row["question_natural_language"].strip()
    # Published names are letters and digits; a name also becomes a path.
    if not name or "/" in name or "\\" in name or not text:
        raise VugenError(f"{where} has no usable item_id or no question: fetch the table again.")
    try:
        number = int(row["proposition_id"])
        parents = tuple(int(parent) for parent in row["dependency"].split(","))
    except ValueError:
        raise VugenError(
            f"{where}: proposition_id '{row['proposition_id']}' and dependency '{row['dependency']}' must be "
            "whole numbers, the second with commas between."
        ) from None
    # As published: "entity - whole (motorcycle)" counts for "entity". 0 is no parent.
    category = row["tuple"].split("(")[0].split("-")[0].strip() or "other"
    item = items.setdefault(name, Item(name, [_squeeze(row["text"])]))
    item.questions[number] = Question(text, tuple(parent for parent in parents if parent), category)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def count_answers(item: Item, answers: dict[int, bool]) -> float:
    """The share of an item's questions that count as yes, in [0, 1].

    As published, questions are gone through in the file's order, and one whose parent does not count does not
    count itself, so that a failure is handed down. A parent that the item does not have asks for nothing; the
    published script leaves such a prompt out.

    Args:
        item: the questions.
        answers: whether each was answered yes, by id.
    """
    counts = dict(answers)
    for number, question in item.questions.items():
        if not all(counts.get(parent, True) for parent in question.parents):
            counts[number] = False
    return sum(counts.values()) / len(counts)


def match_items(pairs: PromptedImages, items: list[Item], directory: Path) -> dict[str, Item]:
    """The item of each prompt of a set of images.

    Raises:
        VugenError: a prompt is none of the benchmark's; names its first image.
    """
    known = {prompt: item for item in items for prompt in item.prompts}
    pairs.refuse_others(known, directory, str(Path(directory) / "prompts"))
    return {prompt: known[prompt] for prompt in pairs.prompts.values()}


def dpg_bench_scores(
    pairs: PromptedImages,
    items: list[Item],
    directory: Path,
    judge: YesNoJudge,
) -> list[Score]:
    """DPG-Bench x 100, and the share of yes in each broad category.

    The score of an image is `count_answers`, that of a prompt the mean over its images, and that of the
    benchmark the mean over prompts. Categories are, as published, shares of the plain answers,
    without dependencies; but of all images, where the published script takes each prompt's last.

    Args:
        pairs: images whose prompts are the benchmark's.
        items: from `read_dpg_bench`.
        directory: where they are from, for messages.
        judge: answers the questions; yes is a probability above one half.

    Returns:
        Scores, the whole benchmark's first.

    Raises:
        VugenError: a prompt is none of the benchmark's, the set cannot be read or the VLM cannot be asked.
    """
    item_of = match_items(pairs, items, directory)
    seen, scores, shares = _ask_all(pairs, item_of, judge)
    totals, counts = by_prompt(seen, scores)
    means = totals / counts
    parameters = {
        **judge.describe(),
        "question": "{question}" + SUFFIX,
        "yes_above": 0.5,
        "prompts": len(means),
        "prompts_of_the_benchmark": len(items),
        "images": len(scores),
        "questions_asked": sum(len(asked) for _, asked in shares.values()),
        "parents_not_in_the_table": sum(
            parent not in item.questions
            for item in items
            for question in item.questions.values()
            for parent in question.parents
        ),
    }
    warnings = [f"Published scores are of mPLUG-large's answers, not of {judge.name}'s."]
    if len(means) < len(items):
        warnings.insert(0, f"Only {len(means)} of {len(items)} prompts have images.")
    if judge.warning:
        warnings.append(judge.warning)
    whole = score_of(
        "dpg_bench",
        f"DPG-Bench, judged by {judge.name}",
        100 * float(means.mean()),
        100 * resampled_means(means),
        parameters=parameters,
        warning=" ".join(warnings),
    )
    whole.by_item = dict(zip(dict.fromkeys(seen), (100 * means).tolist(), strict=True))
    categories = []
    for category, (asked_of, yes) in sorted(shares.items()):
        totals, counts = by_prompt(asked_of, yes)
        categories.append(
            score_of(
                f"dpg_bench_{category}",
                f"DPG-Bench {category}",
                100 * float(totals.sum() / counts.sum()),
                100 * resampled_means(totals, counts),
                parameters={"questions_asked": len(yes)},
            )
        )
    return [whole, *categories]


def _ask_all(
    pairs: PromptedImages,
    item_of: dict[str, Item],
    judge: YesNoJudge,
) -> tuple[list[str], list[float], dict[str, tuple[list[str], list[bool]]]]:
    """The item and score of each image; and by category, the item of each question asked and its answer."""

    def answer(batch: list[Prompted]) -> list[dict[int, bool]]:
        asked = [(image, item_of[prompt].questions) for _, prompt, image in batch]
        return [{n: judge(image, each.text) > 0.5 for n, each in of.items()} for image, of in asked]

    seen: list[str] = []
    scores: list[float] = []
    shares: dict[str, tuple[list[str], list[bool]]] = {}
    for _, prompt, answers in pairs.judged(answer, "DPG-Bench"):
        item = item_of[prompt]
        seen.append(item.id)
        scores.append(count_answers(item, answers))
        for number, question in item.questions.items():
            asked_of, yes = shares.setdefault(question.category, ([], []))
            asked_of.append(item.id)
            yes.append(answers[number])
    return seen, scores, shares
