"""Muon beside AdamW: what each takes, and what a step that is skipped or taken up again leaves."""

import copy
from pathlib import Path

import pytest
import torch
from test_engine import SETTINGS, Reads, run, stage
from test_networks import SMALL
from torch import nn

from vugen_cli.checkpoint import load_tensors
from vugen_cli.engine import optimizer
from vugen_cli.engine.optimizer import (
    MuonWithAdamW,
    block_matrices,
    make_optimizer,
    moments_of,
    parameter_groups,
    set_rate,
)
from vugen_cli.errors import VugenError
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.recipe import Training
from vugen_cli.vlm.frozen import FrozenVLM

MUON = SETTINGS.model_copy(update={"optimizer": "muon", "muon_lr": 0.01, "ema": 0.5})


class Network(nn.Module):
    """A layer before, two repeated ones with a norm and a bias, and a layer after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_in, self.proj_out = nn.Linear(4, 6), nn.Linear(6, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj_in(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.proj_out(x)


def give_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_the_matrices_of_the_layers_and_adamw_all_else() -> None:
    module = Network()
    apart = copy.deepcopy(module)
    matrices = [layer[1].weight for layer in apart.layers]  # type: ignore[index]
    rest = [p for p in apart.parameters() if all(p is not m for m in matrices)]
    theirs = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(parameter_groups(rest, 0.01), lr=1e-3, betas=(0.9, 0.98), fused=True),
    ]
    both = make_optimizer(module, MUON)
    for seed in (1, 2):
        give_gradients(module, seed)
        give_gradients(apart, seed)
        both.step()
        for one in theirs:
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), apart.parameters(), strict=True))


def test_only_linear_layers_of_blocks_are_orthogonalised(vlm: FrozenVLM) -> None:
    def names(module: nn.Module) -> set[str]:
        taken = {id(matrix) for matrix in block_matrices(module)}
        return {name for name, p in module.named_parameters() if id(p) in taken}

    kinds = ("modulation", "qkv", "proj", "ff_in", "ff_out")
    assert names(PixelDecoder(SMALL, 4)) == {f"mid.{i}.{kind}.weight" for i in (0, 1) for kind in kinds}
    of_expert = names(GenerationExpert(vlm.decoder, 4, (8, 8)))
    assert of_expert and all(name.startswith("decoder.layers.") for name in of_expert)
    assert {name.split(".")[-2] for name in of_expert} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_momentum(steps_before: int) -> None:
    module = Network()
    both = make_optimizer(module, MUON)
    for seed in range(steps_before):
        give_gradients(module, seed)
        both.step()
    weights = [p.detach().clone() for p in module.parameters()]
    moments = {key: {k: t.clone() for k, t in state.items()} for key, state in both.state.items()}
    give_gradients(module, 9)
    for parameter in module.parameters():
        assert parameter.grad is not None
        parameter.grad[0] = float("nan")
    both.found_inf = torch.ones(())  # type: ignore[attr-defined]
    both.step()
    assert all(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))
    for key, state in both.state.items():
        for name, tensor in state.items():
            assert torch.equal(tensor, moments[key][name] if steps_before else torch.zeros_like(tensor))
    give_gradients(module, 10)
    both.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    both.step()
    assert all(p.isfinite().all() for p in module.parameters())
    assert not any(torch.equal(p, w) for p, w in zip(module.parameters(), weights, strict=True))


def test_a_run_with_muon_that_is_taken_up_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    settings = MUON.model_copy(update={"steps": 6, "checkpoint_every": 3})
    whole = run(tmp_path / "r.run", stage(Network()), settings)
    (tmp_path / "r.run" / "state-0000006.safetensors").unlink()
    again = run(tmp_path / "r.run", stage(Network()), settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert len(list((tmp_path / "r.run").glob("state-*"))) == 2


@pytest.mark.parametrize("kinds", [("muon", "adamw"), ("adamw", "muon")])
def test_a_run_that_changes_its_optimiser_goes_on_with_the_moments_that_both_keep(
    tmp_path: Path, kinds: tuple[str, str]
) -> None:
    for steps, kind in enumerate(kinds, start=2):
        settings = MUON.model_copy(update={"steps": steps, "checkpoint_every": 1, "optimizer": kind})
        module = run(tmp_path / "r.run", stage(Network()), settings)
    tensors = load_tensors(tmp_path / "r.run" / "state-0000003.safetensors")
    found = {name.removeprefix("optimizer.") for name in tensors if name.startswith("optimizer.")}
    kept = moments_of(make_optimizer(module, settings))
    wanted = {f"{name}.{key}" for name, p in module.named_parameters() for key in kept[id(p)]}
    assert found == wanted
    counts = {int(tensor) for name, tensor in tensors.items() if name.endswith(".step")}
    assert counts == ({1, 3} if kinds[1] == "adamw" else {3})  # the matrices' begin anew


def test_a_step_of_muon_makes_no_momentum_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Network()
    both = make_optimizer(module, MUON)
    give_gradients(module, 0)
    both.step()
    monkeypatch.setattr(torch, "zeros_like", None)
    both.step()


def test_a_step_of_muon_reads_from_its_device_no_more_than_adamw(tmp_path: Path) -> None:
    counts = []
    for steps in (4, 14):
        with Reads() as reads:
            run(tmp_path / f"{steps}.run", stage(Network()), MUON.model_copy(update={"steps": steps}))
        counts.append(reads.count)
    assert counts[1] - counts[0] == 10


def test_a_rate_reaches_both_and_muons_own_stays_in_proportion() -> None:
    both = make_optimizer(Network(), Training(optimizer="muon", lr=1e-3, muon_lr=4e-3))
    assert isinstance(both, MuonWithAdamW)
    set_rate(both, 5e-4)
    assert [group["lr"] for group in both.adamw.param_groups] == [5e-4, 5e-4]
    assert [group["lr"] for group in both.muon.param_groups] == pytest.approx([2e-3])


def test_muon_refuses_what_it_cannot_orthogonalise(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VugenError, match="no matrices in repeated layers; set adamw"):
        make_optimizer(nn.Linear(4, 4), MUON)
    monkeypatch.setattr(optimizer, "DTensor", nn.Parameter)  # as if the weights were sharded
    with pytest.raises(VugenError, match=r"optimizer=muon .* whole matrices.*fsdp"):
        make_optimizer(Network(), MUON)
