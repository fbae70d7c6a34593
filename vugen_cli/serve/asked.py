"""What a client may ask for, and how it is told what went wrong, both in OpenAI's shapes."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_IMAGES = 10
"""Pictures of one request, as with OpenAI."""

MAX_PROMPT = 4000
"""Characters of a prompt; the sampler's own limit, in tokens, is usually lower."""

MAX_STEPS = 250  # fewer than of `vugen sample`: others wait
MAX_GUIDANCE = 100


class Refusal(Exception):
    """A request that is answered by an error.

    Args:
        status: of HTTP.
        message: one line for whoever reads it.
        code: short, for programs.
        param: the field that is wrong, if one is.
        headers: sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {429: "rate_limit_error", 401: "authentication_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }


def invalid(first: Mapping[str, Any]) -> Refusal:
    """What is wrong with a field, from an entry of pydantic's `errors()`."""
    name = next((str(part) for part in first["loc"] if part != "body"), None)
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"unknown parameter: {str(name)[:60]}", "unknown_parameter", name)
    said = first["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    return Refusal(400, f"{name}: {said}" if name else said, "invalid_value", name)


class Generation(BaseModel):
    """The body of `POST /v1/images/generations`: OpenAI's fields, and seed, steps, guidance and solver.

    What has no meaning here (`quality`, `style`, `background`, `moderation`, `user`, ...) changes nothing. A
    null is as if left out.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    size: str = Field("auto", max_length=20)
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)

    seed: int | None = Field(None, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    guidance: float | None = Field(None, ge=0, le=MAX_GUIDANCE)
    solver: Literal["euler", "heun", "midpoint"] | None = None

    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @field_validator("prompt")
    @classmethod
    def _say_something(cls, prompt: str) -> str:
        if not (text := prompt.strip()):
            raise ValueError("is empty: say what to draw")
        return text


class Edit(Generation):
    """The fields of `POST /v1/images/edits` beside its pictures."""

    image_guidance: float | None = Field(None, ge=0, le=MAX_GUIDANCE)

    input_fidelity: str | None = None
