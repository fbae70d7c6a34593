"""Stage 2 with captions and their opposites: which there are, what the contrast is, and a run with it."""

from pathlib import Path

import pytest
import torch
from test_pictured import noise
from test_training import changed, metrics

from vugen_cli.data.loader import Batch
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Recipe
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.stages.opposites import EARLY, MARGIN, contrast, early, opposite
from vugen_cli.stages.train_sampler import cut_prompt, opposites_of, train_sampler
from vugen_cli.vlm.frozen import FrozenVLM
from vugen_cli.vlm.prompts import Prompt

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("caption", "other"),
    [
        ("a bear to the left of a car", "a bear to the right of a car"),
        ("Above a tree, to the RIGHT", "below a tree, to the left"),
        ("the left one, above a tree", "the right one, below a tree"),
        ("a bear right next to what is left of a cake, in broad daylight", None),
        ("trees on the left and on the right of a door", None),
        ("", None),
    ],
)
def test_sides_are_exchanged_for_their_opposites(caption: str, other: str | None) -> None:
    assert opposite(caption) == other
    assert not other or opposite(other) == caption.lower()


def test_the_contrast_is_what_the_opposite_is_short_of_the_margin() -> None:
    target = torch.randn(3, 4, 4, 2, dtype=torch.float64)
    off = torch.randn_like(target)
    told = target + off
    error = off.square().mean((1, 2, 3))
    times = torch.tensor([1.0, 1.1, 3.0], dtype=torch.float64)  # the opposite's error
    opposed = target + off * times.sqrt().view(3, 1, 1, 1)
    short = contrast(told.float(), opposed.float(), target)
    assert torch.allclose(short, (MARGIN - (times - 1)).clamp_min(0), atol=1e-5)
    assert error.min() > 0 and short[1] == pytest.approx(MARGIN - 0.1, abs=1e-5) and short[2] == 0


def test_its_slope_leads_to_the_true_velocity_with_the_caption_and_away_from_it_with_the_opposite() -> None:
    target, told = torch.zeros(1, 2, 2, 1), torch.ones(1, 2, 2, 1, requires_grad=True)
    opposed = torch.ones(1, 2, 2, 1, requires_grad=True)
    contrast(told, opposed, target).sum().backward()
    assert (told.grad > 0).all() and (opposed.grad < 0).all()  # type: ignore[operator]  # steps go against it


def test_rows_have_an_opposite_whose_time_is_early_and_whose_text_was_kept(vlm: FrozenVLM) -> None:
    pictures = tuple(noise(1))
    left, right = "a bear to the left of a car", "a bear to the right of a car"
    place = "put {image} on the left"
    tokens = vlm.prompts.tokens
    captions = [left, left, "a bear", left, place, place]
    asked = [tokens(left), tokens(left), tokens("a bear"), ""]
    asked += [Prompt(place, pictures), Prompt("", pictures)]
    batch = Batch(torch.empty(6), captions, [], 0, None, 0, [[]] * 4 + [list(pictures)] * 2)
    t = torch.tensor([0.0, EARLY, 0.1, 0.1, 0.2, 0.2])
    found = opposites_of(batch, asked, t, vlm.prompts)
    assert early(t) == [0, 2, 3, 4, 5]
    assert list(found) == [0, 4] and found[0] == tokens(right)
    edit = found[4]
    assert isinstance(edit, Prompt) and edit.text == "put {image} on the right" and edit.pictures == pictures


def test_a_side_that_is_cut_off_makes_no_opposite(vlm: FrozenVLM) -> None:
    caption = "very " * 300 + "to the left"
    tokens = vlm.prompts.caption_tokens(caption)[0]
    pictures = (torch.zeros(3, 64, 64, dtype=torch.uint8),)
    edit = cut_prompt(caption, pictures, vlm.prompts)
    batch = Batch(torch.empty(2), [caption] * 2, [], 0, None, 0, [[], list(pictures)])
    assert not opposites_of(batch, [tokens, edit], torch.zeros(2), vlm.prompts)


def test_images_are_not_mirrored_where_sides_are_taught(tiny_recipe: Recipe) -> None:
    with pytest.raises(VugenError, match="data.flip mirrors what train_sampler.opposites teaches"):
        changed(tiny_recipe, "data.flip=true", "train_sampler.opposites=1")


def test_a_run_logs_it_and_weighs_it_and_resumes_to_the_same_bytes(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    settings = ["batch_size=16", "checkpoint_every=2", "opposites=2", "prompt_dropout=0"]
    recipe = changed(tiny_recipe, *(f"train_sampler.{setting}" for setting in settings))
    reducer = trained / "reducer.safetensors"
    path = train_sampler(recipe, reducer, scenes, tmp_path / "s.safetensors", CPU)
    rows = metrics(tmp_path / "s.run")
    for row in rows:
        assert row["loss"] == pytest.approx(row["flow"] + 2 * row["opposites"], rel=1e-5)
        assert 0 <= row["opposites"] <= MARGIN + 1e-6  # of a fresh expert, which reads no word yet
    assert max(row["opposites"] for row in rows) > 0
    assert next(load_sampler(path).sample(["a bear"]))[2].shape == (3, 64, 64)
    (tmp_path / "s.run" / "state-0000004.safetensors").unlink()
    before = path.read_bytes()
    train_sampler(recipe, reducer, scenes, path, CPU)
    assert path.read_bytes() == before
