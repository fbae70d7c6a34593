"""Prompts to token ids: the recipe's instruction, the model's chat template, and a largest length.

Holds a tokenizer and plain values alone, so that a loader's worker processes can do it.
"""

from functools import cached_property
from typing import Any

from vugen_cli.errors import VugenError


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
        rendered: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        return rendered

    @cached_property
    def limit(self) -> int:
        """Tokens of its own text that a prompt may have; half of a model's positions are for the image."""
        if not self.positions:
            return self.longest
        return max(1, min(self.longest, self.positions // 2 - len(self._ids(""))))

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
        own = self._own_ids(caption)
        if len(own) <= self.limit:
            return ids, False
        kept = self.limit
        while len(self._own_ids(cut := self._decode(own[:kept]))) > self.limit:
            kept -= 1  # a cut word may be written with more tokens than the whole one had
        return self._ids(cut), True

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(self.text(prompt), add_special_tokens=self.template is None)[
            "input_ids"
        ]
        # A model without a template or a start token would give the image nothing to attend to.
        return ids or [self.tokenizer.bos_token_id or self.tokenizer.eos_token_id or 0]

    def _own_ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
