"""Trained checkpoints ready to use: loaded with all that they need, and written."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vugen_cli.card import Card, LatentsCard, VAECard
from vugen_cli.checkpoint import load_checkpoint, save_checkpoint, select, with_prefix
from vugen_cli.engine.precision import passes
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import bundle
from vugen_cli.flow import Solver
from vugen_cli.hub import PREFIX, downloaded, may_be_id, reach_hub
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.dit_expert import DiTExpert, spread
from vugen_cli.models.embeddings import stretched
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.models.vae import FrozenVAE
from vugen_cli.recipe import Expert, parse_recipe
from vugen_cli.sampling.adapters import parse, with_adapters
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.seeds import seeded_noise
from vugen_cli.vlm.frozen import FrozenVLM, vlm_of

WEIGHTS, VLM = "sampler.safetensors", "vlm"  # in an exported folder
NANO = "nano"  # the name of the bundled sampler
NANO_128 = "nano-128"  # the name of the bundled decoder of 128 px


def save_autoencoder(
    autoencoder: Autoencoder, path: Path, card: Card, others: dict[str, Tensor] | None = None
) -> None:
    """Write a checkpoint with all that decoding needs, a VAE included, and with other tensors."""
    weights = {k: v for k, v in autoencoder.state_dict().items() if not k.startswith("alignment.")}
    tensors = with_prefix(weights, "autoencoder") | (others or {})
    if autoencoder.vae:
        tensors |= with_prefix(autoencoder.vae.model.state_dict(), "vae")
    vae = autoencoder.vae.card() if autoencoder.vae else None
    save_checkpoint(path, tensors, card.model_copy(update={"vae": vae}))


def load_autoencoder(
    path: str | Path, device: torch.device, stage: str | None = None
) -> tuple[Autoencoder, dict[str, Tensor], Card]:
    """Reducer and pixel decoder of a checkpoint, with all its tensors and its card.

    Args:
        path: of a reducer or a sampler, or `nano-128`.
        device: where to put the two networks.
        stage: the one of the two it must be, if only one will do.

    Raises:
        VugenError: as `load_checkpoint`, or the file is of neither stage.
    """
    tensors, card = load_checkpoint(path, stage) if stage else decoder_checkpoint(path)
    return stored_autoencoder(tensors, card, path, device), tensors, card


def stored_autoencoder(
    tensors: dict[str, Tensor], card: Card, path: str | Path, device: torch.device
) -> Autoencoder:
    """Reducer and decoder among the tensors of a checkpoint, with its VAE if it has one.

    Args:
        tensors, card: of the checkpoint.
        path: where they come from, for messages.
        device: where to put the two networks.
    """
    recipe = parse_recipe(card.recipe, str(path))
    vae = stored_vae(card.vae, select(tensors, "vae"), device) if card.vae else None
    module = Autoencoder(recipe, card.latents.width, vae)
    load_weights(module, select(tensors, "autoencoder"), path)
    return module.to(device).eval().requires_grad_(False)


def same_reducer(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two checkpoints' tensors reduce z alike, to the bit: what draws z̃ of one draws the other's."""
    mine, theirs = (select(tensors, "autoencoder.reducer") for tensors in (one, other))
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name].float(), theirs[name].float()) for name in mine
    )


def load_expert(
    path: Path,
    reducer: Path,
    stored: dict[str, Tensor],
    vlm: FrozenVLM,
    latents: LatentsCard,
    allow_vlm_mismatch: bool = False,
) -> dict[str, Tensor]:
    """The weights of a sampler's expert for the latents of another checkpoint: of pictures of another size.

    A `dit` has rotary positions, of any grid; those that a copy of the decoder learned are interpolated.

    Args:
        path: of the sampler.
        reducer: the checkpoint whose latents they are for, which has the sampler's reducer.
        stored: that checkpoint's tensors.
        vlm: of both.
        latents: of that checkpoint's card.
        allow_vlm_mismatch: see `FrozenVLM.check`.

    Raises:
        VugenError: not a sampler, damaged, of another VLM, or of another reducer.
    """
    tensors, card = load_checkpoint(path, "sampler")
    if not same_reducer(tensors, stored):
        raise VugenError(
            f"{path} draws the latents of another reducer than {reducer} has: make one that keeps its own by "
            f"`vugen train-reducer --reducer {path}`"
        )
    vlm.check(card, path, allow_vlm_mismatch)
    weights = select(tensors, "expert")
    if "pos_embed" in weights and card.latents.grid != latents.grid:
        weights["pos_embed"] = stretched(weights["pos_embed"], card.latents.grid, latents.grid)
    return weights


def load_weights(
    module: nn.Module, weights: dict[str, Tensor], path: str | Path, assign: bool = False
) -> None:
    """Load a state dict, whatever float type it is stored in.

    Args:
        module: what is filled.
        weights: name -> tensor.
        path: where they come from, for messages.
        assign: take the tensors themselves, in float32, instead of copying them.

    Raises:
        VugenError: a tensor is missing, unknown, or of another shape.
    """
    if assign:
        # Copies: a tensor of a file that changes changes with it.
        weights = {
            name: tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
            for name, tensor in weights.items()
        }
    try:
        module.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        raise VugenError(
            f"{path} does not fit its own recipe: {' '.join(str(error).split())[:200]}"
        ) from error


@torch.no_grad()
def decode_images(
    vlm: FrozenVLM,
    autoencoder: Autoencoder,
    images: Tensor,
    seed: int,
    steps: int | None = None,
    numbers: Sequence[int] | None = None,
    solver: Solver | None = None,
) -> Tensor:
    """Images decoded from their own z̃: uint8 [B, 3, S, S] -> uint8 of the same shape, on the CPU.

    The noise of an image depends on the seed and its number alone; by default they count from 0.
    """
    numbers = range(len(images)) if numbers is None else numbers
    noise = torch.stack([seeded_noise(images.shape[1:], seed, "reconstruct", i) for i in numbers])
    with passes(vlm.recipe.sampling.precision, vlm.device)():
        latents = autoencoder.encode(vlm, images)
        return autoencoder.decode(latents, noise.to(latents.device), steps, solver).cpu()


def load_sampler(
    path: str | Path | None = None,
    vlm: str | None = None,
    device: torch.device | str = "cpu",
    allow_vlm_mismatch: bool = False,
    decoder: str | Path | None = None,
    adapters: Sequence[str] = (),
) -> Sampler:
    """Load a sampler checkpoint and the VLM it was trained on.

    Args:
        path: written by `vugen train-sampler`; or a folder of `vugen export`, or such a one on the hub,
            `hf:owner/name[@revision]`; default the bundled one, `nano`.
        vlm: where the VLM is now, if not where the card says.
        device: where to sample.
        allow_vlm_mismatch: take a VLM of other weights than it was trained on.
        decoder: a checkpoint whose decoder is to draw instead, of the same reducer: a distilled one, or for
            pictures of another size. `nano-128` is bundled, and draws latents of the bundled line at 128 px.
        adapters: added to the expert, each a file or `file:weight`; see `with_adapters`.

    Raises:
        VugenError: not a sampler, damaged, another VLM, a decoder of another reducer or for another grid, or
            another sampler's adapter.
    """
    path, vlm = located(path, vlm)
    tensors, card = drawing_checkpoint(path, decoder, adapters)
    autoencoder = stored_autoencoder(tensors, card, path, torch.device(device))
    frozen = vlm_of(card, path, vlm, device, allow_vlm_mismatch)
    expert = new_expert(frozen, card.latents, frozen.recipe.expert, empty=True)
    load_weights(expert, select(tensors, "expert"), path, assign=True)
    expert = expert.to(frozen.device).eval().requires_grad_(False)
    return Sampler(frozen, expert, autoencoder, card, path)


def drawing_checkpoint(
    path: Path, decoder: str | Path | None = None, adapters: Sequence[str] = ()
) -> tuple[dict[str, Tensor], Card]:
    """A sampler's tensors and card, with adapters added, and with the decoder that draws instead of its own.

    Args:
        path, decoder, adapters: see `load_sampler`.

    Raises:
        VugenError: as `load_sampler`.
    """
    tensors, card = load_checkpoint(path, "sampler")
    if adapters:
        tensors = with_adapters(tensors, adapters, path)
        card = card.model_copy(update={"adapters": [*(card.adapters or []), *adapters]})
    if decoder is None:
        return tensors, card
    theirs, other = decoder_checkpoint(decoder)
    if not same_reducer(tensors, theirs):
        raise VugenError(
            f"{decoder} decodes the latents of another reducer: give one that `vugen train-reducer` made by "
            f"--reducer or --distill from {path} or from the reducer it was trained on"
            + ("; the bundled sampler, whose it is, is --sampler nano" if str(decoder) == NANO_128 else "")
        )
    if other.latents.grid != card.latents.grid:
        raise VugenError(
            f"{decoder} is for pictures of {other.image_size} px, whose latents {path} did not learn: "
            f"train it further by `vugen train-sampler --init {path} --reducer {decoder}`"
        )
    drawing: dict[str, object] = {
        "recipe": {**card.recipe, "decoder": other.recipe["decoder"]},
        "decoder": str(decoder),
        "vae": other.vae,
        "image_size": other.image_size,
    }
    if other.image_size != card.image_size:  # what is drawn is compared with pictures of its size
        drawing["data"] = card.data.model_copy(update={"path": other.data.path})
    parts = ("autoencoder.", "vae.")
    tensors = {n: t for n, t in tensors.items() if not n.startswith(parts)}
    tensors |= {n: t for n, t in theirs.items() if n.startswith(parts)}
    return tensors, card.model_copy(update=drawing)


def decoder_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], Card]:
    """A checkpoint whose decoder is to draw; `nano-128`, of which only what is its own is bundled, whole.

    Raises:
        VugenError: as `load_checkpoint`.
    """
    if str(path) != NANO_128:
        return load_checkpoint(path)
    own, card = load_checkpoint(bundle("decoder-128.safetensors"))
    return load_checkpoint(bundle("sampler.safetensors"))[0] | own, card


def located(path: str | Path | None, vlm: str | None = None) -> tuple[Path, str | None]:
    """The checkpoint that `load_sampler` is asked for, and where its VLM is, if that is beside it.

    Raises:
        VugenError: it cannot be had from the hub.
    """
    if path is None or (str(path) == NANO and not Path(path).exists()):
        return bundle("sampler.safetensors"), vlm
    given = downloaded(str(path), "--sampler") if str(path).startswith(PREFIX) else Path(path)
    if not given.is_dir():
        return given, vlm
    beside = str((given / VLM).absolute()) if (given / VLM).is_dir() else None
    return given / WEIGHTS, vlm or beside


def merge(
    path: Path,
    adapters: Sequence[str],
    out: Path,
    vlm: str | None = None,
    decoder: str | Path | None = None,
) -> None:
    """Write a sampler with adapters added for good, or with another decoder: it draws what they drew as one.

    Args:
        path: of the sampler.
        adapters: see `with_adapters`.
        out: the checkpoint to write.
        vlm: where its VLM is, if not where its card says: the new card does.
        decoder: see `load_sampler`.

    Raises:
        VugenError: as `load_sampler`, or `out` is one of what is merged.
    """
    merged = [str(path), *(name for name, _ in map(parse, adapters)), *([str(decoder)] if decoder else [])]
    if out.resolve() in {Path(name).resolve() for name in merged}:
        raise VugenError(f"--out {out} is one of the files to merge: give the new one another name")
    tensors, card = drawing_checkpoint(path, decoder, adapters)
    if vlm:
        card = card.model_copy(update={"vlm": card.vlm.model_copy(update={"name": vlm})})
    save_checkpoint(out, tensors, card)


def save_sampler(sampler: Sampler, path: Path) -> None:
    """Write the checkpoint that `load_sampler` reads: every weight in float32, as it draws here."""
    save_autoencoder(
        sampler.autoencoder, path, sampler.card, with_prefix(sampler.expert.state_dict(), "expert")
    )


def new_expert(
    vlm: FrozenVLM, latents: LatentsCard, recipe: Expert, empty: bool = False
) -> GenerationExpert | DiTExpert:
    """An untrained generation expert on the VLM's device; an empty one to be filled, on the CPU.

    Args:
        vlm: whose decoder it copies, or whose hidden states it reads.
        latents: of a checkpoint's card: `channels` and `grid` of z̃.
        recipe: its kind, and where it starts from or its sizes.
        empty: it will be sharded, or all its weights are there: it stays on the CPU, and what starts from the
            VLM's weights is on `meta`, to be filled afterwards.

    Raises:
        VugenError: the recipe's sizes do not fit together.
    """
    if recipe.kind == "dit":
        layers, width = vlm.decoder.config.num_hidden_layers, vlm.decoder.config.hidden_size
        dit = DiTExpert(
            latents.channels,
            reads=spread(layers, recipe.depth or layers),
            prompt_width=width,
            width=recipe.width or width,
            heads=recipe.heads,
            mlp=recipe.mlp,
            reference=recipe.reference,
        )
        return dit if empty else dit.to(vlm.device)
    copied = GenerationExpert(
        vlm.decoder,
        latents.channels,
        latents.grid,
        fresh=recipe.init == "fresh",
        adaptive_norms=recipe.adaptive_norms,
        empty=empty,
        reference=recipe.reference,
    )
    return copied if empty else copied.to(vlm.device)


def try_expert(expert: GenerationExpert | DiTExpert, vlm: FrozenVLM, latents: LatentsCard) -> None:
    """Run a new expert once, on the empty prompt with padding, before anything is trained.

    What of a copied decoder no gradient reaches (an image encoder of its own, some biases of routers) is
    not trained: several processes would wait for its gradients.

    Raises:
        VugenError: the VLM's decoder, and so its copy, wants more than embeddings.
    """
    tokens = vlm.prompts.tokens("")
    prefix = vlm.prefix([tokens], len(tokens) + 1, hidden=expert.reads)  # padded, as a batch would be
    noised = torch.zeros(1, *latents.grid, latents.channels, device=vlm.device)
    try:
        expert(noised, torch.zeros(1, device=vlm.device), prefix).sum().backward()
    except Exception as error:  # of a copy, the decoder's own code
        if isinstance(expert, DiTExpert):
            raise
        raise VugenError(
            f"{vlm.name} has a decoder whose copy does not run on image tokens ({first_line(error)}): "
            "set expert.kind=dit"
        ) from error
    if isinstance(expert, GenerationExpert):
        for parameter in expert.decoder.parameters():
            parameter.requires_grad_(parameter.grad is not None)
    expert.zero_grad(set_to_none=True)


def load_vae(name: str, device: torch.device) -> FrozenVAE:
    """Load an `AutoencoderKL`.

    Args:
        name: a diffusers directory (of the VAE, or of a pipeline with a `vae` folder) or a hub id.
        device: where to put it.

    Raises:
        VugenError: there is none, the hub cannot be reached, or it is another kind of model.
    """
    from diffusers import AutoencoderKL

    path = Path(name)
    if path.is_dir() and (path / "vae" / "config.json").is_file():
        path = path / "vae"
    if not path.is_dir() and not may_be_id(name):
        raise VugenError(
            f"decoder.vae: no VAE at {name}: give a diffusers directory or a hub id (owner/name)"
        )
    local = path.is_dir() or not reach_hub(name, "decoder.vae:")
    try:
        source = str(path) if path.is_dir() else name
        config = AutoencoderKL.load_config(source, local_files_only=local)
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"it is a {config.get('_class_name', 'directory without a model')}")
        model = AutoencoderKL.from_pretrained(
            source,
            local_files_only=local,
            use_safetensors=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,  # True asks for accelerate, which we do without
        )
    except Exception as error:  # a foreign directory can fail in many ways
        reason = first_line(error)
        raise VugenError(f"decoder.vae: {name} could not be loaded as an AutoencoderKL: {reason}") from error
    return FrozenVAE(model.to(device), name)


def stored_vae(card: VAECard, weights: dict[str, Tensor], device: torch.device) -> FrozenVAE:
    """The VAE that a checkpoint holds.

    Args:
        card: from `FrozenVAE.card`.
        weights: its state dict.
        device: where to put it.
    """
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_config(card.config)
    model.load_state_dict(weights)
    return FrozenVAE(model.to(device), card.name)
