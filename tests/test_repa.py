"""Stage 2 with REPA: half of the expert's layers learn to tell z, and what is left is a sampler as any."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import vugen_here
from test_dit_expert import dit, wake
from test_training import changed, metrics
from torch import nn

from vugen_cli.checkpoint import load_checkpoint
from vugen_cli.engine.distributed import blocks
from vugen_cli.errors import VugenError
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.recipe import Recipe
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.stages.latent_cache import write_latents
from vugen_cli.stages.train_sampler import train_sampler, velocity_of
from vugen_cli.vlm.frozen import FrozenVLM

CPU = torch.device("cpu")


@pytest.fixture(params=["copy", "dit"])
def expert(request: pytest.FixtureRequest, vlm: FrozenVLM) -> Any:
    return wake(GenerationExpert(vlm.decoder, 4, (8, 8)) if request.param == "copy" else dit(vlm))


def test_z_is_told_from_what_half_of_the_layers_leave_and_the_velocity_is_the_same(
    expert: Any, vlm: FrozenVLM
) -> None:
    prefix, x, t = (
        vlm.prefix(["a bear", "a cat"], hidden=expert.reads),
        torch.randn(2, 8, 8, 4),
        torch.rand(2),
    )
    left: list[Any] = []
    layers = blocks(expert)
    layers[len(layers) // 2 - 1].register_forward_hook(lambda _m, _a, out: left.append(out))
    plain = expert(x, t, prefix)
    expert.alignment = nn.Identity()
    assert torch.equal(expert.eval()(x, t, prefix), plain)
    velocity, told = expert.train()(x, t, prefix)
    assert torch.equal(velocity, plain)
    states = left[-1][0] if isinstance(left[-1], tuple) else left[-1]
    assert torch.equal(told, states.unflatten(1, (8, 8)))


def test_rows_read_apart_tell_z_in_the_order_of_the_batch(expert: Any, vlm: FrozenVLM) -> None:
    expert.alignment = nn.Identity()
    expert.train()
    x, t = torch.randn(3, 8, 8, 4), torch.rand(3)
    prefixes = [vlm.prefix(prompts, hidden=expert.reads) for prompts in (["a bear", "a cat"], ["a tree"])]
    told: list[torch.Tensor] = []
    velocity = velocity_of(expert, [[0, 2], [1]], prefixes, x, t, told)
    for rows, prefix in (([0, 2], prefixes[0]), ([1], prefixes[1])):
        alone = expert(x[rows], t[rows], prefix)
        assert torch.equal(velocity[rows], alone[0]) and torch.equal(told[0][rows], alone[1])


def test_it_weighs_in_the_first_part_of_a_run_and_is_no_part_of_the_checkpoint(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = changed(tiny_recipe, "train_sampler.repa=0.5", "train_sampler.checkpoint_every=2")
    reducer = trained / "reducer.safetensors"
    path = train_sampler(recipe, reducer, scenes, tmp_path / "s.safetensors", CPU)
    rows = metrics(tmp_path / "s.run")
    for row in rows:
        weight = 0.5 if row["step"] < 0.6 * len(rows) else 0
        assert row["loss"] == pytest.approx(row["flow"] + weight * row["repa"], rel=1e-5)
    names = load_checkpoint(path)[0].keys()
    assert names == load_checkpoint(trained / "sampler.safetensors")[0].keys()
    assert next(load_sampler(path).sample(["a bear"]))[2].shape == (3, 64, 64)

    # Trained further it is taught no more, since the head would be new; a cache will do then.
    words = ["train-sampler", "--init", path, "--data", scenes, "--out", "f.safetensors"]
    further = vugen_here(*words, cwd=tmp_path)
    assert not further.returncode and "repa" not in metrics(tmp_path / "f.run")[0]

    # Stopped between two states, it goes on to the same bytes: the head is part of the state.
    (tmp_path / "s.run" / "state-0000004.safetensors").unlink()
    before = path.read_bytes()
    train_sampler(recipe, reducer, scenes, path, CPU)
    assert path.read_bytes() == before


def test_a_latent_cache_which_holds_no_z_is_refused(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    write_latents(trained / "reducer.safetensors", scenes, tmp_path / "z", CPU)
    recipe = changed(tiny_recipe, "train_sampler.repa=0.5")
    with pytest.raises(VugenError, match="train_sampler.repa: .*z holds z̃, and not the z that REPA teaches"):
        train_sampler(
            recipe, trained / "reducer.safetensors", tmp_path / "z", tmp_path / "s.safetensors", CPU
        )
    assert not list(tmp_path.glob("s.*"))
