"""Pictures that a client sends: read from a form, checked, decoded, cut."""

import asyncio
from collections.abc import Callable

from starlette.datastructures import UploadFile
from starlette.requests import Request
from torch import Tensor, from_numpy

from vugen_cli.data.images import adm_crop, decode
from vugen_cli.data.shapes import Shape
from vugen_cli.serve.asked import Edit, Refusal
from vugen_cli.serve.guard import MAX_BODY, MAX_UPLOAD

MAX_PICTURES = 4
"""Pictures of one request."""

MAX_PIXELS = 25_000_000
"""Of one picture: a good camera's."""

_one_by_one = asyncio.Semaphore(1)  # a picture of the largest size takes some 400 MB while it is decoded


async def read_edit(request: Request, cut: Callable[[Edit], Shape]) -> tuple[Edit, list[Tensor]]:
    """What a form asks for, and its pictures, uint8 [3, H, W] each.

    Args:
        request: with the form.
        cut: called before anything is decoded; says what the pictures are cut to, or refuses.

    Raises:
        Refusal: it is no form, or a picture is missing, too large or none; or by `cut`.
        ValidationError: a field is not as `Edit` has it.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refusal(400, "send a form, with content-type multipart/form-data", "invalid_form")
    fields, pictures = {}, []
    async with request.form(max_files=MAX_PICTURES, max_fields=40, max_part_size=MAX_BODY) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif name in ("image", "image[]"):
                pictures.append(value)
            else:
                raise Refusal(400, f"{name[:40]}: files are read as image alone", "unknown_parameter", name)
        if not pictures:
            raise Refusal(400, f"image: send 1 to {MAX_PICTURES} pictures", "invalid_value", "image")
        asked = Edit.model_validate(fields)
        shape, decoded = cut(asked), []
        for upload in pictures:
            async with _one_by_one:
                data = await upload.read(MAX_UPLOAD + 1)
                decoded.append(await asyncio.to_thread(_decode, data, shape))
    return asked, decoded


def _decode(data: bytes, shape: Shape) -> Tensor:
    """A picture cut to a shape: whole, those of requests that wait would take gigabytes."""
    if len(data) > MAX_UPLOAD:
        raise Refusal(413, f"image: larger than {MAX_UPLOAD:,} bytes", "too_large", "image")
    try:
        pixels = decode(data, MAX_PIXELS)
    except ValueError as error:
        raise Refusal(400, f"image: {error}", "invalid_image", "image") from error
    return from_numpy(adm_crop(pixels, shape).copy()).permute(2, 0, 1)
