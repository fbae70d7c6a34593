"""Edits of photographs: ImgEdit (arXiv 2505.20275) and GEdit-Bench (arXiv 2504.17761), judged by a VLM.

Published figures have a judge of their own (GPT-4.1): figures of another judge stand beside each other only.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vugen_cli.data.captions import inside
from vugen_cli.data.hf import Tables, parquet_files, stored_picture
from vugen_cli.errors import VugenError, first_line
from vugen_cli.metrics.bootstrap import resampled_means
from vugen_cli.metrics.prompted_images import score_of
from vugen_cli.metrics.report import Report, Score, versions
from vugen_cli.processes import is_first
from vugen_cli.progress import progress_bar
from vugen_cli.sampling.draw import draw, file_stems
from vugen_cli.sampling.sampler import Sampler, open_picture
from vugen_cli.studies.compare import read_shown, write_comparison
from vugen_cli.vlm.pictured import picture_inputs
from vugen_cli.vlm.prompts import Prompt

ANSWER = 256  # tokens of a judge's answer, at most
CASES = ("singleturn.json", "basic_edit.json")  # ImgEdit's annotations, as released and in its repository
# ImgEdit's questions by kind of edit, with `<edit_prompt>` in them, as released and in its repository.
JUDGE_PROMPTS = ("judge_prompt.json", "prompts.json")

FOLLOWED = (
    "The second picture was made from the first by this instruction: {instruction}\nHow well does it do what "
    "the instruction asks? Answer with one number from {low} (not at all) to {high} (perfectly)."
)
KEPT = (
    "The second picture was made from the first by this instruction: {instruction}\nHow well is everything "
    "kept that the instruction does not ask to change? Answer with one number from {low} (nothing) to {high} "
    "(all)."
)
LOOKS = (
    "How natural does this picture look, without artefacts, smears or broken shapes? Answer with one number "
    "from {low} (broken) to {high} (flawless)."
)

Ask = Callable[[Sequence[Tensor], str], str]  # pictures and a question -> the answer


@dataclass
class Case:
    """One edit of a benchmark.

    Attributes:
        key: its name there.
        kind: of edit, as the benchmark has it.
        instruction: what is asked.
        source: a file, or its bytes.
        question: ImgEdit's own, where its file of questions lies beside.
    """

    key: str
    kind: str
    instruction: str
    source: Path | bytes
    question: str | None = None


@dataclass
class Benchmark:
    """The cases of a published benchmark, and from which to which number it is judged."""

    name: Literal["imgedit", "gedit"]
    cases: list[Case]
    low: int
    high: int


def read_benchmark(path: Path, language: str = "en") -> Benchmark:
    """The cases of ImgEdit or GEdit-Bench.

    Args:
        path: ImgEdit's annotations (`singleturn.json` or `basic_edit.json`, beside the folders of its
            pictures) or their folder, or GEdit-Bench as parquet files or a `save_to_disk` directory.
        language: of GEdit-Bench's instructions, `en` or `cn`.

    Raises:
        VugenError: neither of them is there, or a case lacks something.
    """
    path = next((path / name for name in CASES if (path / name).is_file()), path)
    if path.suffix == ".json":
        return Benchmark("imgedit", _imgedit(path), 1, 5)
    if not path.is_file() and not parquet_files(path) and not any(path.glob("*.json")):
        raise VugenError(
            f"there is no benchmark at {path}: give the folder of ImgEdit's {CASES[0]}, or GEdit-Bench's "
            "parquet files"
        )
    tables = Tables(path, "train")
    if lacking := [c for c in ("key", "task_type", "instruction") if c not in tables.names]:
        raise VugenError(f"{path} lacks the columns {', '.join(lacking)}: it is not GEdit-Bench")
    picture = next((c for c in ("input_image_raw", "input_image") if c in tables.names), None)
    if picture is None:
        raise VugenError(f"{path} lacks the column input_image: it is not GEdit-Bench")
    told = [c for c in ("instruction_language",) if c in tables.names]
    cases, languages = [], set()
    for index in range(len(tables)):
        key, row = tables.row(index, ["key", "task_type", "instruction", picture, *told])
        languages.add(str(row.get("instruction_language", language)))
        if row.get("instruction_language", language) == language:
            if not row["instruction"] or not isinstance(row["instruction"], str):
                raise VugenError(f"{path}: {key} has no instruction: download it again")
            try:
                source = stored_picture(row[picture], key)
            except OSError as error:
                raise VugenError(f"{path}: {key}: {error.strerror}: download it again") from error
            cases.append(Case(str(row["key"]), str(row["task_type"]), row["instruction"], source))
    if not cases:
        there = ", ".join(sorted(languages)) or "none"
        raise VugenError(f"{path} holds no instructions in the language {language}, but in: {there}")
    return Benchmark("gedit", cases, 0, 10)


def _imgedit(path: Path) -> list[Case]:
    beside = [path.with_name(name) for name in JUDGE_PROMPTS]
    questions = next((each for each in beside if each.is_file()), beside[0])
    asked = _read_object(questions, "ImgEdit's questions by kind of edit") if questions.is_file() else {}
    cases = []
    for key, case in _read_object(path, "ImgEdit's annotations").items():
        facts = case if isinstance(case, dict) else {}
        told: list[Any] = [facts.get(name) for name in ("edit_type", "prompt", "id")]
        if not all(value and isinstance(value, str) for value in told):
            raise VugenError(
                f"{path} is not ImgEdit's annotations: case {key} lacks one of id, prompt and edit_type"
            )
        kind, prompt, picture = told
        question = asked.get(kind)
        if question is not None and not isinstance(question, str):
            raise VugenError(f"{questions}: the question of {kind} is no text")
        source = path.parent / inside(path, f"case {key}", picture)
        cases.append(
            Case(key, kind, prompt, source, question.replace("<edit_prompt>", prompt) if question else None)
        )
    if not cases:
        raise VugenError(f"{path} holds no cases: download ImgEdit's annotations again")
    return cases


def _read_object(path: Path, what: str) -> dict[str, Any]:
    """The object that a JSON file of ImgEdit holds.

    Raises:
        VugenError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise VugenError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise VugenError(f"{path} is not {what}: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise VugenError(f"{path} is not {what}: an object of a name each")
    return found


def asks(model: Any, processor: Any) -> Ask:
    """Questions about several pictures together to a VLM, answered greedily."""

    @torch.no_grad()
    def ask(pictures: Sequence[Tensor], question: str) -> str:
        inputs = picture_inputs(model, processor, [Prompt(question, tuple(pictures))])
        answer = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
        said: str = processor.batch_decode(
            answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )[0]
        return said.strip()

    return ask


def number_in(answer: str, low: int, high: int, lines: bool = False) -> float | None:
    """What an answer says: the mean of its lines that end as `Naturalness: 4` or `4/5`, else the first of its
    numbers out of another, else the first that it calls a score, else the one that it has or begins with.

    Args:
        answer: of the judge.
        low, high: of the scale.
        lines: take such lines alone, as ImgEdit's own script does.

    Returns:
        None if there is no such number between `low` and `high`.
    """
    one, of = r"(\d+(?:\.\d+)?)", r"(?:\s*/\s*\d+|\s+out of \d+)"
    told = re.findall(rf":[\s*(\[]*{one}{of}?[\s*.)\]]*$", answer, re.MULTILINE)
    if not told and not lines:
        every = re.findall(rf"(?<![\d.]){one}", answer)
        scale = r"(?:\d+\s*(?:-|–|to)\s*\d+[^\d\n]{0,20})?"  # as in `score (1-5): 4`
        word = r"\b(?:scor|rat)(?:e|es|ed|ing)\b[^\d\n]{0,20}"
        scored = re.findall(word + scale + one, answer, re.IGNORECASE)
        begins = re.match(rf"[\s*(\[]*{one}", answer)
        alone = every[:1] if begins or len(every) == 1 else []
        told = re.findall(rf"(?<![\d.]){one}{of}", answer)[:1] or scored[:1] or alone
    numbers = [float(number) for number in told if low <= float(number) <= high]
    return sum(numbers) / len(numbers) if numbers else None


def judge_case(ask: Ask, benchmark: Benchmark, case: Case, source: Tensor, drawn: Tensor) -> float | None:
    """A case's score: of GEdit-Bench √(min(followed, kept) · looks), of ImgEdit the mean of its numbers.

    Args:
        ask: a VLM.
        benchmark, case: what is judged.
        source, drawn: uint8 [3, H, W].

    Returns:
        None where the judge gives no number.
    """
    low, high = benchmark.low, benchmark.high
    if case.question:
        return number_in(ask([source, drawn], case.question), low, high, lines=True)
    numbers = []
    for question, pictures in ((FOLLOWED, [source, drawn]), (KEPT, [source, drawn]), (LOOKS, [drawn])):
        text = question.format(instruction=case.instruction, low=low, high=high)
        numbers.append(number_in(ask(pictures, text), low, high))
    followed, kept, looks = numbers
    if followed is None or kept is None or looks is None:
        return None
    if benchmark.name == "imgedit":
        return (followed + kept + looks) / 3
    return float((min(followed, kept) * looks) ** 0.5)


def score_benchmark(sampler: Sampler, benchmark: Benchmark, ask: Ask, judge: str, out: Path) -> Report:
    """Draw a benchmark's edits and have a VLM judge them.

    Args:
        sampler: trained on edits.
        benchmark: from `read_benchmark`.
        ask: the judge.
        judge: its name.
        out: folder for the pictures and a page of them, `edits.html`.

    Returns:
        The mean of all cases, then of each kind; an empty report on all but the first process of a job.

    Raises:
        VugenError: a source picture cannot be used.
    """
    sources = [_open_source(case, sampler.card.data.size) for case in benchmark.cases]
    prompts = [Prompt(c.instruction, (source,)) for c, source in zip(benchmark.cases, sources, strict=True)]
    draw(sampler, prompts, 1, out, study=True)
    if not is_first():
        return Report()
    write_comparison({benchmark.name: read_shown(out)}, out / "edits.html")
    found: list[float | None] = []
    cases = progress_bar(benchmark.cases, desc="judge", unit="edit")
    for case, prompt, stem in zip(cases, prompts, file_stems(prompts), strict=True):
        drawn = open_picture(out / f"{stem}-0000.png", sampler.card.image_size)
        found.append(judge_case(ask, benchmark, case, prompt.pictures[0], drawn))
    scores = [
        _mean(benchmark, kind, found, judge)
        for kind in ("all", *dict.fromkeys(case.kind for case in benchmark.cases))
    ]
    return Report(scores=scores, versions=versions())


def _open_source(case: Case, size: int) -> Tensor:
    try:
        return open_picture(case.source, size)
    except VugenError as error:
        raise VugenError(f"case {case.key}: {error}") from error


def _mean(benchmark: Benchmark, kind: str, found: list[float | None], judge: str) -> Score:
    given = [score for case, score in zip(benchmark.cases, found, strict=True) if kind in ("all", case.kind)]
    values = np.array([score for score in given if score is not None])
    without, weights = len(given) - len(values), np.ones(len(values))
    own = sum(case.question is not None for case in benchmark.cases if kind in ("all", case.kind))
    if kind == "all":  # both average their kinds, however large
        kinds = [case.kind for case, score in zip(benchmark.cases, found, strict=True) if score is not None]
        weights = np.array([1 / kinds.count(each) for each in kinds])
    return score_of(
        f"{benchmark.name}_{kind}",
        f"{benchmark.name}, {kind}, {benchmark.low} to {benchmark.high}",
        float(np.average(values, weights=weights)) if len(values) else None,
        resampled_means(values * weights, weights) if len(values) else None,
        parameters={"judge": judge, "edits": len(given), "without_a_number": without, "own_questions": own},
        warning=f"the judge gave no number for {without} of {len(given)}." if without else None,
    )
