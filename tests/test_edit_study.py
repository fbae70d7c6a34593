"""The study of edits: what is asked and what must stay, told from captions, and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import vugen_here

from vugen_cli.errors import VugenError
from vugen_cli.nano.edit_study import (
    _pixels_kept,
    asked_and_rest,
    by_reader,
    facts_of,
    holds,
    scene_of,
    score_edits,
)
from vugen_cli.nano.edits import EDITS, OpenMojiEdits, describe_edit
from vugen_cli.nano.judges import stacked
from vugen_cli.nano.painting import random_stream
from vugen_cli.nano.reader import load_reader
from vugen_cli.nano.scenes import canonical_caption
from vugen_cli.sampling.sampler import Sampler


@pytest.mark.parametrize("kind", EDITS)
def test_the_target_makes_the_change_and_the_source_does_not(kind: str) -> None:
    for i in range(30):
        before, after, _ = describe_edit("val", kind, random_stream("edit", kind, i))
        asked, rest = asked_and_rest(kind, before, after)
        assert asked and rest and ("setting", after["setting"]) in asked | rest
        assert all(holds(fact, after) for fact in asked | rest)
        assert not all(holds(fact, before) for fact in asked) and all(holds(fact, before) for fact in rest)


def test_a_canonical_caption_tells_its_scene() -> None:
    for kind in EDITS:
        for i in range(20):
            _, after, _ = describe_edit("train", kind, random_stream("told", kind, i))
            assert facts_of(scene_of(canonical_caption(after))) == facts_of(after)


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        ("a snowy place with three red cars", {("setting", "snow"), ("count", "car", 3)}),
        ("an orange ball on a beach", {("color", "ball", "orange"), ("count", "ball", 1)}),
        ("in the sea there are two fish", {("setting", "sea"), ("count", "fish", 2)}),
        ("a cat below a carrot", {("relation", "cat", "below", "carrot"), ("setting", None)}),
    ],
)  # fmt: skip
def test_other_captions_are_read_too(caption: str, facts: set[tuple[Any, ...]]) -> None:
    assert facts <= facts_of(scene_of(caption))


def test_a_relation_is_seen_from_either_side_and_nothing_said_holds_nothing() -> None:
    assert holds(("relation", "cat", "above", "dog"), scene_of("a dog below a cat in a forest"))
    assert not holds(("relation", "cat", "above", "dog"), scene_of("a cat below a dog in a forest"))
    beside = ("relation", "cat", "next to", "dog")
    assert holds(beside, scene_of("a dog to the left of a cat")) and not holds(
        beside, scene_of("a dog below a cat")
    )
    nothing = scene_of("")
    assert holds(("absent", "cat"), nothing) and not holds(("count", "cat", 1), nothing)
    assert not holds(("setting", "sea"), nothing)


def test_pixels_outside_the_change_are_those_that_source_and_target_share() -> None:
    source = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    target = source.clone()
    target[:, :, :4] = 200
    drawn = target.clone()
    drawn[0, :, 4:] += 6  # half of the picture is to be kept, and moves by 6
    drawn[:, :, :4] = 0
    score = _pixels_kept(drawn, source, target, target, {})
    assert score.value == 3.0 and score.parameters["real_target_decoded"] == 0


def test_judges_see_drawn_pictures_sources_and_targets(lively_sampler: Sampler, tmp_path: Path) -> None:
    with pytest.raises(VugenError, match="was trained on openmoji, and edits are asked of"):
        score_edits(lively_sampler, 2, tmp_path)
    card = lively_sampler.card.model_copy(deep=True)
    card.data.dataset = "openmoji + openmoji-edits"
    editor = Sampler(
        lively_sampler.vlm, lively_sampler.expert, lively_sampler.autoencoder, card, lively_sampler.path
    )
    known = {
        np.asarray(picture).tobytes(): sample.meta[key]
        for sample in (OpenMojiEdits(6, "val")[i] for i in range(6))
        for key, picture in (("scene", sample.image), ("source_scene", sample.sources[0]))
    }

    def see(images: torch.Tensor) -> list[dict[str, Any]]:
        return [known.get(i.permute(1, 2, 0).numpy().tobytes(), scene_of("")) for i in images]

    report = score_edits(editor, 6, tmp_path / "drawn", {"oracle": see}, guidance=2.0)
    by_metric = {score.metric: score for score in report.scores}
    everything = by_metric["edits_oracle_all_changed"]
    assert everything.parameters["source_as_it_is"] == 0 and everything.parameters["real_target"] == 100
    kept = by_metric["edits_oracle_all_kept"]
    assert kept.parameters["source_as_it_is"] == 100 and kept.value == 0, "noise shows nothing"
    assert by_metric["edits_pixels_outside"].value > 10
    page = (tmp_path / "drawn" / "edits.html").read_text()
    assert page.count("<h3>given</h3>") == 6


def test_the_independent_judges_see_what_real_targets_show() -> None:
    edits = [OpenMojiEdits(28, "val")[i] for i in range(28)]
    seen = by_reader(load_reader("strict"))(stacked([edit.image for edit in edits]))
    right = [
        holds(fact, scene)
        for edit, scene in zip(edits, seen, strict=True)
        for fact in facts_of(edit.meta["scene"])
    ]
    assert sum(right) / len(right) > 0.9


def test_the_command_asks_all_judges(edits: Path, trained: Path, tmp_path: Path) -> None:
    done = vugen_here(
        "train-sampler", "--init", trained / "sampler.safetensors", "--data", edits,
        "--out", "e.safetensors", "--steps", 1, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = vugen_here("study", "edits", "--sampler", "e.safetensors", "--count", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "edits.json").read_text())
    assert {"edits_strict_all_changed", "edits_captions_all_kept", "edits_pixels_outside"} <= {
        score["metric"] for score in report["scores"]
    }
    assert (tmp_path / "edits" / "samples.jsonl").is_file()
