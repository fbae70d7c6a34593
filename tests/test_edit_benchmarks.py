"""ImgEdit and GEdit-Bench: their files, what a judge is asked, and how its numbers become a score."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import vugen_here
from test_pictured import noise
from test_prepare_sources import jpeg, put
from torch import Tensor

from vugen_cli.errors import VugenError
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.studies.edit_benchmarks import (
    Benchmark,
    Case,
    _mean,
    asks,
    judge_case,
    number_in,
    read_benchmark,
    score_benchmark,
)
from vugen_cli.vlm.frozen import FrozenVLM


@pytest.fixture
def imgedit(tmp_path: Path) -> Path:
    cases = {
        "1082": {"id": "animal/1.jpg", "prompt": "Add a hat to the bear.", "edit_type": "add"},
        "7": {"id": "style/2.jpg", "prompt": "Paint it in oil.", "edit_type": "style"},
    }
    questions = {"add": "Rate from 1 to 5: <edit_prompt>"}
    files = {"animal/1.jpg": jpeg(1), "style/2.jpg": jpeg(2), "singleturn.json": json.dumps(cases)}
    return put(tmp_path / "singleturn", {**files, "judge_prompt.json": json.dumps(questions)})


def test_imgedit_is_read_with_its_own_questions(imgedit: Path) -> None:
    found = read_benchmark(imgedit)
    assert (found.name, found.low, found.high) == ("imgedit", 1, 5)
    assert found.cases[0] == Case(
        "1082",
        "add",
        "Add a hat to the bear.",
        imgedit / "animal" / "1.jpg",
        "Rate from 1 to 5: Add a hat to the bear.",
    )
    assert found.cases[1].question is None
    (imgedit / "singleturn.json").rename(imgedit / "basic_edit.json")
    (imgedit / "judge_prompt.json").rename(imgedit / "prompts.json")
    assert read_benchmark(imgedit) == found, "as its repository names it"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "singleturn.json",
            '{"1": {"id": "x.jpg"}}',
            "is not ImgEdit's annotations: case 1 lacks one of id, pr",
        ),
        (
            "singleturn.json",
            '{"1": {"id": "x", "prompt": null, "edit_type": "add"}}',
            "case 1 lacks one of id, prompt",
        ),
        ("singleturn.json", '{"1": 5}', "case 1 lacks one of"),
        ("singleturn.json", "{}", "holds no cases"),
        ("singleturn.json", "[]", "is not ImgEdit's annotations: an object"),
        ("singleturn.json", '{"1": ', "singleturn.json is not ImgEdit's annotations: Expecting value"),
        (
            "singleturn.json",
            '{"7": {"id": "../x.jpg", "prompt": "a", "edit_type": "add"}}',
            "case 7: the path '../x.jpg' leaves",
        ),
        ("judge_prompt.json", "{", "judge_prompt.json is not ImgEdit's questions"),
        ("judge_prompt.json", '{"add": 5}', "judge_prompt.json: the question of add is no text"),
    ],
)
def test_a_damaged_file_of_imgedit_is_named_in_one_line(
    imgedit: Path, name: str, text: str, message: str
) -> None:
    (imgedit / name).write_text(text)
    with pytest.raises(VugenError, match=message):
        read_benchmark(imgedit)


def test_a_place_without_a_benchmark_is_named(tmp_path: Path) -> None:
    put(tmp_path, {"hard/notes.md": ""})
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            VugenError, match=f"there is no benchmark at {place}: give the folder of ImgEdit's"
        ):
            read_benchmark(place)


def test_gedit_is_read_in_one_language(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": jpeg(), "path": None}
    rows = {
        "key": ["a", "b"],
        "task_type": ["color_alter", "ps_human"],
        "instruction": ["Make it red.", "变红"],
        "instruction_language": ["en", "cn"],
        "input_image": [image, image],
        "Intersection_exist": [True, True],
    }
    pq.write_table(pa.table(rows), tmp_path / "train-00000.parquet")
    (case,) = read_benchmark(tmp_path).cases
    assert (case.key, case.kind, case.instruction) == ("a", "color_alter", "Make it red.")
    assert read_benchmark(tmp_path, "cn").cases[0].key == "b"
    with pytest.raises(VugenError, match="no instructions in the language fr, but in: cn, en"):
        read_benchmark(tmp_path, "fr")
    missing = {**rows, "input_image": [image, {"bytes": None, "path": "b.png"}]}
    pq.write_table(pa.table(missing), tmp_path / "train-00000.parquet")
    with pytest.raises(
        VugenError, match=r"train-00000\.parquet/1: the picture is not stored but lies at b.png"
    ):
        read_benchmark(tmp_path, "cn")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "train-00000.parquet")
    with pytest.raises(VugenError, match="lacks the columns task_type, instruction: it is not GEdit"):
        read_benchmark(tmp_path)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("4", 4.0),
        ("Brief reasoning: 2 hats.\nPrompt Compliance: 4\nNaturalness: **5**\nIntegrity: 3", 4.0),
        ("I would say 3.5.", 3.5),
        ("9 out of 10", None),
        ("4/5, for the 3 hats", 4.0),
        ("Prompt Compliance: 4/5\nVisual Naturalness: (2)\nIntegrity: 3 out of 5", 3.0),
        ("In picture 2 the cat is gone. Score 4", 4.0),
        ("In picture 2 there are 3 cats.", None),
        ("I'd give it 4/5.", 4.0),
        ("I give it 2 out of 5, since 1 cat is left", 2.0),
        ("The edit is accurate in 2 places. 5/5", 5.0),
        ("The score (1-5) is 4", 4.0),
        ("a bear", None),
    ],
)
def test_numbers_are_found_in_answers(answer: str, number: float | None) -> None:
    assert number_in(answer, 1, 5) == number


def test_a_case_is_asked_about_and_its_numbers_become_one() -> None:
    asked: list[tuple[int, str]] = []

    def ask(pictures: Sequence[Tensor], question: str) -> str:
        asked.append((len(pictures), question))
        return {0: "8", 1: "6", 2: "9"}[len(asked) - 1]

    source, drawn = noise(2)
    case = Case("a", "add", "Add a hat.", b"")
    # VIEScore's overall score: √(min(8, 6) · 9)
    assert judge_case(ask, Benchmark("gedit", [case], 0, 10), case, source, drawn) == pytest.approx(54**0.5)
    assert [count for count, _ in asked] == [2, 2, 1] and "Add a hat." in asked[0][1]
    assert judge_case(lambda *_: "no", Benchmark("gedit", [case], 0, 10), case, source, drawn) is None


def test_the_average_of_all_is_that_of_the_kinds() -> None:
    """ImgEdit's published rows too: BAGEL's kinds average to its 3.20, its cases would to 3.15."""
    cases = [Case(str(n), "add" if n else "style", "it", b"") for n in range(4)]
    scores: list[float | None] = [8.0, 2.0, 2.0, 2.0]
    found = {
        name: _mean(Benchmark(name, cases, 0, 10), "all", scores, "x").value for name in ("gedit", "imgedit")
    }
    assert found == {"gedit": 5.0, "imgedit": 5.0}


def test_imgedits_own_questions_are_answered_in_lines_or_not_at_all() -> None:
    assert number_in("The 2 cats are gone.\nPrompt Compliance: 4", 1, 5, lines=True) == 4
    assert number_in("4", 1, 5, lines=True) is None


def test_a_vlm_is_asked_about_two_pictures(vlm: FrozenVLM) -> None:
    assert isinstance(asks(vlm.model, vlm.processor)(noise(2), "which is nicer?"), str)


def test_a_benchmark_is_drawn_and_scored_by_kind(imgedit: Path, trained: Path, tmp_path: Path) -> None:
    sampler = load_sampler(trained / "sampler.safetensors")
    answers = iter(["Prompt Compliance: 3", "4", "5", "none"])
    report = score_benchmark(
        sampler, read_benchmark(imgedit), lambda *_: next(answers), "fake", tmp_path / "drawn"
    )
    bad = Benchmark("imgedit", [Case("9", "add", "Add a hat.", tmp_path / "missing.jpg")], 1, 5)
    with pytest.raises(VugenError, match=r"case 9: .*missing\.jpg cannot be read"):
        score_benchmark(sampler, bad, lambda *_: "5", "fake", tmp_path / "bad")
    scores = {score.metric: score for score in report.scores}
    assert scores["imgedit_add"].value == 3 and scores["imgedit_style"].value is None
    parameters = scores["imgedit_all"].parameters
    assert parameters["without_a_number"] == 1 and parameters["own_questions"] == 1
    assert (tmp_path / "drawn" / "edits.html").is_file()
    sampler_path = trained / "sampler.safetensors"
    command = ("study", "edit-benchmark", imgedit, "--sampler", sampler_path, "--count", 1)
    done = vugen_here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (score, _) = json.loads((tmp_path / "edit-benchmark.json").read_text())["scores"]
    assert score["parameters"]["edits"] == 1
