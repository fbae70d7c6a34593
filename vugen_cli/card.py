"""The cards of checkpoints: what the next stage needs to know of the file that holds the weights.

Written as JSON into the header of the file, and read through these models; keys that a later version adds are
passed over.
"""

import copy
from typing import Any

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, field_validator, model_serializer

FORMAT = 2  # 1: the networks' tensors had other names; see `key_map`


class VLMCard(BaseModel):
    """The VLM that a checkpoint belongs to."""

    name: str = Field(description="`nano`, a directory or a hub id, as it was given")
    fingerprint: str = Field(description="SHA-256 over names, shapes and values of its weights")
    vision: str | None = Field(None, description="the same over those that z depends on alone")


class DataCard(BaseModel):
    """The data set that a checkpoint was trained on."""

    path: str = Field(description="where it was")
    dataset: str = Field(description="its name")
    size: int = Field(description="pixels a side of its pictures")
    licence: str | None = Field(None, description="of its pictures")
    counts: dict[str, int] = Field(description="pictures of each split")
    sha256: str | None = Field(None, description="over the SHA-256 of its shards")
    train_sha256: str | None = Field(None, description="over those of its `train` split alone")
    mixture: list[dict[str, Any]] | None = Field(None, description="sets and weights, where it is a mixture")
    shapes: list[str] | None = Field(None, description="of its pictures, WIDTHxHEIGHT, if of several")

    @property
    def datasets(self) -> list[str]:
        """The name of each set of a mixture; of a single set its own."""
        return self.dataset.split(" + ")

    @model_serializer(mode="wrap")
    def _plain(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without later keys that have no value: caches and states of before are compared with it."""
        found: dict[str, Any] = dumped(self)
        for later in ("shapes", "train_sha256"):
            if found.get(later) is None:
                found.pop(later, None)
        return found


class LatentsCard(BaseModel):
    """z and z̃ of a checkpoint."""

    channels: int = Field(description="of z̃")
    grid: tuple[int, int] = Field(description="rows and columns of z̃")
    width: int = Field(description="d of z, or the channels of the VAE that is read instead")


class VAECard(BaseModel):
    """The VAE that a checkpoint carries."""

    name: str = Field(description="a diffusers directory or a hub id, as it was given")
    fingerprint: str | None = Field(None, description="SHA-256 over its weights")
    config: dict[str, Any] = Field(description="of diffusers' AutoencoderKL")


class Distilled(BaseModel):
    """Where the decoder of a distilled checkpoint comes from."""

    teacher: str = Field(description="the checkpoint")
    steps: int = Field(description="of the teacher's solver")
    solver: str = Field(description="of the teacher")


class Card(BaseModel):
    """A trained checkpoint, of stage 1 or 2."""

    format: int = Field(FORMAT, description="of the file: a newer one than this tool's is refused")
    version: str = Field("", description="of the tool that wrote it")
    stage: str = Field(description="`reducer` or `sampler`")
    step: int = Field(description="optimiser steps taken")
    recipe: dict[str, Any] = Field(description="the resolved recipe, every value")
    vlm: VLMCard = Field(description="the VLM")
    data: DataCard = Field(description="the training set")
    latents: LatentsCard = Field(description="z and z̃")
    image_size: int = Field(description="pixels a side that the decoder draws")
    vae: VAECard | None = Field(None, description="the VAE whose weights are in the file")
    distilled: Distilled | None = Field(None, description="where a distilled decoder comes from")
    decoder: str | None = Field(None, description="the file whose decoder draws instead of its own")
    adapters: list[str] | None = Field(None, description="adapters added to its expert, as `file:weight`")

    @field_validator("recipe", mode="before")
    @classmethod
    def _mend(cls, recipe: Any) -> Any:
        """Recipes of older versions, without what they were allowed to say and today's are not."""
        if not isinstance(recipe, dict):
            return recipe
        mended = copy.deepcopy(recipe)
        sections = {name: section for name, section in mended.items() if isinstance(section, dict)}
        for name in ("train_vlm", "train_vae", "train_reducer"):  # had no effect
            sections.get(name, {}).pop("prompt_dropout", None)
        decoder = sections.get("decoder", {})
        if decoder.get("kind", "pdd") == "pdd" and decoder.get("solver") == "midpoint":  # ended wrong
            decoder["solver"] = "heun"
        return mended

    def facts(self, *keys: str) -> dict[str, Any]:
        """Some of its values as plain ones, for a run to be compared with when it is taken up again."""
        return self.model_dump(mode="json", include=set(keys))


class RunCard(BaseModel):
    """`run.json`: what a run sets out to do, written at each of its starts."""

    stage: str = Field(description="`vlm`, `vae`, `judge`, `reducer`, `decoder` or `sampler`")
    steps: int = Field(description="optimiser steps of the whole run")
    batch_size: int = Field(description="images a step")
    version: str = Field("", description="of the tool")


class BaseCard(BaseModel):
    """The sampler that an adapter belongs to."""

    name: str = Field(description="`nano` (bundled), or its file as it was given")
    fingerprint: str = Field(description="SHA-256 over names, shapes and values of its expert's weights")


class AdapterCard(BaseModel):
    """An adapter: what training added to the matrices of a sampler's expert, as products of low rank."""

    format: int = Field(FORMAT, description="as of a checkpoint")
    version: str = Field("", description="of the tool that wrote it")
    stage: str = Field("adapter", description="`adapter`")
    step: int = Field(description="optimiser steps taken")
    rank: int = Field(description="of each product")
    base: BaseCard = Field(description="the sampler that it was trained on, and alone fits")
    recipe: dict[str, Any] = Field(description="the resolved recipe, every value")
    data: DataCard = Field(description="the training set")


class StateCard(BaseModel):
    """A state that a killed run goes on from."""

    format: int = Field(FORMAT, description="as of a checkpoint")
    version: str = Field("", description="of the tool that wrote it")
    stage: str = Field(description="`vlm-`, `vae-`, `judge-`, `reducer-`, `decoder-` or `sampler-state`")
    step: int = Field(description="optimiser steps taken")
    resolved: dict[str, Any] = Field(
        description="recipe, data and VLM of the run, which a resumed one must match"
    )
