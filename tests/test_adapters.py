"""Adapters: small, the same merged or not, resumed exactly, and refused where they do not belong."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import vugen_here
from torch import Tensor

from vugen_cli.card import AdapterCard
from vugen_cli.checkpoint import load_checkpoint, load_tensors, read_header, save_checkpoint, select
from vugen_cli.engine.sharded_state import Stored
from vugen_cli.errors import VugenError
from vugen_cli.files import bundle
from vugen_cli.models.dit_expert import DiTExpert
from vugen_cli.sampling.adapters import inject, parse, with_adapters
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.sampling.trained import load_sampler, merge

BUNDLED = bundle("sampler.safetensors")
MATRIX = "expert.decoder.layers.0.self_attn.v_proj.weight"
PROMPT = ["a bear in a forest"]


def trained_here(rank: int, base: Path, scenes: Path, out: Path, *more: str) -> None:
    sets = ("train_sampler.lr=0.02", "train_sampler.warmup=1", "sampling.steps=1", "data.workers=0", *more)
    words = ["train-sampler", "--adapter", str(rank), "--init", base, "--data", scenes, "--out", out]
    words += ["--steps", "4", "--batch-size", "2", *(w for s in sets for w in ("--set", s))]
    result = vugen_here(*words, cwd=out.parent)
    assert result.returncode == 0, result.stderr


def test_the_words_that_wrap_a_prompt_are_its_samplers(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("vlm: nano\ntrain_sampler: {steps: 1, batch_size: 2}\n")
    words = ["train-sampler", "--adapter", "4", "--init", BUNDLED, "--data", scenes, "--recipe", "mine.yaml"]
    words += ["--set", "data.workers=0", "--out", "a.safetensors"]
    result = vugen_here(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_header(tmp_path / "a.safetensors").recipe["instruction"] == "{prompt} {prompt}"
    for change in ("instruction='{prompt}'", "reducer.channels=8", "decoder.preset=S", "vlm_size=32"):
        refused = vugen_here(*words, "--set", change, cwd=tmp_path)
        assert refused.returncode == 1 and f"--set cannot change {change.split('=')[0].split('.')[0]}" in (
            refused.stderr
        )


def test_what_is_merged_is_not_written_over(adapter: Path) -> None:
    before = adapter.read_bytes()
    with pytest.raises(VugenError, match="is one of the files to merge"):
        merge(BUNDLED, [f"{adapter}:0.5"], adapter)
    assert adapter.read_bytes() == before


@pytest.fixture(scope="module")
def adapter(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps on the bundled sampler: enough to change its pictures."""
    out = tmp_path_factory.mktemp("adapter") / "mine.safetensors"
    trained_here(16, BUNDLED, scenes, out)
    return out


def drawn(sampler: Sampler) -> Tensor:
    return torch.stack([image for *_, image in sampler.sample(PROMPT, 1, steps=3)]).int()


def test_an_adapter_is_a_fiftieth_of_its_sampler_and_holds_no_weight_of_it(adapter: Path) -> None:
    assert adapter.stat().st_size < 0.02 * BUNDLED.stat().st_size
    card = read_header(adapter)
    assert isinstance(card, AdapterCard) and (card.rank, card.step, card.base.name) == (16, 4, "nano")
    assert {name.split(".")[-2] for name in load_tensors(adapter)} == {"lora_A", "lora_B"}


def test_pictures_agree_whether_it_is_beside_the_weights_added_or_merged(
    adapter: Path, tmp_path: Path
) -> None:
    base, beside = load_sampler(), load_sampler()
    inject(beside.expert, 16)
    own = {
        n.replace(".weight", ".default.weight"): t for n, t in select(load_tensors(adapter), "expert").items()
    }
    assert not beside.expert.load_state_dict(own, strict=False).unexpected_keys
    merge(BUNDLED, [str(adapter)], tmp_path / "merged.safetensors")
    pictures = [drawn(s) for s in (beside, load_sampler(adapters=[str(adapter)]))]
    merged = load_sampler(tmp_path / "merged.safetensors")
    assert (pictures[0] - pictures[1]).abs().max() <= 1
    assert torch.equal(pictures[1], drawn(merged))
    assert (pictures[1] - drawn(base)).abs().max() > 20
    assert merged.card.adapters == [str(adapter)]


def test_several_add_up_by_their_weights(adapter: Path) -> None:
    base, _ = load_checkpoint(BUNDLED)
    whole = with_adapters(base, [str(adapter)], BUNDLED)
    halves = with_adapters(base, [f"{adapter}:0.5", f"{adapter}:0.5"], BUNDLED)
    none = with_adapters(base, [f"{adapter}:1", f"{adapter}:-1"], BUNDLED)
    assert not torch.equal(whole[MATRIX], base[MATRIX])
    for got, wanted in ((halves, whole), (none, base)):
        assert all(torch.allclose(t.float(), wanted[n].float(), atol=1e-6) for n, t in got.items())


@pytest.mark.parametrize(
    ("given", "read"),
    [("a.safetensors:0.8", ("a.safetensors", 0.8)), ("a", ("a", 1.0)), ("c:/a", ("c:/a", 1.0))],
)
def test_a_weight_follows_a_colon(given: str, read: tuple[str, float]) -> None:
    assert parse(given) == read


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf"])
def test_a_weight_is_a_finite_number(weight: str) -> None:
    with pytest.raises(VugenError, match=f"{weight} is no weight"):
        parse(f"a.safetensors:{weight}")


def test_a_killed_run_goes_on_to_the_same_bytes_from_a_state_of_the_adapter_alone(
    trained: Path, scenes: Path, tmp_path: Path
) -> None:
    straight, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    trained_here(4, trained / "sampler.safetensors", scenes, straight, "train_sampler.checkpoint_every=2")
    state = Stored(tmp_path / "a.run/state-0000004.safetensors")
    kinds = {name.partition(".")[0] for name in state.shapes}
    assert kinds >= {"module", "ema", "optimizer"}
    assert all(".lora_" in name for name in state.shapes if not name.startswith("buffer."))
    shutil.copytree(tmp_path / "a.run", tmp_path / "b.run", ignore=shutil.ignore_patterns("state-0000004*"))
    trained_here(4, trained / "sampler.safetensors", scenes, again, "train_sampler.checkpoint_every=2")
    assert straight.read_bytes() == again.read_bytes()
    assert (tmp_path / "a.run/preview-0000004.png").is_file()


def test_another_base_is_refused_with_both_names(adapter: Path, trained: Path) -> None:
    other = trained / "sampler.safetensors"
    with pytest.raises(
        VugenError, match=rf"adapter of nano \(\w{{12}}\), but this sampler is {other} \(\w{{12}}\)"
    ):
        load_sampler(other, adapters=[str(adapter)])


def test_what_is_no_adapter_of_this_shape_is_refused(adapter: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(VugenError, match="is a sampler checkpoint: --adapter takes"):
        load_sampler(adapters=[str(trained / "sampler.safetensors")])
    with pytest.raises(VugenError, match=r"is an adapter: .*draw with it by --adapter"):
        load_sampler(adapter)
    tensors = {n: t[:, :-1] if "lora_A" in n else t for n, t in load_tensors(adapter).items()}
    save_checkpoint(tmp_path / "cut.safetensors", tensors, read_header(adapter))
    with pytest.raises(VugenError, match=r"cut.safetensors is damaged: expert\.decoder.*does not fit"):
        load_sampler(adapters=[str(tmp_path / "cut.safetensors")])
    result = vugen_here("train-sampler", "--adapter", "4", "--reducer", BUNDLED, cwd=tmp_path)
    assert "give --init alone" in result.stderr


def test_beside_a_dit_it_changes_nothing_at_first_and_alone_is_trained() -> None:
    torch.manual_seed(0)
    expert = DiTExpert(4, reads=[0, 1], prompt_width=32, width=64, heads=2)
    whole = {n for n, _ in expert.named_parameters()}
    with pytest.raises(VugenError, match="are of rank 32"):
        inject(expert, 32)
    inject(expert, 4)
    trained = {n: p for n, p in expert.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in trained} == {"qkv", "prompt_kv", "proj"}
    assert all((p == 0).all() for n, p in trained.items() if "lora_B" in n)
    assert {n.replace(".base_layer", "") for n, _ in expert.named_parameters() if n not in trained} == whole


def test_adapters_are_said_in_the_listing(adapter: Path, tmp_path: Path) -> None:
    words = ["sample", *PROMPT, "--steps", "1", "--sampler", BUNDLED, "--adapter", f"{adapter}:0.5"]
    assert vugen_here(*words, cwd=tmp_path).returncode == 0
    assert f'"adapters": ["{adapter}:0.5"]' in (tmp_path / "samples/samples.jsonl").read_text()


def test_eight_bits_keep_the_pictures_and_a_third_of_the_memory() -> None:
    """At 25 steps it is 43.5 dB between the two; 51 MB of weights become 15 (docs/adapters.md)."""
    sampler = load_sampler()
    before = drawn(sampler)
    sampler.quantize()
    after = drawn(sampler)
    error = np.square((before - after).numpy()).mean()
    assert 0 < error < 255**2 / 10**3.5  # over 35 dB
    linear = next(m for n, m in sampler.expert.named_modules() if n.endswith("q_proj"))
    assert linear.weight.qdata.dtype == torch.int8


def test_nothing_to_merge_is_one_line(tmp_path: Path) -> None:
    result = vugen_here("merge", BUNDLED, "--out", tmp_path / "merged.safetensors", cwd=tmp_path)
    assert result.returncode == 1 and "nothing to merge: give --adapter FILE, or --decoder" in result.stderr
    assert not list(tmp_path.iterdir())
