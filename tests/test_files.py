"""Folders are written whole or not at all, and nobody else's is replaced."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.errors import VugenError
from vugen_cli.files import whole_folder


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "vae"
    for name in ("first", "second"):
        with whole_folder(out) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / name).write_text(name)
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["second"]
    assert [path.name for path in out.parent.iterdir()] == ["vae"]


def test_a_folder_stays_as_it_was_when_writing_fails(tmp_path: Path) -> None:
    out = tmp_path / "vae"
    out.mkdir()
    (out / "config.json").write_text("earlier")

    def write() -> None:
        with whole_folder(out) as temporary:
            (temporary / "config.json").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(VugenError, match=r"cannot write .*vae: No space left"):
        write()
    assert (out / "config.json").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


@pytest.mark.parametrize("command", ["train-vae", "train-vlm"])
def test_training_never_replaces_a_folder_that_it_did_not_write(
    command: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    for out in (".", str(tmp_path), "thesis.tex"):
        result = CliRunner().invoke(app, [command, "--data", str(scenes), "--out", out, "--steps", "1"])
        assert isinstance(result.exception, VugenError)
        assert "is there already and no run here wrote it" in str(result.exception)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
