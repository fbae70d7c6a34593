"""Stage 2: the generation expert, trained by flow matching to sample z̃ for a prompt."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from vugen_cli.card import AdapterCard, BaseCard, Card, LatentsCard
from vugen_cli.checkpoint import fingerprint, save_checkpoint, select, with_prefix
from vugen_cli.data.loader import Batch, ShardedImages, decode_source, training_batches
from vugen_cli.data.mixture import open_dataset
from vugen_cli.data.sample import PICTURE
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
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.dit_expert import DiTExpert
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.pictures import save_grid
from vugen_cli.processes import is_first
from vugen_cli.recipe import USE_OF_VLM, Recipe, SamplerTraining
from vugen_cli.sampling.adapters import adapter_weights, base_name, inject
from vugen_cli.sampling.sampler import Sampler, read_prompts
from vugen_cli.sampling.trained import load_autoencoder, load_expert, load_weights, new_expert, try_expert
from vugen_cli.seeds import random_rows
from vugen_cli.stages.latent_cache import check_cache, check_size, latent_facts
from vugen_cli.stages.losses import Alignment, misalignment
from vugen_cli.stages.opposites import contrast, early, opposite
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm
from vugen_cli.vlm.latents import resized
from vugen_cli.vlm.prefix import Prefix
from vugen_cli.vlm.prompts import Prompt, Prompts, pictures_of

REPA_UNTIL = 0.6  # of the steps: what helps to begin holds back later (arXiv 2505.16792)
ALIGNED = 16  # on GPUs prompts are padded to a multiple of this many tokens: attention kernels depend on it


def train_sampler(
    recipe: Recipe,
    reducer: Path,
    data: str | Path | None,
    out: Path,
    device: torch.device,
    allow_vlm_mismatch: bool = False,
    init: Path | None = None,
    options: RunOptions = RunOptions(),
    rank: int | None = None,
) -> Path:
    """Train stage 2 and write its checkpoint: expert, reducer and decoder, so that it is enough to sample.

    With a rank, train an adapter beside the frozen expert instead, and write that alone.

    Args:
        recipe: the whole run's recipe; its reducer and decoder are those of the checkpoint.
        reducer: the checkpoint of stage 1; or `init` itself.
        data: a prepared data set, or a latent cache of one; None: the recipe's mixture.
        out: the `.safetensors` file to write; the run is kept in `<out without suffix>.run`.
        device: where to train.
        allow_vlm_mismatch: take a VLM of other weights than the reducer was trained on.
        init: a sampler whose expert is trained further (on other images, say) instead of a new one. With a
            `reducer` of its own, which must have kept the sampler's, on latents of another size.
        options: of the command line.
        rank: of the adapter; with `init`.

    Raises:
        VugenError: bad data, VLM, checkpoint or recipe; a loss that is not finite.
    """
    autoencoder, stored, reducer_card = load_autoencoder(
        reducer, device, "sampler" if init == reducer else "reducer"
    )
    if not rank:  # previews are decoded as the checkpoint will; an adapter, as its sampler is
        autoencoder.decoder.recipe = recipe.decoder
    latents = reducer_card.latents
    shift = recipe.flow.shift_of(latents.grid, latents.channels)
    recipe = recipe.model_copy(update={"flow": recipe.flow.model_copy(update={"shift": shift})})
    images = open_dataset(data, recipe, latents=True)
    vlm = checked_vlm(recipe, images, autoencoder, reducer_card, reducer, device, allow_vlm_mismatch)
    trained = None
    if init == reducer:
        trained = select(stored, "expert")
    elif init:
        trained = load_expert(init, reducer, stored, vlm, latents, allow_vlm_mismatch)
    expert = begin_expert(recipe, vlm, latents, device, trained, init, adapter=bool(rank))
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith("expert.")}
    begun = {"reducer": fingerprint(autoencoder.reducer, "autoencoder.reducer.")}
    if init:
        begun["expert"] = fingerprint(expert, "expert.")
    adapter = None
    if rank:
        adapter = AdapterCard(
            step=recipe.train_sampler.steps,
            rank=rank,
            base=BaseCard(name=base_name(init or reducer), fingerprint=begun["expert"]),
            recipe=recipe.model_dump(mode="json"),
            data=images.card(),
        )
        torch.manual_seed(recipe.seed)
        inject(expert, rank)
        begun["adapter"] = str(rank)
    settings = recipe.train_sampler
    if settings.repa:
        expert.alignment = new_alignment(expert.width, vlm, images, recipe.seed)
    layers = engine_layers(expert, vlm, recipe, device)

    loss = partial(sampler_loss, recipe=recipe, vlm=vlm, expert=expert, autoencoder=autoencoder)
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
    used = {*USE_OF_VLM, "prompt_tokens", "seed", "data", "reducer", "decoder", "expert", "flow"}
    resolved = card.facts("vlm", "data", "latents") | begun
    resolved["recipe"] = recipe.model_dump(mode="json", include={*used, "train_sampler"})
    prompts = held_out_prompts(images, vlm.prompts)
    if not prompts:
        raise VugenError(
            f"the first held-out samples of {images.directory} have no captions, or cannot be read: a "
            "sampler cannot be trained on it"
        )

    def preview(path: Path) -> None:
        sampler = Sampler(vlm, expert, autoencoder, card, out)
        drawn = {p: image for p, _, image in sampler.sample(prompts, seed=recipe.seed)}
        save_preview([drawn[p] for p in range(len(prompts))], prompts, path)

    run = out.with_suffix(".run")
    tokenize, edits = vlm.prompts.caption_tokens, images.most_sources > 0
    stream = training_batches(images, recipe, settings.batch_size, recipe.data.flip, None, tokenize, edits)

    def save(path: Path, step: int) -> None:
        weights = {k: v for k, v in expert.state_dict().items() if not k.startswith("alignment.")}
        weights = gathered(adapter_weights(weights) if adapter else weights)
        if is_first():
            own = with_prefix(weights, "expert")
            if adapter:
                halves = {name: tensor.half() for name, tensor in own.items()}
                save_checkpoint(path, halves, adapter.model_copy(update={"step": step}))
            else:
                save_checkpoint(path, own | stored, card.model_copy(update={"step": step}))

    stage = Stage("sampler", expert, loss, preview, resolved, layers, save=save)
    if any(parameter.is_meta for parameter in expert.parameters()):
        stage.fill = partial(fill_from_vlm, expert, vlm)
    stage.adapter = adapter is not None
    train(stage, stream, settings, recipe, run, device, options)
    save(out, settings.steps)
    return out


def sampler_loss(
    batch: Batch,
    generator: torch.Generator,
    step: int,
    recipe: Recipe,
    vlm: FrozenVLM,
    expert: GenerationExpert | DiTExpert,
    autoencoder: Autoencoder,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow matching of z̃ given prompts, and the recipe's other terms; the total, and each by name.

    Args:
        batch: images, or of a latent cache their z̃.
        generator: draws what prompts leave out, times and noise.
        step: of the run.
        recipe: its weights; `flow.shift` is a number.
        vlm, expert, autoencoder: the expert learns.
    """
    settings, cached = recipe.train_sampler, batch.images.is_floating_point()
    host = getattr(generator, "host", generator)
    chances = random_rows(torch.rand, (len(batch.captions),), host)
    prompts = prompts_of(batch, chances, settings, vlm.prompts)
    assert isinstance(recipe.flow.shift, float)
    t = draw_times(len(prompts), recipe.flow.time, recipe.flow.shift, generator)
    opposites = opposites_of(batch, prompts, t, vlm.prompts) if settings.opposites else {}
    prompts += opposites.values()
    multiple = ALIGNED if vlm.device.type == "cuda" else 1
    read = partial(read_prompts, vlm, expert, autoencoder, multiple=multiple)
    # Sharded, every process must go through the layers as often as the others; recomputed layers read what
    # the last pass left in their norms.
    once = shards(recipe.engine) or recipe.engine.recompute
    kinds = [list(range(len(prompts)))] if once else by_pictures(prompts)
    prefixes = [read([prompts[row] for row in rows]) for rows in kinds]
    with torch.no_grad():
        z = batch.images.float() if cached else autoencoder.z(vlm, batch.images)
        target = z if cached else autoencoder.reducer(z)
        if expert.alignment and recipe.reducer.kind == "vae":
            z = vlm.encode(batch.images)  # the VLM's, not the VAE's
    mark("frozen VLM")
    told: list[Tensor] = []
    # Every process names the same terms in the same order.
    values: dict[str, Tensor] = {"opposites": target.new_zeros(())} if settings.opposites else {}

    def velocity(noised: Tensor, t: Tensor) -> Tensor:
        if not opposites:
            return velocity_of(expert, kinds, prefixes, noised, t, told)
        rows = list(opposites)
        both = torch.cat([noised, noised[rows]]), torch.cat([t, t[rows]])
        v, opposed = velocity_of(expert, kinds, prefixes, *both, told).split([len(t), len(rows)])
        true = (target - noised)[rows] / (1 - t[rows]).view(-1, 1, 1, 1)  # x - ε
        values["opposites"] = contrast(v[rows], opposed, true).sum() / len(t)
        return v

    total = flow = flow_matching_loss(velocity, target, t, generator)
    if told:
        values["repa"] = misalignment(told[0][: len(t)], z)
        total = total + (settings.repa if step < REPA_UNTIL * settings.steps else 0.0) * values["repa"]
    if settings.opposites:
        total = total + settings.opposites * values["opposites"]
    return total, {"flow": flow} | values if values else {}


def checked_vlm(
    recipe: Recipe,
    images: ShardedImages,
    autoencoder: Autoencoder,
    card: Card,
    reducer: Path,
    device: torch.device,
    allow_vlm_mismatch: bool,
) -> FrozenVLM:
    """The recipe's VLM, seen to suit data and checkpoint; on the CPU if it is to be sharded.

    Args:
        recipe: of the run.
        images: to train on, or a latent cache of them.
        autoencoder: of the checkpoint of stage 1.
        card: of that checkpoint.
        reducer: its path, for messages.
        device: where to train.
        allow_vlm_mismatch: see `FrozenVLM.check`.

    Raises:
        VugenError: it cannot be used, or one of them does not suit the others.
    """
    if recipe.expert.kind == "copy":
        images.refuse_shapes("of which a copy of the VLM's decoder learns one: set expert.kind=dit")
    sharded = shards_vlm(recipe.engine)
    if sharded and images.most_sources:  # each process would run the VLM as often as its samples ask for
        raise VugenError(
            f"{images.directory} holds edits, which engine.shard_vlm cannot read: set it to false"
        )
    vlm = load_vlm(recipe.vlm, "cpu" if sharded else device, recipe)
    vlm.check(card, reducer, allow_vlm_mismatch)
    if images.latents:
        check_cache(images, latent_facts(autoencoder, vlm, recipe, card), recipe.data.flip)
    else:
        check_size(images, autoencoder, vlm, card, reducer)
        autoencoder.check_shapes(vlm, images.shapes)
    return vlm


def begin_expert(
    recipe: Recipe,
    vlm: FrozenVLM,
    latents: LatentsCard,
    device: torch.device,
    trained: dict[str, Tensor] | None,
    init: Path | None,
    adapter: bool,
) -> GenerationExpert | DiTExpert:
    """The expert as the run begins, seen to run; where it is to be sharded, on the CPU and partly on `meta`.

    Args:
        recipe: of the run.
        vlm: whose prefix it reads.
        latents: shape of z̃.
        device: where it will train.
        trained: weights to start from; None: its own, or the VLM's.
        init: the sampler that they come from.
        adapter: whether an adapter to them is trained, not they.

    Raises:
        VugenError: its sizes or the weights do not fit, or its code does not run.
    """
    torch.manual_seed(recipe.seed)
    sharded = shards(recipe.engine)
    expert = new_expert(vlm, latents, recipe.expert, sharded)
    attempt = None if sharded else partial(try_expert, vlm=vlm, latents=latents)  # on `meta` nothing runs
    if device.type == "cpu" and isinstance(expert, GenerationExpert):
        attend_eagerly(expert, attempt)
    elif attempt:
        attempt(expert)
    if trained and init:
        if recipe.expert.reference:
            trained = with_references(trained, expert, init, learns=not adapter)
        load_weights(expert, trained, init, assign=sharded)
    return expert


def engine_layers(
    expert: GenerationExpert | DiTExpert, vlm: FrozenVLM, recipe: Recipe, device: torch.device
) -> list[nn.Module]:
    """The expert's layers, compiled and recomputed as the recipe's engine says; the VLM is shared out."""
    layers = blocks(expert)
    if wants_compile(recipe.engine, device, recipe.train_sampler.steps, on_cpu=True):
        compile_layers(layers, must=recipe.engine.compile is True)
    if recipe.engine.recompute:
        recompute(layers)
    if shards_vlm(recipe.engine):
        shard_frozen(vlm.model, recipe.engine, device)
        vlm.device = device
    return layers


def new_alignment(width: int, vlm: FrozenVLM, images: ShardedImages, seed: int) -> Alignment:
    """What tells the VLM's z of images from an expert's hidden states of some width, on the VLM's device.

    Raises:
        VugenError: the images are a latent cache.
    """
    if images.latents:
        raise VugenError(
            f"train_sampler.repa: {images.directory} holds z̃, and not the z that REPA teaches: train on the "
            "images, or set it to 0 (--set train_sampler.repa=0)"
        )
    grey = torch.full((1, 3, images.size, images.size), 127, dtype=torch.uint8)
    target = vlm.encode(grey).shape[-1]
    torch.manual_seed(seed)
    return Alignment(width, target).to(vlm.device)


def fill_from_vlm(expert: nn.Module, vlm: FrozenVLM) -> None:
    """Give an expert that was built on `meta` the weights that it starts with, part by part."""
    weights = with_prefix(dict(vlm.decoder.named_parameters()), "decoder")
    for name, parameter in expert.named_parameters():
        if name in weights:
            fill(parameter, weights[name])


def with_references(
    trained: dict[str, Tensor], expert: nn.Module, sampler: Path, learns: bool
) -> dict[str, Tensor]:
    """A sampler's expert with what reads references, new where it has none: it is learned from here on.

    Raises:
        VugenError: it has none and cannot learn it, because an adapter alone is trained.
    """
    new = {k: v for k, v in expert.state_dict().items() if k.startswith("reference_embed.")}
    if not learns and not new.keys() <= trained.keys():
        raise VugenError(
            f"expert.reference: {sampler} does not read references, and an adapter cannot teach it "
            "to: train it further without --adapter first"
        )
    return new | trained


def attend_eagerly(expert: GenerationExpert, attempt: Callable[[GenerationExpert], None] | None) -> None:
    """Attention step by step: SDPA's backward pass is slower on CPUs at these lengths.

    Args:
        expert: changed in place, unless that code of its family has a fault.
        attempt: runs it once; raises `VugenError` if it does not run. None: it cannot be run yet.

    Raises:
        VugenError: it runs in neither way.
    """
    before = expert.decoder.config._attn_implementation
    expert.decoder.set_attn_implementation("eager")
    if attempt is None:
        return
    try:
        attempt(expert)
    except VugenError:
        expert.decoder.set_attn_implementation(before)
        attempt(expert)


def prompts_of(
    batch: Batch, chances: Tensor, settings: SamplerTraining, prompts: Prompts
) -> list[str | list[int] | Prompt]:
    """What a batch is trained on: whole prompts, and some without text, without pictures, or without both.

    Args:
        batch: with tokens, and of edits with the pictures that they are made from.
        chances: a number in [0, 1) for each sample.
        settings: how often what is left out.
        prompts: cuts the text.
    """
    assert batch.tokens is not None
    asked: list[str | list[int] | Prompt] = []
    bounds = accumulate([settings.prompt_dropout, settings.text_dropout, settings.picture_dropout])
    below = [(chances < bound).tolist() for bound in bounds]
    for row, (neither, no_text, no_pictures) in enumerate(zip(*below, strict=True)):
        pictures = tuple(batch.sources[row]) if batch.sources else ()
        if neither:
            asked.append("")
        elif not pictures:
            asked.append(batch.tokens[row])
        elif no_pictures and not no_text:
            asked.append(prompts.caption_tokens(batch.captions[row].replace(PICTURE, ""))[0])
        elif no_text:
            asked.append(Prompt("", pictures))
        else:
            asked.append(cut_prompt(batch.captions[row], pictures, prompts))
    return asked


def opposites_of(
    batch: Batch, asked: Sequence[str | list[int] | Prompt], t: Tensor, prompts: Prompts
) -> dict[int, str | list[int] | Prompt]:
    """Prompts of the opposite captions, by the rows of the batch that have one and an early time.

    Args:
        batch: captioned.
        asked: what it is trained on, from `prompts_of`; rows that were left without their text have none.
        t: times of the rows.
        prompts: cuts the text.
    """
    found: dict[int, str | list[int] | Prompt] = {}
    for row in early(t):
        prompt, other = asked[row], opposite(batch.captions[row])
        if not other or not (prompt.text if isinstance(prompt, Prompt) else prompt):
            continue
        if isinstance(prompt, Prompt):
            edit = cut_prompt(other, prompt.pictures, prompts)
            if edit.text != prompt.text:  # the word was not cut off
                found[row] = edit
        else:
            tokens = prompts.caption_tokens(other.replace(PICTURE, "") if batch.sources else other)[0]
            if tokens != prompt:
                found[row] = tokens
    return found


def cut_prompt(caption: str, pictures: tuple[Tensor, ...], prompts: Prompts) -> Prompt:
    """The prompt of a caption, as much of it as `prompts` allows, about pictures, uint8 [3, H, W] each."""
    text = prompts.cut(caption)
    if pictures and text.count(PICTURE) not in (0, len(pictures)):  # what was cut off placed one
        text = text.replace(PICTURE, "")
    return Prompt(text, pictures)


def by_pictures(prompts: Sequence[str | list[int] | Prompt]) -> list[list[int]]:
    """Rows of a batch without pictures, and those with: one list or two.

    Read apart, texts need neither the length of prompts with pictures nor tokens for their references.
    """
    texts = [row for row, prompt in enumerate(prompts) if not pictures_of(prompt)]
    pictured = [row for row, prompt in enumerate(prompts) if pictures_of(prompt)]
    return [rows for rows in (texts, pictured) if rows]


def velocity_of(
    expert: nn.Module,
    kinds: list[list[int]],
    prefixes: list[Prefix],
    noised: Tensor,
    t: Tensor,
    told: list[Tensor],
) -> Tensor:
    """The expert's velocity [B, h, w, c] of a batch whose prompts were read apart.

    Args:
        expert: (noised, t, prefix) -> velocity, and z with it while there is an alignment.
        kinds: rows of the batch, each in one of the lists.
        prefixes: of the rows in each list.
        noised, t: of all rows, as the expert takes them.
        told: where that z [B, h, w, d] is put.
    """
    if len(kinds) == 1:
        parts = [expert(noised, t, prefixes[0])]
        in_order: Tensor | slice = slice(None)
    else:
        order = torch.tensor([row for rows in kinds for row in rows], device=noised.device)
        taken = order.split([len(rows) for rows in kinds])
        parts = [expert(noised[rows], t[rows], prefix) for rows, prefix in zip(taken, prefixes, strict=True)]
        in_order = order.argsort()
    if not isinstance(parts[0], tuple):
        return torch.cat(parts)[in_order]
    velocities, aligned = zip(*parts, strict=True)
    told.append(torch.cat(aligned)[in_order])
    return torch.cat(velocities)[in_order]


def held_out_prompts(images: ShardedImages, prompts: Prompts, count: int = 16) -> list[Prompt]:
    """The prompts of a preview: of the first held-out samples with captions, which are cut as in training.

    Pictures are squares.
    """
    found = []
    for _, meta in images.held_out().in_order(count):
        try:
            sources = [decode_source(data, images.shapes, images.size) for data in meta.get("sources", [])]
        except Exception:  # damaged: decoders raise nearly anything; training counts it
            continue
        pictures = tuple(torch.from_numpy(source).permute(2, 0, 1) for source in sources)
        if meta["captions"]:
            found.append(cut_prompt(meta["captions"][0], pictures, prompts))
    return found


def save_preview(drawn: list[Tensor], prompts: list[Prompt], path: Path) -> None:
    """Write a grid of what was drawn, uint8 [3, S, S] each, an edit beside what it is made from."""
    shown, labels = [], []
    for image, prompt in zip(drawn, prompts, strict=True):
        beside = [resized(p[None], image.shape[-1])[0] for p in prompt.pictures]
        shown += [*beside, image]
        labels += [*["source"] * len(beside), prompt.text]
    save_grid(torch.stack(shown), path, labels=labels)
