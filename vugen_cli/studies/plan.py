"""What a recipe would take on given GPUs: parameters, memory, FLOPs, time and disk, from configs alone.

Every network is built on `meta` and its training step run on fake tensors (`fake_step`), so parameters are
exact, FLOPs are torch's own count, and memory is what the step would hold. Time is FLOPs over peak and MFU,
which is the one number that is assumed.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import pydantic.dataclasses
import torch
from pydantic import Field
from torch import Tensor, nn

from vugen_cli.data.manifest import read_manifest
from vugen_cli.engine.distributed import blocks
from vugen_cli.engine.optimizer import block_matrices
from vugen_cli.engine.profiling import PEAKS
from vugen_cli.errors import VugenError
from vugen_cli.flow import Solver, solve
from vugen_cli.recipe import Recipe, Training
from vugen_cli.stages.train_vae import VAETraining
from vugen_cli.studies.fake_networks import FakeNetworks, in_bfloat16, is_vae_to_train
from vugen_cli.studies.fake_step import Cost, faked

# Memory in GB (10^9 bytes) and dense bfloat16 FLOP/s, from NVIDIA's data sheets; of SXM cards where there are
# several.
GPUS = {
    "b200": (180, PEAKS["B200"]),
    "h200": (141, PEAKS["H200"]),
    "h100": (80, PEAKS["H100"]),
    "a100-80": (80, PEAKS["A100"]),
    "a100-40": (40, PEAKS["A100"]),
    "l40s": (48, PEAKS["L40S"]),
    "l4": (24, PEAKS["L4"]),
    "4090": (24, PEAKS["RTX 4090"]),
}
RESERVED = 3e9  # bytes of a GPU for CUDA's context, NCCL, cuBLAS and fragmentation; assumed
LAUNCH = 5e-6  # seconds to start a kernel
LINK = 50e9  # bytes/s of a GPU to other nodes: InfiniBand of 400 Gbit/s
STRATEGIES = ("ddp", "fsdp", "hsdp")
PIXEL_BYTES = 0.7  # of photographs at 256 px, JPEG of quality 95
STATE_BYTES = 16  # of a trained weight: itself, its average and two moments, in float32
TAR_BLOCK = 512


@pydantic.dataclasses.dataclass(frozen=True)
class Machine:
    """The GPUs of a plan."""

    gpu: str = Field(description="their kind")
    gpus: int = Field(description="how many")
    nodes: int = Field(description="on how many machines")
    mfu: float = Field(description="share of their peak that training is taken to reach")

    @property
    def memory(self) -> float:
        """Bytes of a GPU that training may use."""
        return GPUS[self.gpu][0] * 1e9 - RESERVED

    @property
    def flops(self) -> float:
        """FLOP/s of a GPU in training."""
        return GPUS[self.gpu][1] * self.mfu

    def shards(self, strategy: str, mesh: tuple[int, int] | None = None) -> int:
        """GPUs that share one copy of what is sharded; hsdp within a node, or as `engine.mesh` says."""
        within = mesh[1] if mesh else self.gpus // self.nodes
        return {"ddp": 1, "fsdp": self.gpus, "hsdp": within}[strategy]


@dataclass
class Work:
    """A stage as networks.

    Attributes:
        module: what it trains.
        vlm: the VLM, if the stage needs it.
        frozen: what else is on the GPU and in the finished checkpoint.
        cost: of a step.
        layers: of the module, which fsdp shares out; none where a stage is always replicated.
    """

    name: str
    settings: Training
    module: nn.Module
    vlm: nn.Module | None
    frozen: list[nn.Module]
    cost: Cost
    layers: list[nn.Module] = field(default_factory=list)


@pydantic.dataclasses.dataclass
class Memory:
    """Bytes of a GPU while a stage trains."""

    weights: float = Field(description="what is trained, or this GPU's share of it")
    gradients: float = Field(description="of those")
    optimiser: float = Field(description="of those")
    average: float = Field(description="of those")
    frozen: float = Field(description="the VLM, and in stage 2 reducer and decoder")
    in_flight: float = Field(description="layers gathered just before they are used")
    activations: float = Field(
        description="what a micro-batch holds at its worst moment, temporaries and autocast's copies included"
    )
    total: float = Field(description="their sum")
    largest: int = Field(description="the largest micro-batch that fits; 0 if none does")


@pydantic.dataclasses.dataclass
class StagePlan:
    """What a stage takes."""

    name: str = Field(description="the command")
    parameters: int = Field(description="that it trains")
    steps: int = Field(description="as in the recipe")
    batch_size: int = Field(description="as in the recipe")
    micro_batch: int = Field(description="images a GPU at a time")
    flops: float = Field(description="of an image: forward, backward, and the frozen networks")
    memory: dict[str, Memory] = Field(description="by strategy (`ddp`, `fsdp`, `hsdp`), at the micro-batch")
    images_per_s: float = Field(description="of all GPUs together")
    days: float = Field(description="of all its steps")
    gpu_hours: float = Field(description="of all its steps")
    checkpoint_bytes: float = Field(description="on disk: two states and the checkpoints that stay")


@pydantic.dataclasses.dataclass
class PassPlan:
    """What something takes that trains nothing; on all GPUs, each with its own images."""

    name: str = Field(description="what is done")
    flops: float = Field(description="of an image")
    images_per_s: float = Field(description="of all GPUs together")


@pydantic.dataclasses.dataclass
class Plan:
    """All that `vugen plan` says: plain values, in bytes, FLOPs and seconds."""

    recipe: str = Field(description="its name")
    vlm: str = Field(description="its name")
    machine: Machine = Field(description="the GPUs")
    image_size: int = Field(description="pixels a side")
    z: list[int] = Field(description="its shape: height, width, channels")
    latents: list[int] = Field(description="that of z̃")
    prompt_tokens: int = Field(description="the longest prompt's text")
    sources: int = Field(description="source pictures in a prompt, at most; 0 without edits in the mixture")
    picture_tokens: int = Field(description="of a source picture in a prompt; 0 without edits in the mixture")
    images: int | None = Field(description="of the data set; null where that is not known")
    parameters: dict[str, int] = Field(description="by network")
    stages: list[StagePlan] = Field(description="one object a stage")
    passes: list[PassPlan] = Field(description="one object for each thing that trains nothing")
    disk: dict[str, float] = Field(description="bytes, by what is stored")
    problems: list[str] = Field(description="what will not work")
    notes: list[str] = Field(description="what is worth knowing")


def make_plan(recipe: Recipe, machine: Machine, images: int | None = None) -> Plan:
    """Plan a whole run.

    Args:
        recipe: its `vlm` may be all that `configured_vlm` takes.
        machine: where it shall run.
        images: of the data set; default those of the recipe's mixture, where it is there.

    Raises:
        VugenError: there is no such GPU, the GPUs cannot be shared out, or the networks cannot be built.
    """
    if machine.gpu not in GPUS:
        raise VugenError(f"--gpu {machine.gpu}: known are {', '.join(GPUS)}")
    if machine.gpus % machine.nodes:
        raise VugenError(f"{machine.gpus} GPUs cannot be shared out evenly over {machine.nodes} nodes")
    known = data_of(recipe)
    images = images or known.images
    side = recipe.decoder.image_size or known.size
    networks = FakeNetworks(recipe, side, recipe.prompt_tokens)
    multiple = networks.autoencoder.decoder.multiple
    problems: list[str] = []
    if side % multiple:
        networks.size = max(1, side // multiple) * multiple
        problems.append(
            f"images of {side} px: the decoder needs a multiple of {multiple}; planned at {networks.size} px"
        )
    notes = []
    if known.sources:
        try:
            notes.append(
                f"train-sampler: {known.edits:.0%} of the samples are edits, taken to have {known.sources} "
                f"source pictures of {networks.picture_tokens} tokens each; memory is that of edits alone"
            )
        except VugenError as error:
            notes.append(f"source pictures of edits are left out: {error}")
            known = known._replace(sources=0)
    works = list(stages(recipe, networks, known.sources, known.edits))
    passes, encoding = passes_of(recipe, networks, machine)
    planned = [stage_plan(work, recipe, machine) for work in works]
    if not recipe.train_sampler.repa:  # which reads images
        planned.append(spared(planned[-1], encoding))
    each = known.bytes or PIXEL_BYTES * side**2
    disk = {
        "data": each * (images or 1e6),
        "latents": latent_bytes(networks.latents, recipe.data.flip) * (images or 1e6),
        "checkpoints": sum(stage.checkpoint_bytes for stage in planned),
    }
    notes += [
        f"memory is that of uncompiled networks; {RESERVED / 1e9:.0f} GB of a GPU are left to CUDA and NCCL"
    ]
    if not images:
        notes.append("disk of data and latents is that of 1,000,000 images: say how many with --images")
    if not recipe.decoder.image_size:
        notes.append(f"decoder.image_size is not set: images are taken to have {side} px")
    notes += [note for work in works for note in slow(work, recipe, machine)]
    if recipe.engine.mesh and (meant := math.prod(recipe.engine.mesh)) != machine.gpus:
        problems.append(
            f"engine.mesh={list(recipe.engine.mesh)} is for {meant} GPUs, not {machine.gpus}: "
            f"replicas x shards must be all of them, as in [{machine.nodes},{machine.gpus // machine.nodes}]"
        )
    problems += [problem for work in works for problem in stage_problems(work, recipe, machine)]
    return Plan(
        recipe=recipe.name,
        vlm=recipe.vlm,
        machine=machine,
        image_size=networks.size,
        z=networks.z,
        latents=networks.latents,
        prompt_tokens=networks.prompt_tokens,
        sources=known.sources,
        picture_tokens=networks.picture_tokens if known.sources else 0,
        images=images,
        parameters=parameters(networks),
        stages=planned,
        passes=passes,
        disk=disk,
        problems=problems,
        notes=notes,
    )


def stages(recipe: Recipe, networks: FakeNetworks, sources: int = 0, edits: float = 0.0) -> Iterator[Work]:
    """The stages of a recipe, in order; a VAE is trained where it is not there yet.

    Args:
        recipe: the whole run's.
        networks: its own.
        sources: pictures that an edit is made from.
        edits: share of stage 2's samples that are such. Its memory is that of a batch of edits alone.
    """
    vlm, expert = networks.vlm.model, networks.expert
    vae = [networks.vae.model] if networks.vae else []
    if is_vae_to_train(recipe):
        pictures = networks.picture_losses(recipe.vae.losses)
        sees = "perceptual" in pictures
        with torch.device("meta"):
            training = VAETraining(recipe.vae, pictures, networks.vlm if sees else None)
        training = faked(training)
        cost = networks.vae_cost(training)
        yield Work("train-vae", recipe.train_vae, training, vlm if sees else None, [], cost)
    if recipe.reducer.kind != "vae":
        cost = networks.reducer_cost()
        yield Work("train-reducer", recipe.train_reducer, networks.autoencoder, vlm, vae, cost)
    frozen, cost = [networks.autoencoder, *vae], networks.sampler_cost()
    if sources:
        edit = networks.sampler_cost(sources)
        cost = replace(edit, flops=edits * edit.flops + (1 - edits) * cost.flops)
    yield Work("train-sampler", recipe.train_sampler, expert, vlm, frozen, cost, blocks(expert))


def stage_plan(work: Work, recipe: Recipe, machine: Machine) -> StagePlan:
    """What a stage takes on a machine."""
    settings, trained = work.settings, trainable(work.module)
    micro = micro_batch(work, recipe, machine)
    rate = machine.gpus * machine.flops / work.cost.flops
    seconds = settings.steps * settings.batch_size / rate
    finished = 4 * sum(count(part.parameters()) for part in (work.module, *work.frozen))
    kept = 1 + (settings.steps // settings.keep_every if settings.keep_every else 0)
    return StagePlan(
        name=work.name,
        parameters=trained,
        steps=settings.steps,
        batch_size=settings.batch_size,
        micro_batch=micro,
        flops=work.cost.flops,
        memory={s: memory(work, recipe, machine, s, micro) for s in STRATEGIES},
        images_per_s=rate,
        days=seconds / 86400,
        gpu_hours=machine.gpus * seconds / 3600,
        checkpoint_bytes=2 * STATE_BYTES * trained + kept * finished,
    )


def spared(stage: StagePlan, encoding: float) -> StagePlan:
    """Stage 2 from a latent cache, which spares `encoding` FLOPs an image."""
    flops = stage.flops - encoding
    share = flops / stage.flops
    return replace(
        stage,
        name="train-sampler, from latents",
        flops=flops,
        images_per_s=stage.images_per_s / share,
        days=stage.days * share,
        gpu_hours=stage.gpu_hours * share,
        checkpoint_bytes=0,
    )


def micro_batch(work: Work, recipe: Recipe, machine: Machine) -> int:
    """Images that a GPU has at a time."""
    return math.ceil(work.settings.batch_size / (machine.gpus * recipe.engine.accumulate))


def memory(work: Work, recipe: Recipe, machine: Machine, strategy: str, images: int) -> Memory:
    """Bytes of a GPU while a stage trains on some images at a time."""
    shards = machine.shards(strategy, recipe.engine.mesh)
    own = shards if work.layers else 1
    bfloat16 = in_bfloat16(work.settings)
    trained = trainable(work.module)
    weights, gradients = 4 * count(work.module.parameters()) / own, 4 * trained / own
    # A process alone makes its gradients as it goes back; DDP's buckets and fsdp's shares are always there.
    grows = machine.gpus == recipe.engine.accumulate == 1
    casts = own == 1
    # FSDP gathers the next layer while one computes; going back, one more layer's gradients wait in float32.
    largest = max((count(layer.parameters()) for layer in work.layers), default=0)
    in_flight = largest * (3 * (2 if bfloat16 else 4) + 4) if own > 1 else 0
    frozen = sum(frozen_bytes(part, 1) for part in work.frozen)
    if work.vlm:
        frozen += frozen_bytes(work.vlm, shards if recipe.engine.shard_vlm else 1)
    # Muon keeps one moment of each of its matrices where AdamW keeps two.
    muon = block_matrices(work.module) if work.settings.optimizer == "muon" else []
    moments = 2 * gradients - 4 * count(muon) / own
    fixed = 2 * weights + gradients + moments + frozen + in_flight
    activations = work.cost.peak(images, grows, casts) - grows * gradients
    room = machine.memory - fixed + grows * gradients
    most = work.cost.most_images(room, grows, casts)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimiser=moments,
        average=weights,
        frozen=frozen,
        in_flight=in_flight,
        activations=activations,
        total=fixed + activations,
        largest=most,
    )


def frozen_bytes(model: nn.Module, shards: int) -> float:
    """Of a frozen network on a GPU; shared out (`engine.shard_vlm`), two layers are gathered at a time."""
    whole = size([*model.parameters(), *model.buffers()])
    if shards == 1:
        return whole
    layers = [size(layer.parameters()) for layer in blocks(model)]
    return whole - sum(layers) * (1 - 1 / shards) + 2 * max(layers, default=0)


def passes_of(recipe: Recipe, networks: FakeNetworks, machine: Machine) -> tuple[list[PassPlan], float]:
    """What trains nothing, and the FLOPs of an image's z̃."""
    encode, sampling = networks.encode_flops(), recipe.sampling
    times = call_times(sampling.steps, sampling.solver, networks.shift)
    first, last = sampling.guidance_interval
    everywhere = (first, last) == (0, 1)
    guided = [t for t in times if sampling.guidance != 1 and (everywhere or first <= t < last)]
    draw = networks.prefix_flops() + (len(times) + len(guided)) * networks.velocity_flops()
    draw += networks.decode_flops()
    rate = machine.gpus * machine.flops
    latents = encode * (2 if recipe.data.flip else 1)
    return [
        PassPlan("prepare --latents", latents, rate / latents),
        PassPlan("sample", draw, rate / draw),
    ], encode


def call_times(steps: int, solver: Solver, shift: float = 1.0) -> list[float]:
    """The times at which `flow.solve` asks for a velocity."""
    times: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x

    solve(velocity, torch.zeros(1), steps, solver, shift)
    return times


def parameters(networks: FakeNetworks) -> dict[str, int]:
    """Of each part, exactly; each weight once in a part. REPA's heads, which only train, are left out."""
    vlm, autoencoder = networks.vlm, networks.autoencoder
    parts: dict[str, nn.Module | None] = {
        "VLM": vlm.model,
        "VLM: language model's layers": vlm.decoder,
        "VLM: projector": next((tap.module for tap in vlm.taps if tap.key is not None), None),
        "VAE": networks.vae.model if networks.vae else None,
        "reducer": autoencoder.reducer,
        "decoder": autoencoder.decoder,
        "expert": networks.expert,
    }
    kept = {name: part.named_parameters() for name, part in parts.items() if part is not None}
    return {
        part: count(weight for name, weight in named if not name.startswith("alignment."))
        for part, named in kept.items()
    }


class Data(NamedTuple):
    """What is known of the images: pixels a side, how many, the bytes of each on disk, and what of edits."""

    size: int = 64  # as `vugen prepare` draws them where nothing else is said
    images: int | None = None
    bytes: float | None = None
    sources: int = 0  # pictures that an edit is made from, at most
    edits: float = 0.0  # share of the samples that are edits


def data_of(recipe: Recipe) -> Data:
    """The recipe's mixture, where it is there."""
    if not recipe.data.mixture or not all(Path(s.path).is_dir() for s in recipe.data.mixture):
        return Data()
    manifests = [read_manifest(source.path) for source in recipe.data.mixture]
    for source, manifest in zip(recipe.data.mixture, manifests, strict=True):
        if "train" not in manifest.splits:
            raise VugenError(f"data.mixture: {source.path} has no train split: prepare it, or leave it out")
    splits = [manifest.splits["train"] for manifest in manifests]
    images = sum(split.count for split in splits)
    stored = sum(shard.bytes for split in splits for shard in split.shards)
    weights = [source.weight for source in recipe.data.mixture]
    edits = sum(weight for weight, split in zip(weights, splits, strict=True) if split.sources)
    size, sources = max(manifest.size for manifest in manifests), max(split.sources for split in splits)
    return Data(size, images, stored / images, sources, edits / sum(weights))


def latent_bytes(latents: list[int], flip: bool) -> int:
    """Of a sample of a latent cache: .npy of float16, .txt and .json in a tar, a block of header each."""
    array = 128 + 2 * math.prod(latents) * (2 if flip else 1)
    return TAR_BLOCK * (math.ceil(array / TAR_BLOCK) + 6)


def stage_problems(work: Work, recipe: Recipe, machine: Machine) -> list[str]:
    """What of a stage will not work on a machine."""
    settings, engine = work.settings, recipe.engine
    key = work.name.replace("-", "_")
    problems = []
    if settings.batch_size % (machine.gpus * engine.accumulate):
        problems.append(
            f"{key}.batch_size={settings.batch_size} cannot be shared out evenly over {machine.gpus} GPUs"
            + (f" in {engine.accumulate} parts (engine.accumulate)" if engine.accumulate > 1 else "")
            + f": take a multiple of {machine.gpus * engine.accumulate}"
        )
    images = micro_batch(work, recipe, machine)
    if settings.optimizer == "muon" and engine.strategy == "fsdp" and work.layers and machine.gpus > 1:
        problems.append(
            f"{key}.optimizer=muon orthogonalises whole matrices, and engine.strategy=fsdp shares them out: "
            f"set {key}.optimizer=adamw, or engine.strategy=ddp"
        )
    strategy = "hsdp" if engine.mesh else engine.strategy
    needed = memory(work, recipe, machine, strategy, images)
    if needed.largest < images:
        held = f"{work.name}: {images} images a GPU need {needed.total / 1e9:.0f} GB under {strategy}"
        if needed.largest:
            parts = math.ceil(settings.batch_size / machine.gpus / needed.largest)
            problems.append(f"{held}, and {needed.largest} fit: set engine.accumulate={parts}")
        else:
            fits = [s for s in ("ddp", "fsdp") if memory(work, recipe, machine, s, 1).largest]
            ways = "no strategy does: a larger GPU, or more of them"
            if fits:
                ways = f"engine.strategy={fits[0]}{' and engine.mesh=null' * bool(engine.mesh)} would do"
            problems.append(f"{held}, and not even one fits: {ways}")
    return problems


def slow(work: Work, recipe: Recipe, machine: Machine) -> list[str]:
    """Why a stage will take longer than planned."""
    settings, engine, notes = work.settings, recipe.engine, []
    computes = micro_batch(work, recipe, machine) * work.cost.flops / machine.flops
    operations = len(work.cost.each)
    if computes < operations * LAUNCH:
        notes.append(
            f"{work.name}: {operations} operations take {1000 * operations * LAUNCH:.0f} ms to start and "
            f"{1000 * computes:.2f} ms to compute: MFU will be far below {machine.mfu:.0%}; take larger "
            "batches on fewer GPUs"
        )
    travels = 3 * 2 * sum(count(layer.parameters()) for layer in work.layers) / LINK
    shards = machine.shards("hsdp" if engine.mesh else engine.strategy, engine.mesh)
    if shards * machine.nodes > machine.gpus and travels > computes:  # weights go from node to node
        notes.append(
            f"{work.name}: fsdp over {machine.nodes} nodes moves weights for {1000 * travels:.0f} ms in each "
            f"pass over a micro-batch that takes {1000 * computes:.0f} ms: engine.mesh="
            f"[{machine.nodes},{machine.gpus // machine.nodes}] or larger batches wait less"
        )
    if not in_bfloat16(settings):
        notes.append(f"{work.name}: precision is {settings.precision}, and times are those of bfloat16")
    return notes


def trainable(module: nn.Module) -> int:
    """Weights that get a gradient."""
    return count(p for p in module.parameters() if p.requires_grad)


def count(tensors: Iterable[Tensor]) -> int:
    """Their numbers."""
    return sum(tensor.numel() for tensor in tensors)


def size(tensors: Iterable[Tensor]) -> int:
    """Their bytes."""
    return sum(tensor.nbytes for tensor in tensors)


def as_lines(plan: Plan) -> list[str]:
    """The plan as a person reads it."""
    machine = plan.machine
    lines = [
        f"{plan.recipe}, VLM {plan.vlm}, on {machine.gpus} {machine.gpu} in {machine.nodes} "
        f"node{'s' * (machine.nodes > 1)}; MFU {machine.mfu:.0%} assumed",
        f"images {plan.image_size} px, z {shape(plan.z)}, reduced {shape(plan.latents)}, prompts of "
        f"{plan.prompt_tokens} tokens",
        "",
        "Parameters",
        *(f"  {name:32}{number:>16,}" for name, number in plan.parameters.items()),
        "",
        f"{'Compute':34}{'GFLOP/image':>12}{'images/s':>12}{'days':>10}{'GPU-hours':>12}",
    ]
    for stage in plan.stages:
        lines.append(
            f"  {stage.name:32}{stage.flops / 1e9:>12,.1f}{stage.images_per_s:>12,.0f}{stage.days:>10,.2f}"
            f"{stage.gpu_hours:>12,.1f}"
        )
    lines += [f"  {p.name:32}{p.flops / 1e9:>12,.1f}{p.images_per_s:>12,.0f}" for p in plan.passes]
    titles = ("weights", "grads", "optim", "EMA", "frozen", "flight", "activ.", "total", "fits")
    for stage in plan.stages:
        if "latents" in stage.name:
            continue
        lines += ["", f"Memory of a GPU in GB, {stage.name}, {stage.micro_batch} images at a time"]
        lines.append("  " + " " * 6 + "".join(f"{title:>9}" for title in titles))
        for strategy, memory in stage.memory.items():
            values = list(asdict(memory).values())
            cells = "".join(f"{value / 1e9:>9.2f}" for value in values[:-1])
            lines.append(f"  {strategy:6}{cells}{memory.largest:>9,}")
    lines += ["", "Disk in GB", *(f"  {name:32}{number / 1e9:>12,.1f}" for name, number in plan.disk.items())]
    lines += ["", *(f"Will not work: {p}" for p in plan.problems), *(f"Note: {note}" for note in plan.notes)]
    return lines


def shape(sizes: list[int]) -> str:
    """As in 8 x 8 x 24."""
    return " x ".join(map(str, sizes))
