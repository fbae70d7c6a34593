"""What a source hands to the shard writer."""

import codecs
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

PICTURE = "{image}"  # where a source picture stands in an instruction, if not before it
MOST_SOURCES = 16  # pictures that one may be made from

Meta = dict[str, Any]  # a sample's `.json`, whatever its source knew, with every caption under `captions`


@dataclass
class Sample:
    """One picture with its captions, before resizing.

    Attributes:
        key: a stable name, unique in its source; part of the manifest when the picture is skipped.
        image: the encoded file as bytes, or a drawn picture (RGB) which is stored without loss.
        captions: one or more captions, each a single line.
        meta: JSON-able facts kept in the sample's `.json` (class, original size, scene description, ...).
        sources: pictures that this one is made from by what the captions say: it is then an edit.
    """

    key: str
    image: bytes | Image.Image
    captions: list[str]
    meta: Meta = field(default_factory=dict)
    sources: Sequence[bytes | Image.Image] = ()


class Source(Protocol):
    """An ordered, indexable, picklable set of samples. `source[i]` may read a file or draw a picture.

    A sample that cannot be read raises `OSError` or `ValueError`; the writer counts and lists it.
    """

    @property
    def name(self) -> str: ...

    @property
    def origin(self) -> str: ...

    @property
    def licence(self) -> str: ...

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def texts_of(value: Any) -> list[str]:
    """The captions that a foreign value holds: of a text, of a list without its nulls, none of nothing.

    Raises:
        ValueError: it is no text.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and not any(isinstance(text, list | dict) for text in value):
        return [str(text) for text in value if text is not None]
    if not value:
        return []
    raise ValueError("caption is no text")


def facts_of(data: bytes) -> Meta:
    """What a foreign `.json` says of its sample: nothing, if it is a list or a number of somebody's own.

    Raises:
        ValueError, RecursionError: it is no JSON, or too deep.
    """
    facts = json.loads(data)
    return facts if isinstance(facts, dict) else {}


def decoded(text: bytes, key: str) -> str:
    """A text file's text: UTF-8, or UTF-16 that says so at its start.

    Raises:
        OSError: it is neither; names the key.
    """
    utf_16 = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return text.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(0, "the caption is no UTF-8", key) from error


def encodable(text: str) -> str:
    """A text as UTF-8 can hold it: of a file name that is not UTF-8, the bytes that fail become `?`."""
    return text.encode("utf-8", "replace").decode()


def hash_of(parts: Any) -> str:
    """A short hash over a JSON-able value, for the `fingerprint` of a source."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
