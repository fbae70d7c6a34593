"""A prompt with words that the VLM never saw is drawn, and says so where that can be known."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.errors import VugenError
from vugen_cli.nano.vlm import save_words
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm


def test_a_prompt_of_unknown_words_is_drawn_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["sample", "a Zeppelin in a forest, a zeppelin!", "a bear in a forest", "--steps", "1"]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    assert "words that nano never saw: zeppelin\n" in run.output
    assert len(list((tmp_path / "samples").glob("a-*.png"))) == 2


def test_words_are_those_of_the_captions_and_change_no_fingerprint(
    vlm: FrozenVLM, vlm_path: Path, tmp_path: Path
) -> None:
    assert vlm.unknown_words("a zeppelin") == []  # it lists no words, so nothing is claimed
    copy = shutil.copytree(vlm_path, tmp_path / "vlm")
    save_words(["A bear, two cats", "a merry-go-round"], copy)
    listing = copy / "words.json"
    assert json.loads(listing.read_text()) == ["a", "bear", "cats", "merry-go-round", "two"]
    listed = load_vlm(str(copy))
    assert listed.unknown_words("Two bears, a dog and a BEAR") == ["bears", "dog", "and"]
    assert listed.fingerprint == vlm.fingerprint
    listing.write_text("3")
    with pytest.raises(VugenError, match="not a JSON list"):
        load_vlm(str(copy))
