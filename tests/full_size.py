"""VLM and expert at full size, without weights: the published configs of ten well-known models.

Parameters are counted on the `meta` device. The shape of z is read from a model of the same widths with two
layers a side and a small vocabulary, on random weights, since a forward on `meta` stops at the first value
that a model looks at.
"""

import vugen_cli.vlm  # noqa: F401 - repairs torchvision before transformers imports it

# isort: split
import copy
from typing import Any

import tiny_vlms
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.vlm.frozen import stack_of
from vugen_cli.vlm.latents import find_tap, read_latents, to_grid, vision_inputs
from vugen_cli.vlm.refusals import refusal

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_3B = LLAMA_1B | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
}
QWEN25_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151674,
    "tie_word_embeddings": False,
}
QWEN25_7B = QWEN25_05B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
PE_L = {
    "architecture": "vit_pe_core_large_patch14_336",
    "do_pooling": True,
    "num_classes": 0,
    "model_args": {
        "embed_dim": 1024,
        "img_size": [448, 448],
        "depth": 23,
        "global_pool": "",
        "use_post_transformer_norm": False,
        "init_values": 0.1,
        "ref_feat_shape": [32, 32],
    },
}
PERCEPTION = {"vision_config": PE_L, "vision_use_cls_token": True, "projector_pooling_ratio": 2}
SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
INTERN_VIT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
QWEN3_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
}
QWEN_PIXELS = {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}

# By name: model type, config, image processor's settings, and how many parameters the publisher's page gives
# (billions). Written down from the published config.json of each.
SIZES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "Perception LM 1B": (
        "perception_lm",
        PERCEPTION | {"text_config": LLAMA_1B | {"model_type": "llama"}},
        {"tile_size": 448, "max_num_tiles": 36},
        1.54,
    ),
    "Perception LM 3B": (
        "perception_lm",
        PERCEPTION | {"text_config": LLAMA_3B | {"model_type": "llama"}},
        {"tile_size": 448, "max_num_tiles": 36},
        3.5,
    ),
    "Qwen3-VL 2B": (
        "qwen3_vl",
        {
            "vision_config": QWEN3_VISION
            | {"out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]},
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "rope_parameters": MROPE,
                "tie_word_embeddings": True,
            },
            "tie_word_embeddings": True,
        },
        QWEN_PIXELS,
        2.13,
    ),
    "Qwen3-VL 8B": (
        "qwen3_vl",
        {
            "vision_config": QWEN3_VISION
            | {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24],
            },
            "text_config": {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "rope_parameters": MROPE,
            },
        },
        QWEN_PIXELS,
        8.77,
    ),
    "Qwen3.5 4B": (
        "qwen3_5",
        {
            "vision_config": QWEN3_VISION | {"out_hidden_size": 2560},
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 9216,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 248320,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
                "tie_word_embeddings": True,
                "rope_parameters": MROPE | {"mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
            },
            "tie_word_embeddings": True,
        },
        QWEN_PIXELS,
        4.5,
    ),
    "Gemma 3 4B": (
        "gemma3",
        {
            "vision_config": SO400M | {"image_size": 896},
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "vocab_size": 262208,
            },
        },
        {"size": {"height": 896, "width": 896}},
        4.3,
    ),
    "InternVL3 1B": (
        "internvl",
        {"vision_config": INTERN_VIT, "text_config": QWEN25_05B, "tie_word_embeddings": False},
        {"size": {"height": 448, "width": 448}},
        0.94,
    ),
    "InternVL3 8B": (
        "internvl",
        {"vision_config": INTERN_VIT, "text_config": QWEN25_7B, "tie_word_embeddings": False},
        {"size": {"height": 448, "width": 448}},
        7.94,
    ),
    "SmolVLM 256M": (
        "smolvlm",
        {
            "vision_config": {
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 512,
                "patch_size": 16,
            },
            "text_config": {
                "model_type": "llama",
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "head_dim": 64,
                "vocab_size": 49280,
            },
            "scale_factor": 4,
        },
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        0.256,
    ),
    "LLaVA-OneVision 0.5B": (
        "llava_onevision",
        {
            "vision_config": SO400M | {"num_hidden_layers": 26, "image_size": 384},
            "text_config": QWEN25_05B | {"vocab_size": 152000, "tie_word_embeddings": True},
            "tie_word_embeddings": True,
        },
        {"size": {"height": 384, "width": 384}},
        0.894,
    ),
}


def count(config: Any) -> dict[str, Any]:
    """Parameters of a VLM and of the expert copied from its decoder, and its gigabytes in float32."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        if refusal(model) is None:
            expert = GenerationExpert(stack_of(model), 16, (16, 16))
            found["expert"] = sum(p.numel() for p in expert.parameters())
            found["gigabytes"] = round(4e-9 * sum(t.numel() for t in expert.state_dict().values()), 1)
    return found


def shape_of_z(model_type: str, config: dict[str, Any], pixels: dict[str, Any]) -> list[int]:
    """[rows, columns, width] of z of a 256 px picture, from the same widths at two layers a side."""
    shallow = copy.deepcopy(config)
    for section in (shallow["text_config"], shallow["vision_config"]):
        section |= {key: 2 for key in ("num_hidden_layers", "depth") if key in section}
    shallow["text_config"]["vocab_size"] = 512
    if "model_args" in shallow["vision_config"]:
        shallow["vision_config"]["model_args"]["depth"] = 2
    if "deepstack_visual_indexes" in shallow["vision_config"]:
        shallow["vision_config"]["deepstack_visual_indexes"] = [0]
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**shallow)).eval()
    name = tiny_vlms.IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["torchvision"]
    processor = getattr(transformers, name)(**pixels)
    ramp = torch.linspace(0, 255, 256).to(torch.uint8).expand(1, 3, 256, 256).contiguous()
    inputs = vision_inputs(processor, ramp)
    with torch.no_grad():
        tap = find_tap(model, inputs, "encoder", False)
        (tokens,) = read_latents(model, [tap], inputs, 1, False)
    return list(to_grid(tokens, inputs, 1, model, tap).shape[1:])


def known(name: str) -> dict[str, Any]:
    """What a row of the table says of one of the ten."""
    model_type, config, pixels, _ = SIZES[name]
    z = shape_of_z(model_type, config, pixels)
    return {"type": model_type, "z": z, **count(CONFIG_MAPPING[model_type](**copy.deepcopy(config)))}


def default(model_type: str) -> dict[str, Any]:
    """The same of the config that a class has by default, without z."""
    try:
        return count(CONFIG_MAPPING[model_type]())
    except Exception:  # a default that is no whole model
        return {}
