"""The frozen vision-language model: images to latents z, prompts to a prefix of keys and values.

Nothing here changes a weight: parameters do not require gradients and every pass runs without autograd.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vugen_cli.card import Card, VLMCard
from vugen_cli.checkpoint import combined_digest, weight_digests
from vugen_cli.data.shapes import Shape
from vugen_cli.errors import VugenError, first_line
from vugen_cli.files import bundle
from vugen_cli.hub import FILES, PREFIX, downloaded, may_be_id, reach_hub
from vugen_cli.recipe import Layers, Recipe, parse_recipe
from vugen_cli.vlm.latents import (
    Tap,
    canvas,
    find_layers,
    find_tap,
    read_latents,
    resized,
    to_grid,
    vision_inputs,
)
from vugen_cli.vlm.pictured import first_free, picture_inputs, run_vlm
from vugen_cli.vlm.prefix import Prefix, layer_inputs
from vugen_cli.vlm.prompts import Prompt, Prompts, pictures_of
from vugen_cli.vlm.refusals import refuse

PICTURES = "pictures in a prompt"  # what messages call them
WORDS = "words.json"  # in the directory of a VLM that lists the words of its captions
PROBE = 224  # pixels a side of the picture, darker to the left, that shows where z is read
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that keep keys and values


class FrozenVLM:
    """A Hugging Face image-text-to-text model used for its latents and its prompt states.

    Args:
        name: as the user gave it; stored in checkpoints.
        model, processor: the transformers objects.
        recipe: says how the VLM is used.
        digests: of its weights, from `weight_digests`; default computed. None are kept of a model on `meta`.

    Attributes:
        name: as the user gave it; stored in checkpoints.
        model, processor: the transformers objects.
        decoder: the language model's stack of layers.
        fingerprint: a hash over the names, shapes and values of the weights.
        vision: the same over those that z depends on alone.
        prompts: turns prompts into token ids.
        words: every word of the captions it was trained on, where its directory lists them.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        processor: Any,
        recipe: Recipe | None = None,
        digests: dict[str, bytes] | None = None,
    ):
        self.name, self.model, self.processor = name, model.eval().requires_grad_(False), processor
        self.recipe = recipe or Recipe()
        refuse(model, name)
        self.decoder: Any = stack_of(model)
        self.device: torch.device = next(model.parameters()).device
        self._digests = weight_digests(model) if digests is None else digests
        self.fingerprint = combined_digest(self._digests)
        self._canvas: dict[Shape, Shape] = {}  # see `canvas`
        self.words: frozenset[str] | None = None
        template = getattr(processor, "chat_template", None)  # where older files keep it
        if template and not processor.tokenizer.chat_template:
            processor.tokenizer.chat_template = template
        self.prompts = Prompts(
            processor.tokenizer,
            name,
            self.recipe.instruction,
            self.recipe.prompt_tokens,
            getattr(self.decoder.config, "max_position_embeddings", None),
        )

    @cached_property
    def taps(self) -> list[Tap]:
        """Where z is read, in one place or in several; found by showing the model one picture.

        Raises:
            VugenError: the vision side cannot be used.
        """
        ramp = torch.linspace(0, 255, PROBE).to(torch.uint8).expand(1, 3, PROBE, PROBE).contiguous()
        latents, any_size = self.recipe.latents, bool(self.recipe.vlm_size)
        with self._vision(), torch.no_grad():
            inputs = self.vision_inputs(ramp)
            if isinstance(latents, Layers):
                return find_layers(self.model, inputs, latents.layers, any_size)
            return [find_tap(self.model, inputs, latents, any_size)]

    @cached_property
    def vision(self) -> str:
        """A hash over those weights that z depends on alone, whatever the language side was trained to."""
        behind = [self.decoder, self.model.get_output_embeddings()]  # what z does not pass through
        behind += [tap.module for tap in self.taps if tap.key is not None]
        left_out = {
            id(tensor)
            for part in behind
            if part is not None
            for tensor in part.state_dict(keep_vars=True).values()
        }
        weights = self.model.state_dict(keep_vars=True)
        return combined_digest({n: d for n, d in self._digests.items() if id(weights[n]) not in left_out})

    def vision_inputs(self, images: Tensor) -> dict[str, Any]:
        """What the vision side is given for images, uint8 [B, 3, H, W]."""
        images = images.to(self.device)
        shape = (images.shape[-2], images.shape[-1])
        if shape not in self._canvas:
            self._canvas[shape] = (
                shape if self.recipe.vlm_size else canvas(self.processor.image_processor, shape)
            )
        if self._canvas[shape] != shape:
            images = resized(images, self._canvas[shape])
        inputs = vision_inputs(self.processor.image_processor, images, self.recipe.vlm_size)
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return {
            k: v.to(self.model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()
        }

    @contextmanager
    def _vision(self, what: str = "images") -> Iterator[None]:
        """Whatever goes wrong in the vision side's own code comes out as one line."""
        try:
            yield
        except VugenError:
            raise
        except Exception as error:  # as many kinds as there are families
            size = self.recipe.vlm_size
            where = f" at {size} px (recipe key vlm_size)" if size else ""
            raise VugenError(f"{self.name} cannot read {what}{where}: {first_line(error)}") from error

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """z: what the model's own projector reads, or gives if the recipe says `latents: projector`.

        Args:
            images: uint8 [B, 3, H, W].

        Returns:
            float32 [B, h, w, d].

        Raises:
            VugenError: the vision side cannot be used, or not at the recipe's `vlm_size`.
        """
        with self._vision():
            return self.read(self.vision_inputs(images), len(images))

    def read(self, inputs: dict[str, Any], batch: int) -> Tensor:
        """z of what the vision side is given, float32 [B, h, w, d]; with a gradient, if the inputs have one.

        Args:
            inputs: from `vision_inputs`.
            batch: B.
        """
        taps = self.taps
        states = read_latents(self.model, taps, inputs, batch, bool(self.recipe.vlm_size))
        grids = [
            to_grid(tokens, inputs, batch, self.model, tap).float()
            for tokens, tap in zip(states, taps, strict=True)
        ]
        if isinstance(self.recipe.latents, Layers) and self.recipe.latents.how == "stack":
            return torch.cat(grids, -1)
        return torch.stack(grids).sum(0) if len(grids) > 1 else grids[0]

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of a prompt that no training caption had; none for a VLM that does not list its words."""
        if self.words is None:
            return []
        return [word for word in dict.fromkeys(words_of(prompt)) if word not in self.words]

    @torch.no_grad()
    def prefix(
        self,
        prompts: Sequence[str | list[int] | Prompt],
        length: int | None = None,
        multiple: int = 1,
        hidden: Sequence[int] | None = None,
    ) -> Prefix:
        """Keys and values of some prompts in every layer; the empty prompt is the unconditional one.

        Args:
            prompts: texts, put into the chat template, or their token ids; with pictures as a `Prompt`.
            length: pad to this many tokens; default the longest of the prompts,
            multiple: rounded up to a multiple of this.
            hidden: instead of keys and values, the inputs of the layers of these numbers.

        Raises:
            VugenError: a prompt is too long, the decoder has layers without keys and values, or the VLM does
                not read pictures in a prompt.
        """
        if any(map(pictures_of, prompts)):
            return self._mixed(prompts, length, multiple, hidden)
        asked = [p.text if isinstance(p, Prompt) else p for p in prompts]
        rows = [self.prompts.tokens(p) if isinstance(p, str) else p for p in asked]
        length = length or -(-max(map(len, rows)) // multiple) * multiple
        # Padded on the right whatever the tokenizer is set to: positions are then those of each prompt alone.
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        if self.device.type == "cuda":  # from where the copy need not be waited for
            ids, mask = ids.pin_memory(), mask.pin_memory()
        ids, mask = ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)
        # A causal decoder never sees the padding that follows a prompt, and counts positions from the left:
        # without a mask, transformers need not ask the device whether any is padded.
        inputs = {"input_ids": ids}
        if self._reads_both_ways:
            # PaliGemma reads its prompt both ways; left to itself, transformers does so only without padding.
            visible = torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device)
            visible = visible.masked_fill(~mask, torch.finfo(visible.dtype).min)[:, None, None]
            inputs["attention_mask"] = visible.expand(-1, -1, length, -1)
            inputs["position_ids"] = torch.arange(length, device=self.device).repeat(len(rows), 1)
        read = self._read(partial(self.decoder, **inputs), hidden)
        return Prefix(*read[:2], mask, any(len(row) < length for row in rows), read[2])

    @property
    def _reads_both_ways(self) -> bool:
        # Gemma 4's "vision": pictures are read both ways, texts are not.
        return getattr(self.decoder.config, "use_bidirectional_attention", False) in (True, "all")

    def _mixed(
        self,
        prompts: Sequence[str | list[int] | Prompt],
        length: int | None,
        multiple: int,
        hidden: Sequence[int] | None,
    ) -> Prefix:
        """The prefix of prompts of which some have pictures: those with pictures alike are read together."""
        groups: dict[Any, list[int]] = {}
        kinds: list[tuple[Any, ...]] = [tuple(picture.shape for picture in pictures_of(p)) for p in prompts]
        apart = sum(map(bool, kinds)) > 1 and self._reads_one_by_one
        for i, kind in enumerate(kinds):
            groups.setdefault((*kind, i) if kind and apart else kind, []).append(i)
        parts = [
            self._pictured([p for i in rows if isinstance(p := prompts[i], Prompt)], hidden)
            if kind
            else self.prefix([prompts[i] for i in rows], hidden=hidden)
            for kind, rows in groups.items()
        ]
        length = length or -(-max(part.mask.shape[1] for part in parts) // multiple) * multiple
        order = torch.tensor([i for rows in groups.values() for i in rows], device=self.device).argsort()
        return Prefix.join([part.widened(length) for part in parts]).rows(order)

    @cached_property
    def _reads_one_by_one(self) -> bool:
        """Whether a prompt with pictures is another one beside others: where padding is read too (PaliGemma's
        decoder, InstructBLIP's Q-Former), or where the pictures of a batch are counted through (HunYuan)."""
        if self._reads_both_ways:
            return True
        inputs = self.picture_inputs([Prompt("", (torch.zeros(3, 64, 64, dtype=torch.uint8),))] * 2)
        if "qformer_input_ids" in inputs:
            return True
        with self._vision(PICTURES):
            one, two = run_vlm(self.model, self.decoder, inputs, use_cache=False).unbind(1)
        return not torch.equal(one, two)

    def _pictured(self, prompts: list[Prompt], hidden: Sequence[int] | None) -> Prefix:
        """The prefix of prompts with pictures of the same number and sizes."""
        inputs = self.picture_inputs(prompts)
        positions: list[Tensor] = []

        def run(**cache: Any) -> None:
            with self._vision(PICTURES):
                positions.append(run_vlm(self.model, self.decoder, inputs, **cache))

        keys, values, states = self._read(run, hidden)
        mask = inputs["attention_mask"].bool()
        if any(read.shape[-2] != mask.shape[1] for read in (*keys, *states)):
            raise VugenError(
                f"{self.name} cannot read {PICTURES}: it does not put them among the prompt's tokens"
            )
        start = first_free(positions[0], mask)
        return Prefix(keys, values, mask, not bool(mask.all()), states, start)

    def picture_inputs(self, prompts: list[Prompt]) -> dict[str, Any]:
        """What the VLM reads of prompts with as many pictures each; see `pictured.picture_inputs`.

        Raises:
            VugenError: a prompt's text is too long, or its processor does not take the pictures.
        """
        for prompt in prompts:
            self.prompts.tokens(prompt.text)  # as long as it may be without pictures
        with self._vision(PICTURES):
            return picture_inputs(self.model, self.processor, prompts, self.recipe.instruction)

    def prompt_length(self, prompt: str | Prompt) -> int:
        """Tokens of a prompt, its pictures included.

        Raises:
            VugenError: as `prefix`.
        """
        if isinstance(prompt, Prompt) and prompt.pictures:
            return int(self.picture_inputs([prompt])["input_ids"].shape[1])
        return len(self.prompts.tokens(prompt.text if isinstance(prompt, Prompt) else prompt))

    def _read(
        self, run: Callable[..., Any], hidden: Sequence[int] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What a run of the decoder leaves: keys and values of all layers, or the inputs of some.

        Args:
            run: takes `past_key_values` and `use_cache`.
            hidden: numbers of layers.
        """
        from transformers import DynamicCache

        if hidden is not None:
            with layer_inputs(self.decoder, hidden) as seen:
                run(use_cache=False)
            return [], [], [seen[number] for number in hidden]
        cache = DynamicCache()  # no config: sliding-window layers must keep the whole prompt too
        try:
            run(past_key_values=cache, use_cache=True)
            keys = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
            problem = None
        except VugenError:
            raise
        except Exception as error:  # a decoder that wants another cache fails in its own way
            keys, problem = [], error
        config = self.decoder.config
        if problem or len(keys) != config.num_hidden_layers:
            kinds = sorted(set(getattr(config, "layer_types", None) or []) - ATTENTION)
            layers = f"layers of {', '.join(kinds)}" if kinds else "layers that share keys and values"
            why = first_line(problem) if problem and not kinds else layers
            raise VugenError(
                f"{self.name} does not keep keys and values of a prompt in all of its "
                f"{config.num_hidden_layers} decoder layers ({why}), so no copy of its decoder can follow: "
                "set expert.kind=dit"
            ) from problem
        return keys, [layer.values for layer in cache.layers], []

    def card(self) -> VLMCard:
        """What a checkpoint notes of the VLM it was trained on, for `check`."""
        return VLMCard(name=self.name, fingerprint=self.fingerprint, vision=self.vision)

    def check(self, card: Card, checkpoint: str | Path, allow: bool = False) -> None:
        """Refuse a checkpoint that was trained on another VLM, unless that is allowed.

        A reducer fits wherever z is the same: the language side may have been trained further.

        Raises:
            VugenError: the fingerprints differ; names both models.
        """
        trained = card.vlm
        same = trained.fingerprint == self.fingerprint
        if card.stage == "reducer":
            same = same or trained.vision == self.vision
        if not (same or allow):
            raise VugenError(
                f"{checkpoint} was trained on the VLM {trained.name} ({trained.fingerprint[:12]}), "
                f"but this is {self.name} ({self.fingerprint[:12]}): pass the right one with --vlm, or "
                "--allow-vlm-mismatch if you know that it fits"
            )


def stack_of(model: Any) -> Any:
    """The stack of decoder layers of a VLM's language model, without a vocabulary head."""
    decoder, words = model.get_decoder(), model.get_input_embeddings()
    if not hasattr(decoder.config, "num_hidden_layers"):  # a model around a VLM (pi0) names no decoder
        inner = (part.get_decoder() for part in model.modules() if hasattr(part, "get_decoder"))
        decoder = next(
            part
            for part in inner
            if hasattr(part.config, "num_hidden_layers") and part.get_input_embeddings() is words
        )
    stack = decoder.base_model
    if getattr(stack, "lm_head", None) is not None:  # its own name for its stack is another (Llama 4)
        stack = stack.model
    return stack


def words_of(text: str) -> list[str]:
    """The words of a text in order, in lower case."""
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text.lower())


def load_vlm(name: str, device: torch.device | str | None = None, recipe: Recipe | None = None) -> FrozenVLM:
    """Load a VLM and freeze it.

    Args:
        name: `nano` (bundled), a Hugging Face directory, or a hub id.
        device: where to put it; default the CPU.
        recipe: says how the VLM is used (`latents`, `vlm_size`, `vlm_dtype`, `instruction`); default the
            defaults of those keys.

    Raises:
        VugenError: there is no such directory, the hub cannot be reached, or it is not a usable VLM.
    """
    recipe = recipe or Recipe()
    model, processor = load_model(name, device, recipe.vlm_dtype)
    frozen = FrozenVLM(name, model, processor, recipe)
    listing = local_path(name) / WORDS
    if listing.is_file():
        try:
            frozen.words = frozenset(map(str, json.loads(listing.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise VugenError(f"{listing} is not a JSON list of words: remove it or train again") from error
    return frozen


def load_model(
    name: str, device: torch.device | str | None = None, dtype: str = "float32"
) -> tuple[Any, Any]:
    """Load an image-text-to-text model and its processor, whatever its insides; enough to ask it questions.

    Args:
        name: `nano` (bundled), a Hugging Face directory, or a hub id.
        device: where to put it; default the CPU.
        dtype: its precision, the name of a torch dtype.

    Raises:
        VugenError: there is no such directory, the hub cannot be reached, or it is no such model.
    """
    path = local_path(name)
    local = path.is_dir()
    if not local and not may_be_id(name):
        raise VugenError(f"no VLM at {path}: give a Hugging Face directory, a hub id (owner/name) or `nano`")
    if local and not (path / "config.json").is_file():
        raise VugenError(f"{path} has no config.json: it is not a Hugging Face model directory")
    local = local or not reach_hub(name, "the VLM")
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = str(path) if path.is_dir() else name
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            source,
            local_files_only=local,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        try:
            processor = _load_processor(source, local)
        except Exception:
            refuse(model, name)  # what lies in its design comes before what its directory lacks
            raise
    except VugenError:
        raise
    except Exception as error:  # a foreign directory can fail in as many ways as there are model classes
        raise VugenError(
            f"{name} could not be loaded as a vision-language model: {_why_not_loaded(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise VugenError(
            f"{name} could not be loaded as a vision-language model: {len(missing)} of its weights are not "
            f"in its files under the names of {type(model).__name__} (as {missing[0]}) and would be random: "
            "take another VLM, or a whole copy of this one"
        )
    return model.to(device or "cpu"), processor


def local_path(name: str, files: tuple[str, ...] = FILES) -> Path:
    """Where a VLM is, or would be: the bundled one, what `hf:owner/name[@revision]` is downloaded to (some of
    its files), a path.

    Raises:
        VugenError: it cannot be had from the hub.
    """
    if name.startswith(PREFIX):
        return downloaded(name, "the VLM", files)
    return bundle("vlm") if name == "nano" else Path(name)


def vlm_of(
    card: Card,
    checkpoint: str | Path,
    vlm: str | None = None,
    device: torch.device | str | None = None,
    allow_mismatch: bool = False,
) -> FrozenVLM:
    """The VLM that a checkpoint was trained on, used as its recipe says.

    Args:
        card: of the checkpoint.
        checkpoint: named in messages.
        vlm: where the VLM is now, if not where the card says.
        device: where to put it; default the CPU.
        allow_mismatch: take a VLM of other weights.

    Raises:
        VugenError: it cannot be loaded, or has other weights.
    """
    frozen = load_vlm(vlm or card.vlm.name, device, parse_recipe(card.recipe, str(checkpoint)))
    frozen.check(card, checkpoint, allow_mismatch)
    return frozen


def _load_processor(source: str, local: bool) -> Any:
    """The model's processor, or just its two parts that the method needs if the whole cannot be had.

    Some processors ask for packages that only their video side uses.
    """
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    options = {"local_files_only": local, "trust_remote_code": False}
    missing = "its processor is not one of images and texts"
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
            return processor
    except Exception as error:  # as many kinds as there are processors; the parts say what is really missing
        missing = first_line(error)
    return SimpleNamespace(
        missing=missing,
        image_processor=AutoImageProcessor.from_pretrained(source, **options),
        tokenizer=AutoTokenizer.from_pretrained(source, **options),
    )


def _why_not_loaded(error: Exception) -> str:
    """What transformers says of a model that it does not load, or what to do about it."""
    from transformers import __version__

    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "it runs code from its own repository, and vugen runs none; take its conversion to transformers, "
            "whose name often ends in -hf (as OpenGVLab/InternVL3-1B-hf)"
        )
    if "Unrecognized configuration class" in text:
        return (
            f"transformers {__version__} has no image-text-to-text model for its type; "
            "take another VLM, or a newer transformers if its type is new"
        )
    return first_line(error)
