"""Tiny random models of many vision-language families, each built from its own config classes.

`build(family, path)` saves a directory as a user has it: weights, config, tokenizer and processor.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.nano.vlm import train_tokenizer

SPECIAL = {
    "image_token": "<image>",
    "video_token": "<video>",
    "context_image_token": "<image>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
    "break_token": "[IMG_BREAK]",
    "end_token": "[IMG_END]",
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer(more: dict[str, str] | None = None, places: bool = True) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with the special tokens of every family, padding on the left as chat models do.

    Args:
        more: special tokens, by name.
        places: it names the token of a picture's places; else processors bring their own name for it.
    """
    texts = [caption for i in range(40) for caption in OpenMojiScenes(40)[i].captions]
    trained = train_tokenizer(texts, 400)
    special = SPECIAL | (more or {})
    if not places:
        special["a_place"] = special.pop("image_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        bos_token=trained.bos_token,
        eos_token=trained.eos_token,
        pad_token=trained.pad_token,
        extra_special_tokens=special,
        padding_side="left",
    )


def text_config(name: str, words: Any, **more: Any) -> Any:
    """The text config class `name` at the size of these tests."""
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    return getattr(transformers, name)(
        **TEXT | {"vocab_size": len(words), "pad_token_id": words.pad_token_id} | special | more
    )


def image_id(words: Any) -> int:
    """The token that stands for image features."""
    return words.convert_tokens_to_ids("<image>")


def llava_clip(words: Any) -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=56, patch_size=14),
        text_config=text_config("LlamaConfig", words),
        image_token_id=image_id(words),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=16,
    )
    size = {"height": 56, "width": 56}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size)
    return config, transformers.LlavaProcessor(
        images,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def llava_siglip(words: Any) -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        vision_config=siglip(),
        text_config=text_config("Qwen2Config", words),
        image_token_id=image_id(words),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=16,
    )
    return config, transformers.LlavaProcessor(
        siglip_images(), words, patch_size=14, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


def llava_pixtral(words: Any) -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        vision_config=transformers.PixtralVisionConfig(**VISION, image_size=64, patch_size=8),
        text_config=text_config("MistralConfig", words, head_dim=16, sliding_window=8),
        image_token_id=image_id(words),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    images = transformers.PixtralImageProcessor(
        size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}
    )
    return config, transformers.PixtralProcessor(
        images, words, patch_size=8, image_token="<image>", chat_template=TEMPLATE
    )


def siglip(**more: Any) -> Any:
    return transformers.SiglipVisionConfig(
        **VISION | {"image_size": 56, "patch_size": 14, "vision_use_head": False} | more
    )


def siglip_images(size: int = 56) -> Any:
    return transformers.SiglipImageProcessor(size={"height": size, "width": size})


def llava_onevision(words: Any) -> tuple[Any, Any]:
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=text_config("Qwen2Config", words),
        image_token_id=image_id(words),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 56], [56, 112], [112, 56], [112, 112]],
    )
    images = transformers.LlavaOnevisionImageProcessor(
        size={"height": 56, "width": 56}, image_grid_pinpoints=config.image_grid_pinpoints
    )
    return config, transformers.LlavaOnevisionProcessor(
        images,
        words,
        transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )


def internvl(words: Any) -> tuple[Any, Any]:
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**VISION, image_size=[56, 56], patch_size=[7, 7]),
        text_config=text_config("Qwen2Config", words),
        image_token_id=image_id(words),
        image_seq_length=16,
    )
    images = transformers.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True)
    return config, transformers.InternVLProcessor(
        images, words, transformers.InternVLVideoProcessor(), image_seq_length=16, chat_template=TEMPLATE
    )


def qwen2_5_vl(words: Any) -> tuple[Any, Any]:
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "window_size": 28,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        text_config=text_config(
            "Qwen2_5_VLTextConfig",
            words,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        ).to_dict(),
        image_token_id=image_id(words),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        vision_start_token_id=words.convert_tokens_to_ids("<img>"),
        vision_end_token_id=words.convert_tokens_to_ids("</img>"),
    )
    images = transformers.Qwen2VLImageProcessor(patch_size=7, min_pixels=28 * 28, max_pixels=112 * 112)
    return config, transformers.Qwen2_5_VLProcessor(
        images, words, transformers.Qwen2VLVideoProcessor(), chat_template=TEMPLATE
    )


def qwen3_vl(words: Any) -> tuple[Any, Any]:
    config = transformers.Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config=text_config(
            "Qwen3VLTextConfig",
            words,
            head_dim=16,
            rope_parameters={
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
                "rope_theta": 1e4,
            },
        ).to_dict(),
        image_token_id=image_id(words),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        vision_start_token_id=words.convert_tokens_to_ids("<img>"),
        vision_end_token_id=words.convert_tokens_to_ids("</img>"),
    )
    images = transformers.Qwen2VLImageProcessor(patch_size=8, min_pixels=32 * 32, max_pixels=128 * 128)
    return config, transformers.Qwen3VLProcessor(
        images, words, transformers.Qwen3VLVideoProcessor(), chat_template=TEMPLATE
    )


def paligemma(words: Any) -> tuple[Any, Any]:
    config = transformers.PaliGemmaConfig(
        vision_config=siglip(projection_dim=64),
        text_config=text_config("GemmaConfig", words, head_dim=16),
        image_token_index=image_id(words),
        projection_dim=64,
    )
    images = siglip_images()
    images.image_seq_length = 16
    return config, transformers.PaliGemmaProcessor(images, words)


def gemma3(words: Any) -> tuple[Any, Any]:
    config = transformers.Gemma3Config(
        vision_config=siglip(image_size=56, patch_size=7),
        text_config=text_config(
            "Gemma3TextConfig",
            words,
            head_dim=16,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        ),
        image_token_id=image_id(words),
        boi_token_id=words.convert_tokens_to_ids("<boi>"),
        eoi_token_id=words.convert_tokens_to_ids("<eoi>"),
        mm_tokens_per_image=16,
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    template = TEMPLATE.replace("<image>", "<boi>")
    return config, transformers.Gemma3Processor(images, words, image_seq_length=16, chat_template=template)


def idefics3(words: Any) -> tuple[Any, Any]:
    config = transformers.Idefics3Config(
        vision_config={**VISION, "image_size": 64, "patch_size": 8},
        text_config=text_config("LlamaConfig", words),
        image_token_id=image_id(words),
        scale_factor=2,
    )
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, do_image_splitting=True
    )
    return config, transformers.Idefics3Processor(images, words, image_seq_len=16, chat_template=TEMPLATE)


def smolvlm(words: Any) -> tuple[Any, Any]:
    config = transformers.SmolVLMConfig(
        vision_config={**VISION, "image_size": 64, "patch_size": 8},
        text_config=text_config("LlamaConfig", words).to_dict(),
        image_token_id=image_id(words),
        scale_factor=2,
    )
    images = transformers.SmolVLMImageProcessor(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 64}, do_image_splitting=True
    )
    words.chat_template = TEMPLATE
    return config, (images, words)  # its processor needs a package that spells numbers


def perception_lm(words: Any) -> tuple[Any, Any]:
    config = transformers.PerceptionLMConfig(
        vision_config=transformers.TimmWrapperConfig(
            architecture="vit_pe_core_tiny_patch16_384",
            do_pooling=True,
            num_classes=0,
            model_args={
                "embed_dim": 32,
                "img_size": [64, 64],
                "depth": 2,
                "num_heads": 2,
                "patch_size": 8,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "init_values": 0.1,
                "ref_feat_shape": [8, 8],
            },
        ),
        text_config=text_config("LlamaConfig", words),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        image_token_id=image_id(words),
        video_token_id=words.convert_tokens_to_ids("<video>"),
    )
    images = transformers.PerceptionLMImageProcessor(
        tile_size=64, max_num_tiles=4, vision_input_type="thumb+tile"
    )
    return config, transformers.PerceptionLMProcessor(
        transformers.PerceptionLMVideoProcessor(),
        images,
        words,
        patch_size=8,
        pooling_ratio=2,
        chat_template=TEMPLATE,
    )


def mistral3(words: Any) -> tuple[Any, Any]:
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**VISION, image_size=64, patch_size=8),
        text_config=text_config("MistralConfig", words, head_dim=16, sliding_window=8),
        image_token_index=image_id(words),
        spatial_merge_size=2,
    )
    images = transformers.PixtralImageProcessor(
        size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}
    )
    return config, transformers.PixtralProcessor(
        images, words, patch_size=8, spatial_merge_size=2, image_token="<image>", chat_template=TEMPLATE
    )


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    builder.__name__: builder
    for builder in (
        llava_clip,
        llava_siglip,
        llava_pixtral,
        llava_onevision,
        internvl,
        qwen2_5_vl,
        qwen3_vl,
        paligemma,
        gemma3,
        idefics3,
        smolvlm,
        perception_lm,
        mistral3,
    )
}


def build(family: str, path: Path) -> Path:
    """Save a random model of a family as a Hugging Face directory."""
    words = tokenizer()
    config, processor = FAMILIES[family](words)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).float().save_pretrained(path)
    for part in processor if isinstance(processor, tuple) else (processor,):
        part.save_pretrained(path)
    return path
