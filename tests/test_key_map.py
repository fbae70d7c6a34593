"""Files of format 1, whose tensors had other names, load as if they had been written today."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training import changed
from torch import nn

from vugen_cli.checkpoint import fingerprint, load_checkpoint, read_card, read_header
from vugen_cli.key_map import TRAINED, new_name, old_name
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.models.reducer import Reducer
from vugen_cli.recipe import Decoder, Recipe
from vugen_cli.recipe import Reducer as ReducerRecipe
from vugen_cli.sampling.trained import load_sampler, save_sampler
from vugen_cli.stages.losses import Alignment
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.vlm.frozen import FrozenVLM

CPU = torch.device("cpu")


def as_format_1(source: Path, target: Path) -> Path:
    """Copy a checkpoint or a run's state as version 0.1 wrote it."""
    card = read_header(source)
    stage, _, state = card.stage.partition("-")
    tensors = {}
    for name, tensor in load_file(source).items():
        if state:
            kind, _, rest = name.partition(".")
            name = f"{'average' if kind == 'ema' else kind}.{old_name(rest, TRAINED[stage])}"
        else:
            name = old_name(name)
        tensors[name] = tensor
    old = card.model_dump(mode="json", exclude_none=True) | {"format": 1, "version": "0.1.0"}
    save_file(tensors, target, metadata={"vugen": json.dumps(old)})
    return target


def test_a_sampler_of_format_1_is_the_same_and_is_written_in_the_new_format(
    trained: Path, tmp_path: Path
) -> None:
    new = trained / "sampler.safetensors"
    old = as_format_1(new, tmp_path / "old.safetensors")
    with safe_open(old, "pt") as file:
        assert {"expert.inward.weight", "autoencoder.decoder.middle.0.table"} <= set(file.keys())
    before, after = load_checkpoint(old, "sampler")[0], load_checkpoint(new, "sampler")[0]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in after)
    save_sampler(load_sampler(old), tmp_path / "again.safetensors")
    assert read_card(tmp_path / "again.safetensors") == read_card(new)
    assert load_file(tmp_path / "again.safetensors").keys() == after.keys()


def test_a_run_that_format_1_saved_goes_on_as_if_nothing_had_been_renamed(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe, outs = changed(tiny_recipe, "train_reducer.steps=6"), []
    for name in ("old", "new"):
        run = tmp_path / f"{name}.run"
        shutil.copytree(trained / "reducer.run", run)
        (state,) = run.glob("state-*4.safetensors")
        if name == "old":
            as_format_1(trained / "reducer.run" / state.name, state)
        outs.append(train_reducer(recipe, scenes, tmp_path / f"{name}.safetensors", CPU))
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_every_name_is_told_apart_both_ways(vlm: FrozenVLM) -> None:
    recipe = Recipe.model_validate({"reducer": {"kind": "attention"}, "vlm": "x"})
    autoencoder = Autoencoder(recipe, 32)
    autoencoder.alignment = Alignment(recipe.decoder.channels[-1], 32)
    expert = GenerationExpert(vlm.decoder, 4, (8, 8))
    whole = nn.ModuleDict({"autoencoder": autoencoder, "expert": expert})
    names = set(whole.state_dict())
    old = {old_name(name) for name in names}
    assert len(old) == len(names) and {new_name(name) for name in old} == names
    assert {new_name(name) for name in names} == names  # nothing of today is taken for an old name


# What version 0.1 said of these weights, at commit c159c92.
FINGERPRINTS = {
    "autoencoder.reducer.": "3eb8205b490d772f6d07bf7fd4aef0a7e369ae08273c46287124f9bb28f2068b",
    "autoencoder.decoder.": "eafe2fea7aaa412dbea5a80750c02c577d3f76267a78860ab21c2c5da64ae0a9",
}


@pytest.mark.parametrize("within", FINGERPRINTS)
def test_fingerprints_are_those_that_old_caches_and_runs_recorded(within: str) -> None:
    if "reducer" in within:
        recipe = ReducerRecipe(kind="attention", channels=4, hidden=16, heads=2, layers=1)
        module: nn.Module = Reducer(recipe, 8)
    else:
        module = PixelDecoder(Decoder(channels=[8, 16], heads=2, middle_layers=1), 4)
    with torch.no_grad():
        for weight in module.state_dict().values():
            weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) / 64)
    assert fingerprint(module, within) == FINGERPRINTS[within] != fingerprint(module)
