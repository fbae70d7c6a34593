"""Weights and states that are shared out, in one process: torch's fake group plays the other ranks."""

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state as fsdp_state
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vugen_cli import processes
from vugen_cli.card import LatentsCard, StateCard
from vugen_cli.checkpoint import save_checkpoint
from vugen_cli.data.loader import Batch
from vugen_cli.engine import loop
from vugen_cli.engine.distributed import DataParallel, batch_statistics, blocks, fill, local, shard_frozen
from vugen_cli.engine.ema import EMA
from vugen_cli.engine.optimizer import make_optimizer
from vugen_cli.engine.sharded_state import Part, Stored, publish
from vugen_cli.engine.stage import Stage
from vugen_cli.engine.state import StateWriter, newest_state, of_state, resume, run_lock, save_state
from vugen_cli.errors import VugenError
from vugen_cli.flow import flow_matching_loss
from vugen_cli.recipe import Engine, Recipe, Training, load_recipe
from vugen_cli.sampling.trained import new_expert
from vugen_cli.seeds import BatchGenerator
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm

CPU = torch.device("cpu")
SETTINGS = Training(steps=4, batch_size=128, warmup=1, precision="float32")
FSDP = Engine(strategy="fsdp")


@contextlib.contextmanager
def job(rank: int, size: int) -> Iterator[None]:
    """This process as one of many; what the others would send it is made up."""
    as_started = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "none", "MASTER_PORT": "0"}
    before = {name: os.environ.get(name) for name in as_started}
    os.environ.update(as_started)
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with patch.object(processes, "_store", Mock()):
            yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it would take the next rank's mesh for this one's
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Net(nn.Module):
    """Three layers whose sizes no number of processes divides, and something around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(5))
        self.register_buffer("seen", torch.tensor(3.0))


def stage(module: nn.Module) -> Stage:
    return Stage("sampler", module, lambda *_: (torch.zeros(()), {}), Path.touch, {}, blocks(module))


class Collectives(TorchDispatchMode):
    """Writes down what is said between processes: what, over how many of them, and the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # what it does inside is seen then
            return NotImplemented
        name = func.name().rpartition("::")[2].split(".")[0]
        leaves = tree_leaves((args, kwargs))
        if func.namespace in ("c10d", "_c10d_functional") and group_size(leaves):
            shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))
            self.seen.append((name.strip("_"), group_size(leaves), shapes))
        return func(*args, **(kwargs or {}))


def group_size(leaves: list[Any]) -> int:
    """Processes of the group that an operation names; 0 for one that only waits."""
    for leaf in leaves:
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return dist.ProcessGroup.unbox(leaf).size()
        if isinstance(leaf, str) and leaf.isdigit():
            return dist.distributed_c10d._resolve_process_group(leaf).size()
    return 0


def say_sum(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does with a bucket of gradients; its own way wants results, which a fake group has not."""
    dist.all_reduce(bucket.buffer())
    done = torch.futures.Future[Tensor]()
    done.set_result(bucket.buffer())
    return done


def step(engine: Engine, vlm: FrozenVLM, recipe: Recipe) -> list[Any]:
    """The collectives of one step of stage 2, of which this process has two rows."""
    latents = LatentsCard(channels=4, grid=(2, 2), width=32)
    expert = new_expert(vlm, latents, recipe.expert, engine.strategy == "fsdp")
    layers = blocks(expert)
    if engine.shard_vlm:
        shard_frozen(vlm.model, engine, CPU)

    def loss(batch: Batch, generator: torch.Generator, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        prefix = vlm.prefix(batch.captions)
        z = batch.images
        mean, std = batch_statistics(z)
        z = (z - mean) / std
        return flow_matching_loss(lambda x, t: expert(x, t, prefix), z, torch.rand(len(z)), generator), {}

    def fill_from_vlm() -> None:
        weights = dict(vlm.decoder.named_parameters())
        for name, parameter in expert.decoder.named_parameters():
            fill(parameter, weights[name])

    sharded = engine.strategy == "fsdp"
    of = Stage("sampler", expert, loss, Path.touch, {}, layers, fill=fill_from_vlm if sharded else None)
    spread = DataParallel(of, engine, CPU, False)
    if spread.replicated:
        spread.network.register_comm_hook(None, say_sum)
    ema, optimizer = EMA(expert, 0.9), make_optimizer(expert, SETTINGS)
    stream = iter([Batch(torch.randn(1, 2, 2, 4), ["a cat"], [{}], corrupt=0) for _ in range(2)])
    recipe = recipe.model_copy(update={"engine": engine})
    taken = loop.Taken(0, 1e-3)
    with Collectives() as said:
        generator = BatchGenerator(CPU, SETTINGS.batch_size)
        sums = loop.gradients(taken, spread, stream, generator, recipe, CPU, contextlib.nullcontext)
        norm = nn.utils.clip_grad_norm_(expert.parameters(), 1.0)
        loop.agree(taken, sums, norm, False, engine.accumulate, CPU)
        optimizer.step()
        ema.update(0)
    return said.seen


def test_sixty_four_ranks_say_the_same_things_in_the_same_order(vlm_path: Path, tiny_recipe: Recipe) -> None:
    engines = {
        "ddp": Engine(accumulate=2),
        "fsdp": Engine(strategy="fsdp", accumulate=2, shard_vlm=True),
        "hsdp": Engine(strategy="fsdp", accumulate=2, mesh=(8, 8)),
    }
    counts = {}
    for name, engine in engines.items():
        heard = []
        for rank in (0, 1, 63):
            with job(rank, 64):
                heard.append(step(engine, load_vlm(str(vlm_path)), tiny_recipe))
        assert heard[0] == heard[1] == heard[2]
        counts[name] = Counter((what, size) for what, size, _ in heard[0])
    # Mean and deviation of the batch in both parts, losses and norm; the gradients in the last part alone.
    assert counts["ddp"] == {("broadcast", 64): 1, ("allreduce", 64): 2 * 2 + 1 + 1}
    # In each part: two layers and what is around them, there and back, and their gradients; the VLM's layers.
    assert counts["fsdp"] == {
        ("allgather_base", 64): 2 * (3 + 3 + 2),
        ("reduce_scatter_base", 64): 2 * 3,
        ("allreduce", 64): 2 * 2 + 1,
        ("all_reduce", 64): 1,  # the norm
    }
    # Weights travel among eight; replicas ema their gradients in the last part alone.
    assert counts["hsdp"] == {
        ("allgather_base", 8): 2 * (3 + 3),
        ("reduce_scatter_base", 8): 2 * 3,
        ("allreduce", 8): 3,
        ("allreduce", 64): 2 * 2 + 1,
        ("all_reduce", 8): 1,
    }


def saved(path: Path, engine: Engine, size: int, step: int = 1) -> dict[str, Tensor]:
    """Write a state as `size` processes would, and give what one process alone would have in it."""
    folder = path.with_name(f".{path.name}.x")
    card = StateCard(stage="sampler-state", step=step, resolved={})
    for rank in reversed(range(size)):
        with job(rank, size):
            part = Part(tensors(Net(), engine))
            part.write(folder)
            if rank == 0:
                publish(folder, path, part.of, card, threading.Event())
    return tensors(Net(), Engine())


def tensors(net: Net, engine: Engine) -> dict[str, Tensor]:
    """What is saved of a stage, sharded as this process is told."""
    of = stage(net)
    DataParallel(of, engine, CPU, False) if engine.strategy == "fsdp" else None
    ema, optimizer = EMA(net, 0.5), make_optimizer(net, SETTINGS)
    for number, parameter in enumerate(net.parameters()):
        moments = {"exp_avg": parameter.detach() * 2, "exp_avg_sq": parameter.detach() * 3}
        optimizer.state[parameter] = {"step": torch.tensor(float(number)), **moments}
    return of_state(of, ema, optimizer)


@pytest.mark.parametrize(("size", "mesh"), [(2, None), (3, None), (8, None), (4, (2, 2)), (6, (3, 2))])
def test_a_state_written_by_many_is_read_by_one_and_by_any_other_number(
    tmp_path: Path, size: int, mesh: tuple[int, int] | None
) -> None:
    path = tmp_path / "state-0000001"
    whole = saved(path, Engine(strategy="fsdp", mesh=mesh), size)
    shards = mesh[1] if mesh else size
    assert len(list(path.glob("*.safetensors"))) == shards and json.loads((path / "card.json").read_text())
    stored = Stored(path)
    assert stored.shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in whole.items())
    net = Net()
    assert resume(tmp_path, stage(net), EMA(net, 0.5), make_optimizer(net, SETTINGS)) == 1
    for rank in range(5):
        with job(rank, 5):
            mine = tensors(Net(), FSDP)
            for name, tensor in mine.items():
                expected = local(tensor).clone()
                assert torch.equal(local(stored.fill(torch.zeros_like(tensor), name)), expected)


def test_one_file_fills_shards_too(tmp_path: Path) -> None:
    path = tmp_path / "state-0000001.safetensors"
    save_checkpoint(path, tensors(Net(), Engine()), StateCard(stage="sampler-state", step=1, resolved={}))
    with job(1, 3):
        for name, tensor in tensors(Net(), FSDP).items():
            assert torch.equal(local(Stored(path).fill(torch.zeros_like(tensor), name)), local(tensor))


def test_torch_reads_these_folders_as_its_own(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    whole = saved(tmp_path / "state-0000001", FSDP, 3)
    read = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    reader = dcp.HuggingFaceStorageReader(str(tmp_path / "state-0000001"))
    dcp.load(read, storage_reader=reader, no_dist=True)
    assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())


def test_a_process_that_dies_while_a_state_is_saved_leaves_the_one_before(tmp_path: Path) -> None:
    saved(tmp_path / "state-0000001", FSDP, 2)
    net = Net()
    of = stage(net)

    def run() -> None:
        with StateWriter(tmp_path) as writer:
            DataParallel(of, FSDP, CPU, False)
            save_state(writer, of, EMA(net, 0.5), make_optimizer(net, SETTINGS), 2)
            raise RuntimeError("gloo: connection closed by peer")  # the second process is gone

    with job(0, 2), pytest.raises(RuntimeError, match="gloo"):
        run()
    (half,) = tmp_path.glob(".state-0000002.*")
    assert list(half.glob("*.safetensors"))
    assert newest_state(tmp_path) == tmp_path / "state-0000001"
    with run_lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["state-0000001"]


def test_a_part_that_cannot_be_written_ends_the_job_and_leaves_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, card = tmp_path / ".state-0000001.x", StateCard(stage="sampler-state", step=1, resolved={})
    with job(0, 2):
        first = Part(tensors(Net(), FSDP))
        first.write(folder)
    with job(1, 2), monkeypatch.context() as full:
        full.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        second = Part(tensors(Net(), FSDP))
        with pytest.raises(VugenError, match="No space left"):
            second.write(folder)
    with pytest.raises(VugenError, match="cannot write .*state-0000001: another process did not write"):
        publish(folder, tmp_path / "state-0000001", first.of, card, threading.Event())
    assert newest_state(tmp_path) is None


@pytest.mark.parametrize("damage", ["part", "cut", "card"])
def test_a_damaged_folder_falls_back_to_the_state_before(tmp_path: Path, damage: str) -> None:
    saved(tmp_path / "state-0000001", FSDP, 2)
    saved(tmp_path / "state-0000002", FSDP, 2, step=2)
    part = tmp_path / "state-0000002" / "00002-of-00002.safetensors"
    if damage == "part":
        part.unlink()
    elif damage == "cut":
        part.write_bytes(part.read_bytes()[:-8])
    else:
        (part.parent / "card.json").write_text("{")
    assert newest_state(tmp_path) == tmp_path / "state-0000001"


def test_the_two_newest_states_are_kept_whatever_their_kind(tmp_path: Path) -> None:
    saved(tmp_path / "state-0000001", FSDP, 2)
    with StateWriter(tmp_path) as writer:
        for step in (2, 3):
            writer.write({"w": torch.zeros(1)}, StateCard(stage="sampler-state", step=step, resolved={}))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"state-000000{i}.safetensors" for i in (2, 3)]


@pytest.mark.parametrize("mesh", [(4, 8), (1, 3)])
def test_a_mesh_for_another_number_of_processes_is_refused(mesh: tuple[int, int]) -> None:
    engine = Engine(strategy="fsdp", mesh=mesh)
    with pytest.raises(
        VugenError, match=r"engine.mesh \[\d, \d\] is for \d+ processes, and this job has 1: "
    ):
        DataParallel(stage(Net()), engine, CPU, False)
    with job(0, 4), pytest.raises(VugenError, match="this job has 4"):
        DataParallel(stage(Net()), engine, CPU, False)


def test_a_mesh_without_fsdp_is_refused() -> None:
    with pytest.raises(VugenError, match="engine.mesh is for shares of weights: set engine.strategy=fsdp"):
        load_recipe(None, ["engine.mesh=[2,2]"])


def test_an_expert_of_shards_has_the_weights_that_a_whole_one_has(vlm: FrozenVLM) -> None:
    latents, whole = LatentsCard(channels=4, grid=(2, 2), width=32), {}
    for shards in (False, True):
        torch.manual_seed(0)
        expert = new_expert(vlm, latents, Recipe().expert, shards)
        if not shards:
            whole = dict(expert.named_parameters())
    assert {p.device.type for p in expert.decoder.parameters()} == {"meta"}
    weights = {name: p for name, p in vlm.decoder.named_parameters() if "embed_tokens" not in name}
    with job(1, 3):
        of = stage(expert)
        of.fill = lambda: [fill(p, weights[name]) for name, p in expert.decoder.named_parameters()]
        DataParallel(of, FSDP, CPU, False)
        for name, parameter in expert.named_parameters():
            assert torch.equal(local(parameter), local(fill(torch.empty_like(parameter), whole[name])))
            assert parameter.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_vlm_is_gathered_under_one_root_for_each_stack_of_layers(
    vlm_path: Path, dtype: Literal["float32", "bfloat16"]
) -> None:
    vlm = load_vlm(str(vlm_path), recipe=Recipe(vlm_dtype=dtype))
    with job(0, 2):
        shard_frozen(vlm.model, FSDP, CPU)
        vlm.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        vlm.prefix(["a cat"])
        roots = [n for n, m in vlm.model.named_modules() if getattr(fsdp_state(m), "_is_root", False)]
    assert roots == ["model.vision_tower.encoder", "model.language_model"]
    kept = {n for n, p in vlm.model.named_parameters() if not isinstance(p, DTensor)}
    assert not any(".layers." in name for name in kept) and any("embed_tokens" in name for name in kept)
    assert {p.dtype for p in vlm.model.parameters()} == {getattr(torch, dtype)}
