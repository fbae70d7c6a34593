"""Stage 2: the generation expert, trained by flow matching to sample z̃ for a prompt."""

from pathlib import Path

import torch
from torch import Tensor

from vugen_cli.card import AdapterCard, BaseCard
from vugen_cli.checkpoint import fingerprint, save_checkpoint, select, with_prefix
from vugen_cli.data.loader import Batch, training_batches
from vugen_cli.data.mixture import open_dataset
from vugen_cli.engine.compiling import compile_layers, wants_compile
from vugen_cli.engine.distributed import (
    blocks,
    fill,
    gathered,
    recompute,
    shard_frozen,
    shards,
    shards_vlm,
)
from vugen_cli.engine.loop import train
from vugen_cli.engine.profiling import mark
from vugen_cli.engine.stage import RunOptions, Stage
from vugen_cli.errors import VugenError
from vugen_cli.flow import draw_times, flow_matching_loss
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.pictures import save_grid
from vugen_cli.processes import is_first
from vugen_cli.recipe import USE_OF_VLM, Recipe
from vugen_cli.sampling.adapters import adapter_weights, base_name, inject
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.sampling.trained import load_autoencoder, load_weights, new_expert, try_expert
from vugen_cli.seeds import random_rows
from vugen_cli.stages.latent_cache import check_cache, latent_facts
from vugen_cli.vlm.frozen import load_vlm

ALIGNED = 16  # on GPUs prompts are padded to a multiple of this many tokens: attention kernels depend on it


def train_sampler(
    recipe: Recipe,
    reducer: Path,
    data: str | Path | None,
    out: Path,
    device: torch.device,
    allow_vlm_mismatch: bool = False,
    further: bool = False,
    options: RunOptions = RunOptions(),
    rank: int | None = None,
) -> Path:
    """Train stage 2 and write its checkpoint: expert, reducer and decoder, so that it is enough to sample.

    With a rank, train an adapter beside the frozen expert instead, and write that alone.

    Args:
        recipe: the whole run's recipe; its reducer and decoder are those of the checkpoint.
        reducer: the checkpoint of stage 1.
        data: a prepared data set, or a latent cache of one; None: the recipe's mixture.
        out: the `.safetensors` file to write; the run is kept in `<out without suffix>.run`.
        device: where to train.
        allow_vlm_mismatch: take a VLM of other weights than the reducer was trained on.
        further: `reducer` is the checkpoint of a sampler, whose expert is trained further (on other images,
            say) instead of a new one.
        options: of the command line.
        rank: of the adapter; with `further`.

    Raises:
        VugenError: bad data, VLM, checkpoint or recipe; a loss that is not finite.
    """
    autoencoder, stored, reducer_card = load_autoencoder(reducer, device, "sampler" if further else "reducer")
    latents = reducer_card.latents
    shift = recipe.flow.shift_of(latents.grid, latents.channels)
    recipe = recipe.model_copy(update={"flow": recipe.flow.model_copy(update={"shift": shift})})
    images = open_dataset(data, recipe, latents=True)
    sharded, vlm_sharded = shards(recipe.engine), shards_vlm(recipe.engine)
    vlm = load_vlm(recipe.vlm, "cpu" if vlm_sharded else device, recipe)
    vlm.check(reducer_card, reducer, allow_vlm_mismatch)
    if images.latents:
        check_cache(images, latent_facts(autoencoder, vlm, recipe, reducer_card), recipe.data.flip)
    torch.manual_seed(recipe.seed)
    expert = new_expert(vlm, latents, recipe.expert, sharded)
    if not sharded:  # on `meta` there is nothing to try
        try_expert(expert, vlm, latents)
    if further:
        load_weights(expert, select(stored, "expert"), reducer, assign=sharded)
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("expert.")}
    begun = {"expert": fingerprint(expert, "expert.")} if further else {}
    if rank:
        adapter = AdapterCard(
            step=recipe.train_sampler.steps,
            rank=rank,
            base=BaseCard(name=base_name(reducer), fingerprint=begun["expert"]),
            recipe=recipe.model_dump(mode="json"),
            data=images.card(),
        )
        torch.manual_seed(recipe.seed)
        inject(expert, rank)
        begun["adapter"] = str(rank)
    if device.type == "cpu" and isinstance(expert, GenerationExpert):
        expert.decoder.set_attn_implementation("eager")  # SDPA's backward is slower on CPUs at these lengths
    settings = recipe.train_sampler
    layers = blocks(expert)
    if wants_compile(recipe.engine, device, settings.steps, on_cpu=True):
        compile_layers(layers, must=recipe.engine.compile is True)
    if recipe.engine.recompute:
        recompute(layers)
    if vlm_sharded:
        shard_frozen(vlm.model, recipe.engine, device)
        vlm.device = device
    empty = any(parameter.is_meta for parameter in expert.parameters())

    def fill_from_vlm() -> None:
        weights = with_prefix(dict(vlm.decoder.named_parameters()), "decoder")
        for name, parameter in expert.named_parameters():
            if name in weights:
                fill(parameter, weights[name])

    def loss(batch: Batch, generator: torch.Generator, _step: int) -> tuple[Tensor, dict[str, Tensor]]:
        host = getattr(generator, "host", generator)
        dropped = random_rows(torch.rand, (len(batch.captions),), host) < settings.prompt_dropout
        assert batch.tokens is not None  # of the loader's workers, or of the cache
        prompts = ["" if drop else ids for ids, drop in zip(batch.tokens, dropped.tolist(), strict=True)]
        prefix = vlm.prefix(prompts, multiple=ALIGNED if device.type == "cuda" else 1, hidden=expert.reads)
        with torch.no_grad():
            target = batch.images.float() if images.latents else autoencoder.encode(vlm, batch.images)
        mark("frozen VLM")
        t = draw_times(len(target), recipe.flow.time, shift, generator)
        return flow_matching_loss(lambda x, t: expert(x, t, prefix), target, t, generator), {}

    card = reducer_card.model_copy(
        update={
            "stage": "sampler",
            "step": settings.steps,
            "recipe": recipe.model_dump(mode="json"),
            "vlm": vlm.card(),
            "data": images.card(),
        }
    )
    if images.latents:  # rounded to float16: a run goes on with what it began with
        begun["cache"] = "float16"
    resolved = (
        card.facts("vlm", "data", "latents")
        | begun
        | {
            "recipe": recipe.model_dump(
                mode="json",
                include={
                    *USE_OF_VLM,
                    "seed",
                    "data",
                    "reducer",
                    "decoder",
                    "expert",
                    "flow",
                    "train_sampler",
                },
            )
        }
    )
    prompts = [meta["captions"][0] for _, meta in images.held_out().in_order(16) if meta["captions"]]
    if not prompts:
        raise VugenError(f"{images.directory} has no captions: a sampler cannot be trained on it")

    def preview(path: Path) -> None:
        sampler = Sampler(vlm, expert, autoencoder, card, out)
        pictures = [image for _, _, image in sampler.sample(prompts, seed=recipe.seed)]
        save_grid(torch.stack(pictures), path, labels=prompts)

    run = out.with_suffix(".run")
    tokenize = None if images.latents else vlm.prompts.caption_tokens
    stream = training_batches(images, recipe, settings.batch_size, recipe.data.flip, tokenize=tokenize)

    def save_adapter(path: Path, step: int) -> None:
        weights = gathered(adapter_weights(expert.state_dict()))
        if is_first():
            own = {name: tensor.half() for name, tensor in with_prefix(weights, "expert").items()}
            save_checkpoint(path, own, adapter.model_copy(update={"step": step}))

    def save(path: Path, step: int) -> None:
        weights = gathered(expert.state_dict())
        if is_first():
            whole = with_prefix(weights, "expert") | stored
            save_checkpoint(path, whole, card.model_copy(update={"step": step}))

    write = save_adapter if rank else save
    stage = Stage("sampler", expert, loss, preview, resolved, layers, save=write)
    stage.fill, stage.adapter = fill_from_vlm if empty else None, bool(rank)
    train(stage, stream, settings, recipe, run, device, options)
    write(out, settings.steps)
    return out
