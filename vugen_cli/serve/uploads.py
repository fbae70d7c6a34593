"""Pictures that a client sends: read from a form, checked, decoded."""

import asyncio

import numpy as np
from starlette.datastructures import UploadFile
from starlette.requests import Request

from vugen_cli.data.images import decode
from vugen_cli.serve.asked import Refusal
from vugen_cli.serve.guard import MAX_BODY, MAX_UPLOAD

MAX_PICTURES = 4
"""Pictures of one request."""

MAX_PIXELS = 25_000_000
"""Of one picture: a good camera's."""

_one_by_one = asyncio.Semaphore(1)  # a picture of the largest size takes 100 MB while it is decoded


async def read_edit(request: Request) -> tuple[dict[str, str], list[np.ndarray]]:
    """The fields of a form, and its pictures, `uint8 [H, W, 3]` each.

    Raises:
        Refusal: it is no form, or a picture is missing, too large or none.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refusal(400, "send a form, with content-type multipart/form-data", "invalid_form")
    fields, pictures = {}, []
    async with request.form(max_files=MAX_PICTURES + 1, max_fields=40, max_part_size=MAX_BODY) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif name in ("image", "image[]"):
                pictures.append(value)
            else:
                raise Refusal(400, f"{name[:40]}: files are read as image alone", "unknown_parameter", name)
        if not 1 <= len(pictures) <= MAX_PICTURES:
            raise Refusal(400, f"image: send 1 to {MAX_PICTURES} pictures", "invalid_value", "image")
        decoded = []
        for upload in pictures:
            async with _one_by_one:
                data = await upload.read(MAX_UPLOAD + 1)
                decoded.append(await asyncio.to_thread(_decode, data))
    return fields, decoded


def _decode(data: bytes) -> np.ndarray:
    if len(data) > MAX_UPLOAD:
        raise Refusal(413, f"image: larger than {MAX_UPLOAD:,} bytes", "too_large", "image")
    try:
        return decode(data, MAX_PIXELS)
    except ValueError as error:
        raise Refusal(400, f"image: {error}", "invalid_image", "image") from error
