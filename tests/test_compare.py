"""Comparison pages: the same prompts and seeds side by side, whole in one file."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.errors import VugenError
from vugen_cli.studies.compare import read_shown


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_samplers_and_folders_stand_side_by_side_on_one_page(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sampler = trained / "sampler.safetensors"
    run("sample", "a bear", "<b>two</b> cats", "-n", "2", "--sampler", sampler, "--out", "before")
    assert "2 side by side, 2 prompts" in run("compare", "before", sampler, "-n", "2")
    page = Path("compare.html").read_text()
    assert not re.search(r"(src|href)=.?https?:", page) and "<b>two" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert len(pictures) == 8
    by_label: dict[str, set[str]] = {}
    for data, label in pictures:
        by_label.setdefault(label, set()).add(data)
    run("export", sampler, "--out", "bears")  # as any command takes it
    run("compare", "bears", "before", "--out", "folders.html", "-n", "2")
    assert "<h3>bears</h3>" in Path("folders.html").read_text()
    # One sampler, twice: prompt and seed fix the picture, though the PNGs were written apart.
    assert len(by_label) == 4 and all(len(same) == 1 for same in by_label.values())


def test_samplers_whose_paths_are_alike_draw_into_folders_of_their_own(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [Path("runs/a/s.safetensors"), Path("runs-a/s.safetensors")]
    drawn: list[Path] = []

    def listed(folder: Path, *_: object) -> list[object]:
        drawn.append(folder)
        return []

    monkeypatch.setattr("vugen_cli.sampling.draw.draw", lambda *_, study: None)
    monkeypatch.setattr("vugen_cli.sampling.trained.load_sampler", lambda *_: None)
    monkeypatch.setattr("vugen_cli.studies.compare.read_shown", listed)
    monkeypatch.setattr("vugen_cli.studies.compare.write_comparison", lambda shown, _: len(shown))
    for name in names:
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(b"")
    run("compare", *names, "--prompt", "a bear")
    assert len(set(drawn)) == 2


def test_the_first_process_of_a_job_compares_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "WORLD_SIZE": "2",
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    assert "1 side by side" in run(
        "compare", trained / "sampler.safetensors", "--prompt", "a bear", "-n", "1"
    )


def test_what_cannot_be_compared_says_why(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert "no nowhere" in str(runner.invoke(app, ["compare", "nowhere"]).exception)
    for option in ("--prompt", "--seed"):
        folders = ["compare", str(tmp_path), option, "7"]
        assert f"{option} is for samplers to draw with" in str(runner.invoke(app, folders).exception)
    sampler = str(trained / "sampler.safetensors")
    assert "is given twice" in str(runner.invoke(app, ["compare", sampler, sampler]).exception)
    place = ["compare", sampler, "--prompt", "{image} in the snow"]
    assert "no picture is given: leave it out" in str(runner.invoke(app, place).exception)
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits" / "1.png").write_bytes(b"x")
    edit = {"file": "1.png", "prompt": "put it in the snow", "sources": ["1.png"]}
    (tmp_path / "edits" / "samples.jsonl").write_text(json.dumps(edit) + "\n")
    assert "holds edits alone" in str(runner.invoke(app, ["compare", "edits", sampler]).exception)
    assert "no samples.jsonl" in str(runner.invoke(app, ["compare", str(tmp_path)]).exception)
    assert "no prompt" in str(runner.invoke(app, ["compare", str(trained / "sampler.safetensors")]).exception)


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_drawn(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in ("week", "."):
        words = ["compare", str(trained / "sampler.safetensors"), "--prompt", "a bear", "--out", out]
        assert "give the name of a page" in str(CliRunner().invoke(app, words).exception)
    assert not list(tmp_path.iterdir())


def test_a_listing_cannot_show_files_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / "samples.jsonl").write_text('{"file": "../secret.png", "prompt": "a bear"}\n')
    with pytest.raises(VugenError, match="outside its folder"):
        read_shown(folder)
