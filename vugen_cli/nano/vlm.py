"""The nano VLM: its tokenizer, its network, its directory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vugen_cli.errors import VugenError
from vugen_cli.files import write_json
from vugen_cli.recipe import NanoVLM
from vugen_cli.vlm.frozen import WORDS, words_of

SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>", "<unk>"]


CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{% else %}<user>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with this model's special tokens, as a transformers tokenizer."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build(sizes: NanoVLM, image_size: int, tokenizer: Any) -> tuple[Any, Any]:
    """A fresh model and its processor.

    Args:
        sizes: widths and depths.
        image_size: pixels a side; must be a multiple of `sizes.patch`.
        tokenizer: from `train_tokenizer`.
    """
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    if image_size % sizes.patch:
        raise VugenError(f"images of {image_size} px are not a multiple of nano_vlm.patch ({sizes.patch})")
    vision = SiglipVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=4 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=image_size,
        patch_size=sizes.patch,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(image_size // sizes.patch) ** 2,
        tie_word_embeddings=True,
    )
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": image_size, "width": image_size}),
        tokenizer,
        patch_size=sizes.patch,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config), processor


@torch.no_grad()
def save_vlm(model: Any, processor: Any, path: str | Path) -> None:
    """Write a Hugging Face directory in half precision."""
    import copy

    from transformers.utils import logging

    logging.disable_progress_bar()
    copy.deepcopy(model).half().save_pretrained(path)
    processor.save_pretrained(path)


def save_words(captions: Iterable[str], vlm: Path) -> None:
    """Write the words of the training captions to the VLM's directory, so that it can say which it lacks."""
    write_json(vlm / WORDS, sorted({word for caption in captions for word in words_of(caption)}))
