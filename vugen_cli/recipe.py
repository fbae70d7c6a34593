"""The typed recipe: one YAML file for a whole run, `--set a.b=v` overrides, and errors that name the fix.

Every number that shapes a run lives here; the resolved recipe is stored in every checkpoint.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vugen_cli.errors import VugenError

RECIPES = Path(__file__).parent / "recipes"
NO_MIDPOINT = (
    "decoder.solver=midpoint: a pixel decoder predicts the clean picture, past which midpoint's last step "
    "goes; take heun, which is of order 2 too"
)
USE_OF_VLM = ("vlm_size", "vlm_dtype", "latents", "instruction")  # keys that decide what z and prefix are


Precision = Literal["auto", "float32", "tf32", "bfloat16"]
Time = Literal["uniform", "logit-normal"]


class Section(BaseModel):
    """A part of the recipe; unknown keys are refused, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = str(
            cls.model_fields[str(info.field_name)].annotation
        )  # YAML reads `off` as false, pydantic as 0
        if isinstance(value, bool) and "bool" not in kinds and ("int" in kinds or "float" in kinds):
            raise ValueError("yes, no, on, off, true and false are no numbers")
        return value


class MixtureSource(Section):
    """One data set of a mixture."""

    path: str = Field(description="a data set written by `vugen prepare`")
    weight: float = Field(1.0, gt=0, description="how often it is drawn from, beside the others")


class Data(Section):
    """What the loader does with a data set."""

    flip: bool = Field(False, description="mirror half of the images; wrong where captions say left or right")
    shuffle: PositiveInt = Field(10_000, description="samples shuffled together, in whole shards")
    mixture: list[MixtureSource] = Field(
        [], description="data sets to draw from by weight, where no --data is given; see docs/data.md"
    )
    max_corrupt: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of damaged samples, among 10,000 or of a shard to be cached, that ends a run",
    )
    workers: int = Field(1, ge=0, description="decoding processes; 0 decodes in the training process")


class NanoVLM(Section):
    """Sizes of the small vision-language model that `vugen train-vlm` trains from scratch."""

    vision_width: PositiveInt = 192
    vision_layers: PositiveInt = 6
    vision_heads: PositiveInt = 3
    patch: PositiveInt = 8
    width: PositiveInt = 256
    layers: PositiveInt = 6
    heads: PositiveInt = 4
    mlp: PositiveInt = 704
    vocabulary: PositiveInt = 1024
    vision_steps: int = Field(0, ge=0, description="first steps that train the vision encoder alone")
    words_weight: float = Field(
        0.5, ge=0, description="weight of predicting the caption's words from the image"
    )
    pixels_weight: float = Field(
        1.0, ge=0, description="weight of reconstructing each patch from its own latent"
    )


class Layers(Section):
    """z from several layers of the VLM's vision tower (arXiv 2605.18324), not what its projector reads."""

    layers: Annotated[str, Field(pattern=r"^last [1-9]\d*$")] | Annotated[list[int], Field(min_length=1)] = (
        Field("last 4", description="`last 4`, or numbers from 0 (the first) or from -1 (the last)")
    )
    how: Literal["sum", "stack"] = Field("sum", description="add them up, or lay their channels side by side")


class Reducer(Section):
    """How z [B, h, w, d] becomes z̃ [B, h, w, channels]."""

    kind: Literal["linear", "mlp", "attention", "pca", "identity", "vae"] = Field(
        "linear",
        description="`pca` is fitted, `identity` keeps all of z, `vae` takes the latents of decoder.vae "
        "instead of z (the paper's baseline); the others are trained",
    )
    channels: PositiveInt = Field(16, description="of z̃; `identity` and `vae` keep theirs")
    merge: Literal[1, 2] = Field(1, description="2 folds 2 x 2 places of the grid into one, before all else")
    hidden: PositiveInt = Field(512, description="hidden width of the mlp and attention reducers")
    layers: PositiveInt = Field(2, description="transformer blocks of the attention reducer")
    heads: PositiveInt = Field(8, description="of the attention reducer")
    normalise: Literal["channel", "kl"] = Field(
        "channel", description="what keeps z̃ at one scale while it trains; see docs/decoders.md"
    )
    penalty: float = Field(1e-3, ge=0, description="weight of the `kl` term")

    @property
    def trained(self) -> bool:
        """Whether stage 1 trains the reducer; one that is not is fitted before the decoder trains."""
        return self.kind not in ("pca", "identity", "vae")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Reducer":
        if self.kind == "attention" and (self.hidden % self.heads or self.hidden % 4):
            raise ValueError("reducer.hidden must be a multiple of 4 and of reducer.heads")
        if not self.trained and self.normalise != "channel":
            raise ValueError(f"reducer.normalise must be channel where reducer.kind is {self.kind}")
        return self


# The SSDD ladder (arXiv 2510.04961): S 13.4, B 20, M 48, L 85 million parameters; ours are within 5%.
# One token of the middle transformer covers 8 x 8 pixels in all of them.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"patch": 4, "channels": [96, 160], "blocks": 1, "middle_layers": 4, "heads": 5},
    "S": {"patch": 2, "channels": [64, 128, 192], "blocks": 2, "middle_layers": 8, "heads": 3},
    "B": {"patch": 2, "channels": [64, 128, 256], "blocks": 2, "middle_layers": 7, "heads": 4},
    "M": {"patch": 2, "channels": [96, 192, 384], "blocks": 2, "middle_layers": 8, "heads": 6},
    "L": {"patch": 2, "channels": [128, 256, 512], "blocks": 2, "middle_layers": 8, "heads": 8},
}


class PictureLosses(Section):
    """Weights of losses that look at whole pictures; 0 leaves one out."""

    perceptual: float = Field(
        0.0, ge=0, description="1 - cosine between what the VLM's own encoder sees in the two pictures"
    )
    lpips: float = Field(0.0, ge=0, description="LPIPS; its weights are taken from torch's hub folder")
    gradient: float = Field(
        0.0, ge=0, description="mean |error| of the differences of neighbouring pixels (arXiv 1511.05440)"
    )


class DecoderLosses(PictureLosses):
    """Weights of what the decoder learns from beside flow matching (weight 1); 0 leaves a term out."""

    repa: float = Field(0.0, ge=0, description="1 - cosine between the decoder's middle features and z")


class Decoder(Section):
    """From z̃ to pixels: pixel diffusion (PDD), a U-Net with a transformer in the middle, or latent diffusion
    that ends in a VAE (LDM).
    """

    kind: Literal["pdd", "ldm"] = "pdd"
    vae: str | None = Field(
        None, description="of the LDM decoder and of reducer.kind=vae: a diffusers directory or a hub id"
    )
    denoiser: Literal["unet", "dit"] = Field(
        "unet",
        description="of the LDM decoder; a DiT has middle_layers blocks as wide as the last of channels",
    )
    preset: Literal["nano", "S", "B", "M", "L"] | None = Field(
        None, description="sets patch, channels, blocks, middle_layers and heads, where they are not given"
    )
    patch: PositiveInt = Field(4, description="pixels folded into channels before the first convolution")
    channels: list[PositiveInt] = Field(
        [96, 160], min_length=1, description="width of each level, finest first; multiples of 8"
    )
    blocks: PositiveInt = Field(1, description="residual blocks a level, down and up")
    middle_layers: PositiveInt = 4
    heads: PositiveInt = Field(5, description="must divide the last of channels")
    steps: PositiveInt = Field(4, description="ODE steps when decoding")
    solver: Literal["euler", "heun", "midpoint"] = Field(
        "euler", description="ODE solver when decoding; `midpoint` is the ldm's alone"
    )
    time: Time | None = Field(None, description="how training times are drawn; default: as flow.time says")
    shift: float = Field(
        2.0, gt=0, description="moves times, of training and of decoding, towards the noise end if > 1"
    )
    weighting: Literal["velocity", "balanced", "clean"] = Field(
        "velocity",
        description="of the square of the pdd's clean prediction: by 1 / (1 - t)², which is the velocity's "
        "square, by 1 / (1 - t), or not at all; the ldm always takes the velocity's",
    )
    noise: float = Field(
        0.1, ge=0, description="largest standard deviation of the noise added to z̃ in training"
    )
    losses: DecoderLosses = DecoderLosses()
    smoothing: float = Field(
        0.0,
        ge=0,
        description="of the pdd's pictures: differences of neighbouring pixels far below this many of 255 "
        "levels are evened out before rounding, which would make grain of them; larger ones stay",
    )
    trained: Literal["all", "outer"] = Field(
        "all",
        description="`outer`: the pdd's first and last layers alone, for larger pictures; the others are the "
        "checkpoint's",
    )
    image_size: PositiveInt | None = Field(None, description="pixels a side; default: that of the data set")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        preset = PRESETS.get(str(values.get("preset")), {}) if isinstance(values, dict) else {}
        return {**preset, **values} if preset else values

    @model_validator(mode="after")
    def _solver_ends_on_the_picture(self) -> "Decoder":
        if self.kind == "pdd" and self.solver == "midpoint":
            raise ValueError(NO_MIDPOINT)
        return self

    @model_validator(mode="after")
    def _group_norms_share_channels(self) -> "Decoder":
        if not (self.kind == "ldm" and self.denoiser == "dit") and any(c % 8 for c in self.channels):
            raise ValueError("decoder.channels must be multiples of 8")
        return self


class VAE(Section):
    """Sizes of the small autoencoder that `vugen train-vae` trains from scratch."""

    channels: PositiveInt = Field(4, description="of its latents")
    widths: list[Annotated[int, Field(gt=0, multiple_of=8)]] = Field(
        [32, 64, 96, 128],
        min_length=1,
        description="of each level, multiples of 8; every level but the first halves the grid",
    )
    blocks: PositiveInt = Field(1, description="residual blocks a level")
    kl: float = Field(1e-3, ge=0, description="weight of KL beside the pixels' mean square error")
    losses: PictureLosses = PictureLosses()


class Expert(Section):
    """The generation expert: the image tokens' own copy of the language model's decoder, or a diffusion
    transformer of any size that reads the decoder's hidden states.
    """

    kind: Literal["copy", "dit"] = Field(
        "copy",
        description="`copy` needs a decoder whose layers all keep keys and values; `dit` works beside any",
    )
    init: Literal["vlm", "fresh"] = Field(
        "vlm", description="of the copy: start from the VLM's weights or from noise"
    )
    adaptive_norms: bool = Field(
        False, description="of the copy: scale and shift each norm by the time; at first they change nothing"
    )
    reference: bool | Literal["only"] = Field(
        False,
        description="read z̃ of a prompt's pictures too, as clean tokens beside the noised ones; `only`: and "
        "leave the pictures out of what the VLM reads",
    )
    width: PositiveInt | None = Field(None, description="of the DiT; default: the VLM decoder's")
    depth: PositiveInt | None = Field(None, description="blocks of the DiT; default: the decoder's layers")
    heads: PositiveInt | None = Field(None, description="of the DiT; default: one for every 64 of its width")
    mlp: PositiveInt | None = Field(
        None, description="inner width of the DiT's SwiGLU; default: 8/3 of its width"
    )

    @model_validator(mode="after")
    def _sizes_are_of_the_dit(self) -> "Expert":
        if self.kind == "copy" and (self.width or self.depth or self.heads or self.mlp):
            raise ValueError(
                "a copy has the sizes of the VLM's decoder: for expert.width, depth, heads or mlp set "
                "expert.kind=dit"
            )
        if self.kind == "dit" and self.adaptive_norms:
            raise ValueError("expert.adaptive_norms is of expert.kind=copy: a dit has its own, leave it out")
        return self


class Flow(Section):
    """Flow matching of z̃: how training times are drawn."""

    time: Time = "logit-normal"
    shift: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1.0,
        description="moves training and sampling times towards the noise end if > 1; `auto`: "
        "max(1, √(h w c / 4096)) (arXiv 2510.11690), which the sampler's checkpoint then holds as a number",
    )

    def shift_of(self, grid: tuple[int, int], channels: int) -> float:
        """The shift, where it is `auto` by RAE's rule: the more numbers say a thing, the more noise hides it.

        Args:
            grid: (h, w) of z̃.
            channels: c of z̃.
        """
        if self.shift == "auto":
            return max(1.0, (grid[0] * grid[1] * channels / 4096) ** 0.5)
        return self.shift


class Sampling(Section):
    """Defaults of `vugen sample`, stored in the sampler's checkpoint."""

    steps: PositiveInt = 25
    guidance: float = Field(3.0, ge=0)
    image_guidance: float = Field(
        1.5, ge=0, description="by the pictures of a prompt, as guidance is by its text (arXiv 2211.09800)"
    )
    guidance_interval: tuple[float, float] = Field(
        (0.0, 1.0),
        description="times, from noise (0) to data (1), between which samples are guided (arXiv 2404.07724); "
        "outside, the second pass of the expert is saved",
    )
    solver: Literal["euler", "heun", "midpoint"] = "euler"
    precision: Precision = Field(
        "auto", description="of drawing, reconstruction and previews; `auto`: bfloat16 on GPUs that have it"
    )

    @field_validator("guidance_interval")
    @classmethod
    def _check_interval(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError("must be two times with 0 <= first < second <= 1")
        return interval


class Training(Section):
    """One stage's optimisation. Times are in optimiser steps."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 64
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="`muon`: orthogonal steps for the matrices of the repeated layers (arXiv 2502.16982), "
        "AdamW for all else; not for shares of matrices (fsdp)",
    )
    lr: float = Field(1e-3, gt=0)
    muon_lr: float | None = Field(
        None, gt=0, description="of muon's matrices, whose steps are as large as AdamW's; default: lr"
    )
    warmup: int = Field(100, ge=0)
    cooldown: float = Field(
        0.3, ge=0, le=1, description="last part of the steps, over which lr falls to zero"
    )
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights that are saved for use")
    precision: Precision = Field(
        "auto", description="`auto`: bfloat16 where the hardware has it; see docs/scaling.md"
    )
    checkpoint_every: PositiveInt = 500
    preview_every: PositiveInt = 1000
    keep_every: int = Field(
        0,
        ge=0,
        description="steps between checkpoints that stay in the run's folder, for scores over training",
    )


class SamplerTraining(Training):
    """Of stage 2, which alone reads prompts."""

    prompt_dropout: float = Field(
        0.1, ge=0, lt=1, description="samples trained without a prompt, for guidance"
    )
    text_dropout: float = Field(
        0.05, ge=0, lt=1, description="edits trained with their pictures alone, for guidance by each"
    )
    picture_dropout: float = Field(0.05, ge=0, lt=1, description="edits trained with their text alone")
    repa: float = Field(
        0.0,
        ge=0,
        description="1 - cosine between z and what half of the expert's layers tell of it (REPA), over the "
        "first 60% of the steps; reads images, not a latent cache",
    )
    opposites: float = Field(
        0.0,
        ge=0,
        description="by how much captions that say left, right, above or below should fit better than with "
        "the opposite word: what binds subjects to their sides",
    )

    @model_validator(mode="after")
    def _some_prompts_are_whole(self) -> "SamplerTraining":
        if self.prompt_dropout + self.text_dropout + self.picture_dropout >= 1:
            raise ValueError(
                "prompt_dropout, text_dropout and picture_dropout together leave no whole prompt"
            )
        return self


class Captioning(Section):
    """What `vugen caption` asks the VLM for: a caption by each instruction, of several lengths."""

    instructions: list[str] = Field(
        [
            "Describe the picture in one short sentence.",
            "Describe the picture in two or three sentences.",
            "Describe the picture in detail: what is in it, how many of each, their colours and places, the "
            "background, the light and the style.",
        ],
        min_length=1,
    )
    tokens: PositiveInt = Field(256, description="longest caption")


# What of `decoder` says nothing of its weights.
DECODING = {
    "steps",
    "solver",
    "time",
    "shift",
    "weighting",
    "noise",
    "losses",
    "smoothing",
    "trained",
    "image_size",
}

# Instead of the sampler's own, where an adapter is trained on tens of pictures: minutes on two cores.
ADAPTER_TRAINING = {
    "steps": 300,
    "batch_size": 16,
    "optimizer": "adamw",
    "lr": 8e-3,
    "warmup": 20,
    "cooldown": 0.3,
    "weight_decay": 0.0,
    "ema": 0.98,
    "checkpoint_every": 100,
    "preview_every": 150,
    "keep_every": 0,
    "repa": 0.0,
}


class Engine(Section):
    """How the work is spread; a resumed run may change all of it."""

    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="with several processes: every one has all weights, or (fsdp) a share of the expert's",
    )
    mesh: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="with fsdp, `[replicas, shards]` (HSDP): weights are shared out over `shards` processes "
        "next to each other, a node's say, and gradients averaged over the replicas; null: all share",
    )
    shard_vlm: bool = Field(False, description="share out the frozen VLM's weights too, with fsdp")
    offload: bool = Field(
        False, description="with fsdp, keep weights, average and optimiser in CPU memory, to save the GPU's"
    )
    accumulate: PositiveInt = Field(1, description="parts of a batch that follow one another, to save memory")
    recompute: bool = Field(False, description="compute the expert's activations twice, to save memory")
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile of the expert's layers and of the pixel decoder; `auto`: on GPUs, and on "
        "CPUs the expert's layers in runs of 1000 steps or more",
    )

    @model_validator(mode="after")
    def _only_fsdp_has_shards(self) -> "Engine":
        given = [key for key in ("mesh", "shard_vlm", "offload") if getattr(self, key)]
        if given and self.strategy != "fsdp":
            raise ValueError(
                f"engine.{given[0]} is for shares of weights: set engine.strategy=fsdp, or leave it out"
            )
        return self


class Recipe(Section):
    """A whole run, from the VLM to the samples."""

    name: str = "nano"
    seed: int = Field(0, ge=0, lt=2**43)  # times a million and more it must fit 63 bits
    vlm: str = Field("nano", description="`nano` (bundled), a Hugging Face directory, or a hub id")
    vlm_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision in which the frozen VLM is kept and run"
    )
    vlm_size: PositiveInt | None = Field(
        None, description="pixels a side at which the VLM sees images; default: its image processor's"
    )
    latents: Literal["encoder", "projector"] | Layers = Field(
        "encoder",
        description="z is what the VLM's projector reads, or what it gives, or several layers of its vision "
        "tower",
    )
    instruction: str = Field(
        "{prompt}", pattern=r"\{prompt\}", description="what the VLM is told, as in `Draw {prompt}.`"
    )
    prompt_tokens: PositiveInt = Field(
        128,
        description="longest prompt, in tokens of its own text: longer captions are cut in training, and "
        "`vugen sample` refuses longer prompts",
    )
    data: Data = Data()
    nano_vlm: NanoVLM = NanoVLM()
    reducer: Reducer = Reducer()
    decoder: Decoder = Decoder()
    vae: VAE = VAE()
    expert: Expert = Expert()
    flow: Flow = Flow()
    sampling: Sampling = Sampling()
    caption: Captioning = Captioning()
    engine: Engine = Engine()
    log: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="where a run's numbers go beside metrics.jsonl; each is an extra of the package"
    )
    train_vlm: Training = Training()
    train_judge: Training = Training()
    train_vae: Training = Training()
    train_reducer: Training = Training()
    train_sampler: SamplerTraining = SamplerTraining()

    @model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        if self.decoder.channels[-1] % self.decoder.heads:
            raise ValueError("decoder.heads must divide the last of decoder.channels")
        if (self.decoder.kind == "ldm" or self.reducer.kind == "vae") and not self.decoder.vae:
            raise ValueError("decoder.vae is missing: name a VAE, or make one with `vugen train-vae`")
        if self.decoder.kind == "ldm" and any(self.decoder.losses.model_dump().values()):
            raise ValueError("decoder.losses see pixels: with decoder.kind=ldm set them to 0")
        if self.data.flip and self.train_sampler.opposites:
            raise ValueError("data.flip mirrors what train_sampler.opposites teaches: set one of them off")
        return self


def load_recipe(path: str | Path | None = None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file, the name of a shipped recipe (`nano`, `imagenet-256`), or None for `nano`.
        overrides: `a.b=v` strings; the value is read as YAML, so `1e-3`, `true` and `[64, 128]` work.

    Raises:
        VugenError: the file is missing or not YAML, a key is unknown (the nearest known one is named), or a
            value does not fit.
    """
    file = find_recipe("nano" if path is None else path)
    return parse_recipe(_read_yaml(file), str(file), overrides)


class _OneOfEach(yaml.SafeLoader):
    """Refuses a key that a section says twice: YAML would drop the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As a safe loader's, before what `<<` brings in is there."""
        node, said = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in said:
                    raise yaml.composer.ComposerError(
                        problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                    )
                said.add(key.value)
        return node


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        # A safe loader of our own, which builds nothing but plain values.
        values = yaml.load(file.read_text(encoding="utf-8-sig"), _OneOfEach) or {}
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # a date that is none, say
        raise VugenError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise VugenError(f"{file} is not a recipe: expected `key: value` lines at the top level")
    return values


class ResolvedRecipe(BaseModel):
    """A recipe with every value, and where each comes from."""

    recipe: dict[str, Any] = Field(description="every value, as checkpoints keep it")
    origins: dict[str, str] = Field(
        description="of each value, by its key: `default`, `--set`, `decoder.preset`, or the file"
    )


def resolve_recipe(path: str | Path | None = None, overrides: list[str] | None = None) -> ResolvedRecipe:
    """As `load_recipe`, with where each value comes from."""
    file = find_recipe("nano" if path is None else path)
    given = _read_yaml(file)
    recipe = parse_recipe(given, str(file), overrides)  # adds the overrides to `given`
    said, shipped = {key for key, _ in leaves(given)}, file.parent == RECIPES
    overridden = tuple(override.partition("=")[0].strip() for override in overrides or [])

    def origin(key: str) -> str:
        if any(key == each or key.startswith(f"{each}.") for each in overridden):
            return "--set"
        if any(key == each or key.startswith(f"{each}.") for each in said):
            return file.name if shipped else str(file)
        of_preset = recipe.decoder.preset and key in [f"decoder.{size}" for size in PRESETS["nano"]]
        return "decoder.preset" if of_preset else "default"

    values = recipe.model_dump(mode="json")
    return ResolvedRecipe(recipe=values, origins={key: origin(key) for key, _ in leaves(values)})


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested sections, each with its key as `--set` takes it."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def find_recipe(path: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    for candidate in (Path(path), RECIPES / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
    raise VugenError(f"no recipe at {path}: give a YAML file or one of the shipped recipes ({shipped})")


def parse_recipe(values: dict[str, Any], where: str, overrides: list[str] | None = None) -> Recipe:
    """Validate plain values (from YAML or from a checkpoint's card) after applying `a.b=v` overrides."""
    said = {override.partition("=")[0].strip() for override in overrides or []}
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise VugenError(f"--set {override}: expected key=value, as in train_sampler.lr=1e-4")
        *parents, leaf = key.strip().split(".")
        section = values
        for parent in parents:
            inner = section.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise VugenError(f"--set {override}: {parent} is a value, not a section")
            section[parent] = section = dict(inner)  # an anchor of YAML may share it with others
        try:
            value = yaml.safe_load(text)
            section[leaf] = value if text.startswith(('"', "'")) else _number(value)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise VugenError(f"--set {override:.80}: the value is not YAML; put text in quotes") from error
        if (
            key.strip() == "decoder.preset"
        ):  # replaces the sizes that the file gives, not those of other overrides
            for size in PRESETS["nano"]:
                if f"decoder.{size}" not in said:
                    section.pop(size, None)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise VugenError(_explain(error, where, overrides or [])) from error


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError, where: str, overrides: list[str]) -> str:
    """The first problem of a recipe as one line; `where` it is, unless one of the overrides said it."""
    first = error.errors()[0]
    # Of a value of several kinds, the kind that got furthest; its own name (`Layers`) is no part of the key.
    first = max((e for e in error.errors() if e["loc"][:1] == first["loc"][:1]), key=lambda e: len(e["loc"]))
    unknown = [first["loc"][-1]] if first["type"] == "extra_forbidden" else []  # in the user's own words
    parts = first["loc"][: len(first["loc"]) - len(unknown)]
    kinds = re.compile(r"[A-Z\[-]|^(bool|int|float|str)$")
    first["loc"] = (*(part for part in parts if not kinds.search(str(part))), *unknown)
    key = ".".join(str(part) for part in first["loc"])
    for override in overrides:
        said = override.partition("=")[0].strip()
        within = f"{key}.".startswith(f"{said}.")
        if within or (key and said.startswith(f"{key}.") and said in first["msg"]):
            where = f"--set {override}"
    if first["type"] == "extra_forbidden":
        parents = first["loc"][:-1]
        known = _keys(parents)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.0)
        if parents and first["loc"][-1] in SamplerTraining.model_fields:
            parents, near = ("train_sampler",), [str(first["loc"][-1])]
        return f"{where}: unknown recipe key `{key}`; did you mean `{'.'.join([*map(str, parents), *near])}`?"
    return f"{where}: recipe key `{key or 'recipe'}`: {first['msg']} (got {first.get('input')!r:.80})"


def _keys(parents: tuple[Any, ...]) -> list[str]:
    section: Any = Recipe
    for parent in parents:
        if isinstance(parent, int):  # an entry of a list, whose kind was found with the list
            continue
        annotation = section.model_fields[parent].annotation
        section = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
    return list(section.model_fields)
