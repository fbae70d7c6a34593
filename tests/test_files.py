"""Files and folders are written whole or not at all, in UTF-8, and nobody else's is replaced. A second."""

import ast
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vugen_cli import files
from vugen_cli.app import app
from vugen_cli.errors import VugenError
from vugen_cli.files import read_jsonl, whole_file, whole_folder


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


def test_a_link_to_a_folder_stays_one_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    link, there = tmp_path / "vae", tmp_path / "disk" / "vae"
    there.mkdir(parents=True)
    link.symlink_to(there)
    for name in ("first", "second"):
        with whole_folder(link) as temporary:
            (temporary / name).write_text(name)
    assert link.is_symlink() and [path.name for path in there.iterdir()] == ["second"]
    assert [path.name for path in there.parent.iterdir()] == ["vae"]


def test_a_link_to_a_file_stays_one_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    for text in ("first", "second"):
        with whole_file(tmp_path / "link.json") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "second"
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("pipe", "no plain file"), (".", "a folder")):
        with pytest.raises(VugenError, match=f"cannot write .*: it is {what}"), whole_file(tmp_path / name):
            raise AssertionError


def test_a_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "vae", Path.rename
    out.mkdir()
    (out / "config.json").write_text("earlier")

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(VugenError, match="Input/output error"), whole_folder(out):
        pass
    assert (out / "config.json").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_files_of_a_folder_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "vae") as temporary:
            (temporary / "weights").touch(mode=0o600)  # as safetensors does
    finally:
        os.umask(mask)
    assert (tmp_path / "vae/weights").stat().st_mode & 0o777 == 0o640


def test_lines_of_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").write_text('{"caption": "Bär"}\n', encoding="utf-8-sig")
    assert list(read_jsonl(tmp_path / "table.jsonl")) == [{"caption": "Bär"}]


def test_no_text_is_read_or_written_in_whatever_encoding_the_locale_has() -> None:
    for path in Path(files.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or any(key.arg == "encoding" for key in call.keywords):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            plain = isinstance(call.func, ast.Name) and name == "open"
            binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args[1:2])
            where = f"{path.name}:{call.lineno} names no encoding"
            assert name not in ("read_text", "write_text") and not (plain and not binary), where


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
