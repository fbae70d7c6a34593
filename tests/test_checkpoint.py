"""Checkpoints: round trip, atomicity, and refusals."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import make_card

from vugen_cli.card import StateCard
from vugen_cli.checkpoint import load_checkpoint, read_card, save_checkpoint, select, with_prefix
from vugen_cli.engine.sharded_state import Stored
from vugen_cli.errors import VugenError
from vugen_cli.version import __version__

TENSORS = {"a.w": torch.randn(3, 4), "a.b": torch.arange(3), "b.h": torch.randn(2).half()}


def test_tensors_and_card_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, TENSORS, make_card())
    tensors, card = load_checkpoint(path, "reducer")
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
        for name, tensor in TENSORS.items()
    )
    assert read_card(path) == card == make_card(version=__version__)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_checkpoint(tmp_path / f"{name}.safetensors", TENSORS, make_card())
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_prefixes_are_undone() -> None:
    assert select(with_prefix({"w": TENSORS["a.w"]}, "a"), "a").keys() == {"w"}


def test_another_stage_is_refused_with_the_command_to_run(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, TENSORS, make_card())
    with pytest.raises(
        VugenError, match="is a reducer checkpoint, but a sampler is needed here.*train-sampler"
    ):
        load_checkpoint(path, "sampler")


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 100, struct.pack("<Q", 10) + b"not json!!", struct.pack("<Q", 4) + b"[1,2"],
)
def test_what_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(VugenError, match="not a readable safetensors file"):
        read_card(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, TENSORS, make_card())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(VugenError, match="damaged"):
        load_checkpoint(path)


def test_a_file_of_another_tool_and_a_newer_format_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    with pytest.raises(VugenError, match="not written by vugen"):
        read_card(path)
    save_file(TENSORS, path, metadata={"vugen": json.dumps({"format": 99})})
    with pytest.raises(VugenError, match="newer than this vugen"):
        read_card(path)
    with pytest.raises(VugenError, match="no checkpoint at"):
        read_card(tmp_path / "none")


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"stage": "reducer"}, "step: Field required"),
        ({**make_card().model_dump(), "latents": {"grid": [8]}}, r"latents\.channels"),
        ({**make_card().model_dump(), "step": "many"}, "step: Input should be a valid integer"),
        ([1, 2], "the card of .* is damaged"),
    ],
)
def test_a_damaged_card_is_refused_with_its_key(tmp_path: Path, card: object, said: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"vugen": json.dumps(card)})
    with pytest.raises(VugenError, match=said):
        read_card(path)


def test_keys_that_a_later_version_adds_are_passed_over(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"vugen": json.dumps({**make_card().model_dump(), "mood": "good"})})
    assert read_card(path) == make_card()


def test_a_state_is_no_checkpoint_and_a_checkpoint_no_state(tmp_path: Path) -> None:
    whole, state = tmp_path / "x.safetensors", tmp_path / "s.safetensors"
    save_checkpoint(whole, TENSORS, make_card())
    save_checkpoint(
        state, TENSORS, StateCard(stage="reducer-state", step=3, resolved={"data": {"path": "x"}})
    )
    assert Stored(state).card.resolved == {"data": {"path": "x"}}
    with pytest.raises(VugenError, match="s.safetensors is a reducer-state checkpoint: a sampler is needed"):
        load_checkpoint(state, "sampler")
    with pytest.raises(VugenError, match="is a reducer checkpoint: the state of a run is needed"):
        Stored(whole)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, TENSORS, make_card())
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(VugenError, match="No space left on device"):
        save_checkpoint(path, TENSORS, make_card("sampler"))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
