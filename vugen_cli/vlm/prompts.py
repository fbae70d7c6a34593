"""Prompts, and text to token ids: the recipe's instruction, the model's chat template, and a largest length.

`Prompts` holds a tokenizer and plain values alone, so that a loader's worker processes can do it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from torch import Tensor

from vugen_cli.data.sample import PICTURE
from vugen_cli.errors import VugenError

A_DAY = datetime(2024, 7, 26)  # that Llama's template names where it knows no date
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is to be drawn: a text and the pictures that it is about, in order.

    Args:
        text: may say where each picture stands, by `{image}`; otherwise they stand before it. With pictures
            it may be empty: draw something like them.
        pictures: uint8 [3, H, W] each.
    """

    text: str
    pictures: tuple[Tensor, ...] = ()

    @cached_property
    def key(self) -> str:
        """Tells prompts apart: the text alone, where there are no pictures."""
        digests = [
            hashlib.sha256(f"{tuple(p.shape)}".encode() + p.cpu().contiguous().numpy().tobytes()).hexdigest()
            for p in self.pictures
        ]
        return "\0".join([self.text, *digests])

    def parts(self, instruction: str = "{prompt}") -> list[str | None]:
        """Text in the instruction, and None for each picture, in the order in which they are read.

        Raises:
            VugenError: the text places more or fewer pictures than there are.
        """
        # An instruction may say the prompt twice; its pictures stand in the first.
        again = self.text.replace(PICTURE, "") if self.pictures else self.text
        before, *rest = instruction.split("{prompt}")
        text = before + self.text + again.join(rest) if self.text else ""
        pieces = text.split(PICTURE) if self.pictures else [text]
        if len(pieces) == 1:
            return [*[None] * len(self.pictures), *([text] if text else [])]
        if len(pieces) - 1 != len(self.pictures):
            raise VugenError(
                f"the prompt places {len(pieces) - 1} pictures by {PICTURE}, and {len(self.pictures)} are "
                f"given ({self.text[:40]}...)"
            )
        placed: list[str | None] = [part for piece in pieces for part in (piece, None)][:-1]
        return [part for part in placed if part != ""]


def refuse_places(prompts: Sequence[str], advice: str) -> None:
    """Of prompts without pictures, refuse one that says where a picture stands.

    Args:
        prompts: texts.
        advice: what to do.

    Raises:
        VugenError: one has `{image}` in it.
    """
    for text in prompts:
        if PICTURE in text:
            raise VugenError(f"a prompt says {PICTURE}, and no picture is given: {advice} ({text[:40]})")


def pictures_of(prompt: str | list[int] | Prompt) -> tuple[Tensor, ...]:
    """A prompt's pictures, uint8 [3, H, W] each; of a text or its token ids none."""
    return prompt.pictures if isinstance(prompt, Prompt) else ()


def rendered(by: Any, content: Any) -> str:
    """What a user says in the chat template of a tokenizer or a processor, the same on every day.

    Many a template tells the model the date (`strftime_now`, Llama's and Mistral's among them), and prompts
    that change at midnight would change what is trained and drawn.

    Args:
        by: has the template.
        content: of the user's message, a text or parts.
    """
    template, day = by.chat_template, {}
    if isinstance(template, str) and "strftime_now" in template:
        day = {"chat_template": _TODAY.sub(lambda found: repr(A_DAY.strftime(found[2])), template)}
    message = [{"role": "user", "content": content}]
    text: str = by.apply_chat_template(message, add_generation_prompt=True, tokenize=False, **day)
    return text


class Prompts:
    """Turns prompts into the token ids that a VLM's decoder reads.

    Args:
        tokenizer: of the VLM's processor.
        name: of the VLM, for messages.
        instruction: what the VLM is told, with `{prompt}` in it.
        longest: tokens of a prompt's own text; instruction and template come on top.
        positions: that the decoder has, if it says so.
    """

    def __init__(
        self, tokenizer: Any, name: str, instruction: str, longest: int, positions: int | None = None
    ):
        self.tokenizer, self.name, self.instruction = tokenizer, name, instruction
        self.longest, self.positions = longest, positions

    def text(self, prompt: str) -> str:
        """The prompt in the instruction and the chat template, if there is one; "" draws anything."""
        content = self.instruction.replace("{prompt}", prompt) if prompt else ""
        if self.template is None:
            return content
        return self._render(content, as_string=self.template == "string")

    @cached_property
    def template(self) -> str | None:
        """How the chat template wants a message's content: `string`, `parts`, or None without a template.

        Tried, because nothing says it: a template given the wrong kind loses the text or fails.

        Raises:
            VugenError: it takes neither.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        marker = "a bear in a forest"
        for kind in ("string", "parts"):
            try:
                text = self._render(marker, as_string=kind == "string")
            except Exception:  # whatever a template raises by itself, `TemplateError` or any Python error
                continue
            if marker in text and "'text'" not in text:
                return kind
        raise VugenError(f"the chat template of {self.name} takes no text message: remove it or mend it")

    def _render(self, content: str, as_string: bool) -> str:
        parts: Any = content if as_string else [{"type": "text", "text": content}]
        return rendered(self.tokenizer, parts)

    @cached_property
    def limit(self) -> int:
        """Tokens of its own text that a prompt may have; half of a model's positions are for the image.

        The other half holds the template, the instruction, and the prompt as often as that says it.
        """
        if not self.positions:
            return self.longest
        before, *rest = self.instruction.split("{prompt}")
        around = len(self._ids("")) + len(self._own_ids(before + "".join(rest)))
        return max(1, min(self.longest, (self.positions // 2 - around) // len(rest)))

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt that is to be drawn as it is; never none.

        Raises:
            VugenError: its own text is longer than `limit`.
        """
        ids = self._ids(prompt)
        if len(ids) > self.limit and (own := len(self._own_ids(prompt))) > self.limit:
            raise VugenError(
                f"a prompt of {own} tokens is too long: {self.name} reads {self.limit} here (recipe key "
                f"prompt_tokens); shorten it ({prompt[:40]}...)"
            )
        return ids

    def caption_tokens(self, caption: str) -> tuple[list[int], bool]:
        """Token ids of a caption to train on, cut after `limit` tokens of text, and whether it was cut.

        Data sets from the web hold whole articles as captions: one of them must not end a run or pad a batch.
        """
        ids = self._ids(caption)
        if len(ids) <= self.limit:  # most are far shorter, template included
            return ids, False
        cut = self.cut(caption)
        return (ids, False) if cut == caption else (self._ids(cut), True)

    def cut(self, caption: str) -> str:
        """A caption's first `limit` tokens as text: all of it, where it has no more."""
        own = self._own_ids(caption)
        if len(own) <= self.limit:
            return caption
        kept = self.limit
        while len(self._own_ids(cut := self._decode(own[:kept]))) > self.limit:
            kept -= 1  # a cut word may be written with more tokens than the whole one had
        return cut

    def _ids(self, prompt: str) -> list[int]:
        text = self.text(prompt)
        start = self.tokenizer.bos_token  # a template may leave it to the tokenizer, as LLaVA's does
        ids = self._tokenized(text, not (start and text.startswith(start)))
        # A model without a template or a start token would give the image nothing to attend to.
        return ids or [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id or 0]

    def _own_ids(self, prompt: str) -> list[int]:
        return self._tokenized(prompt, False)

    def _tokenized(self, text: str, special: bool) -> list[int]:
        # Not verbose: what is too long is refused or cut here, and needs no warning before.
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
