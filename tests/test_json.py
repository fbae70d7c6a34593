"""`--json` on every command: one object on standard output, as docs/formats.md has it, errors included."""

import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_overrides, vugen_here
from pydantic import TypeAdapter
from typer.main import get_command

from vugen_cli.app import app
from vugen_cli.data.manifest import read_manifest
from vugen_cli.files import write_json
from vugen_cli.metrics.report import Report, Score
from vugen_cli.nano import demo, edit_study, train_judge, train_vlm
from vugen_cli.recipe import Recipe
from vugen_cli.sampling import trained
from vugen_cli.serve import run
from vugen_cli.stages import caption, train_vae
from vugen_cli.studies import edit_benchmarks, plan

ANSWERS = runpy.run_path(str(Path(__file__).parent.parent / "docs/write_formats.py"))["ANSWERS"]
SHORT = "--steps 1 --batch-size 2"
COMMANDS = {  # each as short as it can be; {names} are those of `place`
    "prepare": "--dataset openmoji --count 2 --workers 1 --out new",
    "caption": "--data {scenes} --out captioned",
    "train-reducer": f"--data {{scenes}} {SHORT} --out r.safetensors {{tiny}}",
    "train-sampler": f"--reducer reducer.safetensors {SHORT} --out s.safetensors",
    "sample": "a-bear -n 2 --sampler sampler.safetensors --out drawn",
    "score": "--fid --psnr --features vlm:{vlm} --images {scenes} --reference {scenes}",
    "score prompts": "--vqa-score --vlm nano",
    "study composition": "--sampler sampler.safetensors --count 2",
    "study edits": "--sampler sampler.safetensors --count 2",
    "study edit-benchmark": "bench --sampler sampler.safetensors",
    "study understanding": "--sampler sampler.safetensors --count 1",
    "study training": "kept.run --features vlm:{vlm} --count 2",
    "study diversity": "--images samples --features vlm:{vlm}",
    "reconstruct": "--images {scenes} --count 2",
    "compare": "samples",
    "chat": "samples/grid.png --vlm {vlm} --tokens 2",
    "train-vlm": f"--data {{scenes}} {SHORT} --out v {{tiny}}",
    "train-vae": f"--data {{scenes}} {SHORT} --out a --set vae.widths=[8,8]",
    "train-judge": f"--data {{scenes}} {SHORT} --out j.safetensors",
    "serve": "--sampler sampler.safetensors --port 0",
    "merge": "sampler.safetensors --adapter adapter.safetensors",
    "export": "sampler.safetensors",
    "push": "shared user/name --dry-run",
    "inspect": "sampler.safetensors",
    "config": "--set decoder.preset=B",
    "runs": "",
    "plan": "--vlm {vlm} --gpus 1",
    "demo": "--out demo",
    "doctor": "--bug-report",
}
WRITES = {  # the file whose keys an answer has
    "score": "scores.json",
    "score prompts": "prompt-scores.json",
    "study composition": "composition.json",
    "study edits": "edits.json",
    "study edit-benchmark": "edit-benchmark.json",
    "study understanding": "understanding.json",
    "study training": "training.json",
    "study diversity": "diversity.json",
    "reconstruct": "reconstructions/reconstruction.json",
}


def fake_demo(out: Path, _device: Any) -> Path:
    report: dict[str, Any] = {"scores": [{"metric": "fid", "name": "FID", "value": 1.0}]}
    write_json(out / "scores.json", {"before": report, "after": report})
    return out / "report.html"


def fake_scores(*_: Any, **__: Any) -> Report:
    return Report(scores=[Score(metric="edits_all", name="all", value=1.0)])


def fake_plan(recipe: Recipe, machine: plan.Machine, _images: int | None) -> plan.Plan:
    memory = plan.Memory(1.0, 1.0, 2.0, 1.0, 4.0, 0.0, 3.0, 12.0, 64)
    stage = plan.StagePlan("train-vae", 10, 1, 4, 4, 2.0, {"ddp": memory}, 5.0, 1.0, 24.0, 8.0)
    return plan.Plan(
        recipe.name, recipe.vlm, machine, 64, [8, 8, 32], [8, 8, 4], 128, 0, 0, None, {"vae": 10}, [stage],
        [plan.PassPlan("sample", 1.0, 2.0)], {"vae": 8.0}, [], ["a note"],
    )  # fmt: skip


# What takes seconds is run by tests of its own; here only what the command makes of it.
INSTEAD: dict[str, tuple[Any, str, Any]] = {
    "caption": (caption, "write_captions", lambda data, *_: read_manifest(data)),
    "demo": (demo, "run_demo", fake_demo),
    "plan": (plan, "make_plan", fake_plan),
    "train-vlm": (train_vlm, "train_vlm", lambda *_: {"caption_accuracy": 0.5}),
    "study edits": (edit_study, "score_edits", fake_scores),
    "study edit-benchmark": (edit_benchmarks, "score_benchmark", fake_scores),
    "serve": (run, "run", lambda *_: None),
    "merge": (trained, "merge", lambda *_: None),
    "train-judge": (train_judge, "train_judge", lambda *_: {"subjects": 0.5}),
    "train-vae": (train_vae, "train_vae", lambda *_: None),
}


def registered(name: str, command: Any) -> Iterator[str]:
    """The names of all commands that can be given; a group that is a command itself is one of them."""
    if not hasattr(command, "commands"):
        yield name
        return
    if command.invoke_without_command:
        yield name
    for sub, under in command.commands.items():
        yield from registered(f"{name} {sub}".strip(), under)


@pytest.fixture(scope="module")
def place(
    trained: Path, scenes: Path, vlm_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A folder with what commands start from, and the names they are told of."""
    here = tmp_path_factory.mktemp("json")
    for stage in ("reducer", "sampler"):
        shutil.copy(trained / f"{stage}.safetensors", here)
    (here / "kept.run").mkdir()
    shutil.copy(trained / "sampler.safetensors", here / "kept.run" / "step-0000004.safetensors")
    write_json(here / "shared" / "model_index.json", {})
    write_json(here / "bench" / "singleturn.json", {"1": {"id": "1.jpg", "prompt": "x", "edit_type": "add"}})
    drawn = vugen_here("sample", "a bear", "-n", 2, "--sampler", "sampler.safetensors", cwd=here)
    assert drawn.returncode == 0, drawn.stderr
    tiny = " ".join(f"--set {override}" for override in tiny_overrides(vlm_path))
    return here, {"scenes": scenes, "vlm": vlm_path, "tiny": tiny}


def test_every_command_has_its_answer_documented_and_is_tried() -> None:
    assert set(registered("", get_command(app))) == set(ANSWERS) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers_with_one_object_of_its_documented_keys(
    command: str, place: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, names = place
    if command in INSTEAD:
        module, name, instead = INSTEAD[command]
        monkeypatch.setattr(module, name, instead)
    words = [*command.split(), *COMMANDS[command].format(**names).split()]
    result = vugen_here(*words, "--json", cwd=here)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    answer = json.loads(line)
    assert known_keys(ANSWERS[command][0], line) == answer
    if command in WRITES:
        assert answer == json.loads((here / WRITES[command]).read_text())


def known_keys(model: Any, line: str) -> Any:
    """A JSON object read through a model: unknown keys are refused or fall out."""
    adapter = TypeAdapter(model)
    return adapter.dump_python(adapter.validate_json(line), mode="json", exclude_unset=True)


def test_inspect_shows_a_manifest_as_it_stands_in_its_file(scenes: Path, tmp_path: Path) -> None:
    line = vugen_here("inspect", scenes, "--json", cwd=tmp_path).stdout
    assert known_keys(ANSWERS["inspect"][3], line) == json.loads((scenes / "dataset.json").read_text())


def test_samples_are_listed_as_in_their_file(place: tuple[Path, dict[str, Any]]) -> None:
    here, _ = place
    result = vugen_here(
        "--json", "sample", "a cat", "--sampler", "sampler.safetensors", "--out", "cats", cwd=here
    )
    answer = json.loads(result.stdout)
    lines = (here / "cats/samples.jsonl").read_text().splitlines()
    assert answer["images"] == [json.loads(line) for line in lines] and len(lines) == 1
    assert "wrote 1 picture," in result.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["inspect", "nothing"], 1, "no checkpoint at nothing"),
        (["sample", "--colour"], 2, "the command line is not understood"),
    ],
)
def test_an_error_is_an_object_too(words: list[str], status: int, message: str, tmp_path: Path) -> None:
    result = vugen_here(*words, "--json", cwd=tmp_path)
    assert result.returncode == status and json.loads(result.stdout) == {"error": message}
    assert result.stderr
    assert vugen_here(*words, cwd=tmp_path).stdout == "", "nothing changes where JSON was not asked for"
