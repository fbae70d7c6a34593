"""A tiny random model of any type in transformers' image-text-to-text mapping.

`build(model_type, path)` takes the type's own default config, shrinks every size in it by one table of
rules, and saves what a user has: weights, config, tokenizer and image processor. What a type needs beside the
rules stands in `OVERRIDES`, one line each.
"""

import vugen_cli.vlm  # noqa: F401 - repairs torchvision before transformers imports it

# isort: split
import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
PATCH, SIDE = 8, 64  # pixels a patch, pixels an image: 8 x 8 patches
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Sizes by the name of the key, the same in every section of a config.
BOTH = {
    "num_hidden_layers": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "layers": 2,
    "depth": 2,
    "num_decoder_layers": 2,
    "num_global_layers": 2,
    "resampler_depth": 1,
    "num_attention_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_sliding_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "head_dim": 16,
    "swa_head_dim": 16,
    "global_head_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "rotary_dim": 16,
    "d_kv": 16,
    "base_channels": 32,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 512,
    "moe_num_experts": 4,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_groups": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_num_heads": 8,
    "ssm_state_size": 16,
    "sliding_window": 32,
    "sliding_window_size": 32,
    "attention_chunk_size": 64,
    "max_window_layers": 1,
    "hidden_size_per_layer_input": 16,
    "first_k_dense_replace": 1,
    "num_kv_shared_layers": 0,
    "image_size": SIDE,
    "patch_size": PATCH,
    "window_size": 32,
    "num_position_embeddings": 64,
    "image_seq_length": 64,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "position_embedding_size": 64,
    "projection_hidden_dim": 64,
    "max_position_embeddings": 512,
    "max_source_positions": 64,
    "num_image_tokens": 64,
    "mm_tokens_per_image": 16,
}
TEXT = {"hidden_size": 64, "d_model": 64, "embed_dim": 64, "word_embed_proj_dim": 64}
VISION = {
    "hidden_size": 32,
    "d_model": 32,
    "embed_dim": 32,
    "embed_dims": 32,
    "width": 32,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
}
# Widths that meet the language model's, wherever they stand.
MEETS_TEXT = {
    "out_hidden_size",
    "projection_dim",
    "text_hidden_size",
    "output_dim",
    "projector_output_dim",
    "adapter_out_dim",
    "text_dim",
}
MEETS_VISION = {
    "adapter_input_size",
    "adapter_in_dim",
    "encoder_hidden_size",
    "vision_hidden_size",
    "image_text_hidden_size",
}
WIDE = {
    "ffn_dim",
    "mlp_dim",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
}  # feed-forward, as *intermediate_size*
IDS = ("_token_id", "_token_index", "_patch_id", "_start_id", "_end_id", "_newline_id")
LACKING = [("vision_start_token_id", f"{name}_thinker") for name in ("qwen2_5_omni", "qwen3_omni_moe")]
MROPE = ("cosmos3", "ernie4", "glm4", "glmga", "glm_ocr", "minicpm", "paddleocr", "qwen")
OVERRIDES: dict[str, dict[str, Any]] = {
    "lfm2_vl": {"text_config": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "ovis2": {"vision_config": {"vocab_size": 48}},
    "pi0": {"vlm_config": {"vision_config": {"image_size": 224, "patch_size": 28}}},
    "aria": {
        "projector_patch_to_query_dict": {1225: 128},
        "vision_config": {"patch_size": 14, "image_size": 490},
    },
    "cohere_compass": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
                "full_attention": None,
            },
        }
    },
    "deepseek_ocr2": {
        "vision_config": {
            "sam_config": {"downsample_channels": [16, 32], "image_size": 256, "initializer_range": 0.1}
        },
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    },
    "unlimited_ocr": {
        "vision_config": {
            "sam_config": {"downsample_channels": [16, 32], "image_size": 256, "initializer_range": 0.1}
        },
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    },
    "diffusion_gemma": {
        "text_config": {
            "per_layer_config": {"1": {"head_dim": 32}},
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
        },
        "vision_config": {"pooling_kernel_size": 2},
    },
    "gemma4": {
        "text_config": {"per_layer_config": {"1": {"head_dim": 32}}, "vocab_size_per_layer_input": 512},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 8,
            "position_embedding_size": 64,
            "pooling_kernel_size": 2,
        },
    },
    "gemma4_unified": {
        "text_config": {"per_layer_config": {"1": {"head_dim": 32}}},
        "vision_config": {
            "patch_size": 8,
            "model_patch_size": 24,
            "mm_embed_dim": 32,
            "mm_posemb_size": 64,
            "num_soft_tokens": 16,
            "output_proj_dims": 32,
        },
    },
    "gemma3n": {
        "vision_config": {"hidden_size": 2048, "model_args": {"channel_multiplier": 0.1}},
        "text_config": {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "intermediate_size": [64] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    },
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "fast_vlm": {
        "vision_config": {
            "architecture": "fastvit_t8",
            "hidden_size": 64,
            "model_args": {"layers": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 32]},
        }
    },
    "llama4": {
        "vision_config": {
            "vision_output_dim": 48,
            "projector_output_dim": 48,
            "projector_input_dim": 48,
            "intermediate_size": 128,
        }
    },
    "step3p7": {"vision_config": {"image_size": 128}, "text_config": {"sliding_window": 32}},
    "minicpmv4_6": {"insert_layer_id": 0},  # in the tower's first layer, not its seventh
    "minicpmv4_7": {"insert_layer_id": 0},
    "minicpm_ocr": {"insert_layer_id": 0},
    "muse_glimmer": {"out_hidden_size": 128, "projector_hidden_size": 48},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "qwen2_vl": {"vision_config": {"hidden_size": 64}},
    "kimi_k25": {
        "text_config": {"head_dim": 8, "num_key_value_heads": 4},
        "vision_config": {"projection_hidden_size": 32},
        "projection_hidden_size": 32,
    },
    "muse_spark": {
        "out_hidden_size": 128,
        "projector_hidden_size": 48,
        "audio_config": {
            "num_hidden_layers": 4,
            "hidden_sizes": [16, 16, 16, 16],
            "depths": [1, 1, 1, 1],
            "patch_sizes": [16, 6, 5, 4],
        },
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "llava_next": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "granite4_vision": {
        "image_grid_pinpoints": [[64, 128], [128, 64]],
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "downsample_rate": "4/8",
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {"mrope_section": [2, 2, 2, 2]}}},
    "mistral_large4": {"text_config": {"head_dim": 8, "num_key_value_heads": 4, "kv_source_layers": [0, 1]}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "perception_lm": {
        "vision_config": {
            "architecture": "vit_pe_core_tiny_patch16_384",
            "do_pooling": True,
            "num_classes": 0,
            "model_args": {
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
        },
        "vision_use_cls_token": True,
        "projector_pooling_ratio": 2,
    },
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 512,
            "indexer_compress_ratio": 8,
            "hc_lowrank": 16,
        }
    },
}
PROCESSOR: dict[str, str] = {
    "fast_vlm": "CLIPImageProcessor",
    "diffusion_gemma": "Gemma4ImageProcessor",
    "glm4v_moe": "Glm4vImageProcessor",
    "glm_ocr": "Glm46VImageProcessor",
    "instructblipvideo": "BlipImageProcessor",
    "mistral4": "PixtralImageProcessor",
    "qwen2_5_omni_thinker": "Qwen2VLImageProcessor",
    "qwen3_omni_moe_thinker": "Qwen2VLImageProcessor",
    "qwen3_vl_moe": "Qwen2VLImageProcessor",
}
PROCESSOR_OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"max_image_size": 490, "min_image_size": 32},
    "deepseek_vl_hybrid": {"high_res_size": {"height": SIDE, "width": SIDE}},
    "gemma4": {"max_soft_tokens": 70, "pooling_kernel_size": 2},
    "diffusion_gemma": {"max_soft_tokens": 70, "pooling_kernel_size": 2},
    "gemma4_unified": {"max_soft_tokens": 70},
    "inkling2": {"size": {"height": 2 * PATCH, "width": 2 * PATCH}},
    "inkling_mm_model": {"size": {"height": PATCH, "width": PATCH}},
    "lfm2_vl": {
        "encoder_patch_size": PATCH,
        "tile_size": SIDE,
        "min_image_tokens": 4,
        "max_image_tokens": 16,
    },
    "molmo2": {"overlap_margins": [1, 1]},
    "deepseek_ocr2": {"tile_size": 256, "size": {"height": 256, "width": 256}},
    "unlimited_ocr": {"tile_size": 256, "size": {"height": 256, "width": 256}},
    "fast_vlm": {"size": {"shortest_edge": 256}, "crop_size": {"height": 256, "width": 256}},
    "gemma3n": {"size": {"height": 256, "width": 256}},
    "perception_lm": {"tile_size": SIDE},
    "cohere2_vision": {"patch_size": 4},
    "paligemma": {"image_seq_length": 64},
    "llava_next": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "granite4_vision": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "pi0": {"size": {"max_height": 224, "max_width": 224}},
    "dots3_note": {"temporal_patch_size": 1},
    "step3p7": {"size": {"height": 128, "width": 128}, "vision_patch_size": PATCH},
    "minicpmv4_6": {"scale_resolution": SIDE},
    "minicpmv4_7": {"scale_resolution": SIDE},
    "minicpm_ocr": {"scale_resolution": SIDE},
}


# Processors that the mapping does not name, as their pages do; and what they need beside the rules.
PROCESSOR_CLASSES: dict[str, str] = {
    "cosmos3_omni": "Qwen3VLProcessor",
    "fast_vlm": "LlavaProcessor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "kosmos-2": "Kosmos2Processor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
}
# The token in whose places a model puts a picture, and the one that its text has for one, where it is not
# `<image>`.
PLACES: dict[str, str] = {
    "aya_vision": "<|IMG_PATCH|>",
    "got_ocr2": "<imgpad>",
    "llama4": "<|patch|>",
    "ovis2": "<IMG_ATOM>",
    "pp_chart2table": "<imgpad>",
    "step3p7": "<im_patch>",
    "dots3_note": "<|imgpad|>",
    "cohere_compass": "<|IMAGE_PAD|>",
    "muse_glimmer": "<|patch|>",
    "minimax_m3_vl": "]<]image[>[",
    "molmo2": "<im_patch>",
}
WRITTEN: dict[str, str] = {
    "gemma3": "<boi>",
    "llama4": "<|image|>",
    "step3p7": "<im_patch>",
    "got_ocr2": "<imgpad>",
    "dots3_note": "<|imgpad|>",
    "cohere_compass": "<|IMAGE_PAD|>",
    "muse_glimmer": "<|patch|>",
    "minimax_m3_vl": "]<]image[>[",
    "hunyuan_vl": "<img><image></img>",
    "pp_chart2table": "<imgpad>" * 4,
}
REFUSED = ("emu3", "fuyu")  # by design; their processors want more words of their own
UNNAMED = ("blip-2", "instructblip", "cohere_compass")  # their processors name the token themselves
_NAMES = """
<|IMG_PATCH|> <|IMG_LINE_BREAK|> <|START_OF_IMG|> <|END_OF_IMG|> <imgpad> <|image_start|>
<|image_end|> <|image|> <|patch|> <|tile_x_separator|> <|tile_y_separator|> <IMG_START> <IMG_ATOM>
<IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END> <im_patch> <patch_newline> <patch_start> <patch_end>
<im_start> <im_end> <im_col> <im_low> <low_res_im_start> <|imgpad|> <|IMAGE_PAD|> <|VIDEO_PAD|>
<|VISION_START|> <|VISION_END|> <|video|> <|img_thumbnail|> <|audio_comp_pad|> <|video_pad|>
]<]image[>[ ]<]video[>[ </image> <frame_start> <frame_end>
"""
TOKENS = _NAMES.split()
NAMED = {
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
    "audio_token": "<audio>",
    "audio_bos_token": "<boa>",
    "audio_eos_token": "<eoa>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
    "video_start_token": "<vid>",
    "video_end_token": "</vid>",
    "image_boundary_token": "<fake_token_around_image>",
    "image_break_token": "[IMG_BREAK]",
    "vision_start_token": "<img>",
    "vision_end_token": "</img>",
    "vision_bos_token": "<img>",
    "vision_eos_token": "</img>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
}
WHOLE: dict[str, dict[str, Any]] = {
    "aya_vision": {"img_size": SIDE, "downsample_factor": 2},
    "blip-2": {"num_query_tokens": 32},
    "deepseek_ocr2": {"patch_size": 5.4},  # a picture of 256 px has as many tokens as one of 768
    "deepseek_vl": {"num_image_tokens": 64},
    "deepseek_vl_hybrid": {"num_image_tokens": 64},
    "fast_vlm": {"patch_size": 32},
    "gemma3": {"image_seq_length": 16},
    "granite4_vision": {"downsample_rate": "4/8", "num_additional_image_tokens": 1},
    "granite_docling": {"image_seq_len": 4},
    "idefics2": {"image_seq_len": 64},
    "idefics3": {"image_seq_len": 16},
    "inkling2": {"image_token": "<image>"},
    "inkling_mm_model": {"image_token": "<image>"},
    "internvl": {"image_seq_length": 16},
    "janus": {"num_image_tokens": 64},
    "llava": {"num_additional_image_tokens": 1},
    "llava_next": {"num_additional_image_tokens": 1},
    "llava_next_video": {"num_additional_image_tokens": 1},
    "llava_onevision": {"num_image_tokens": 64},
    "mistral3": {"image_token": "<image>"},
    "mistral_large4": {"image_token": "<image>"},
    "ovis2": {"image_seq_length": 64},
    "qianfan_ocr": {"image_seq_length": 16},
    "smolvlm": {"image_seq_len": 16},
}


@functools.cache
def tokenizer(places: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of some hundred words with the special tokens that configs and processors name."""
    from families import tokenizer

    named = {f"extra_{i}": token for i, token in enumerate(TOKENS)}
    return tokenizer(named | NAMED, places)


def shrink(values: dict[str, Any], words: int, side: str, ids: dict[str, int]) -> dict[str, Any]:
    """A config's values with every size made small, by the rules above.

    Args:
        values: of a config or of a section of it.
        words: of the tokenizer.
        side: `text` or `vision`, what the section describes.
        ids: of special tokens.
    """
    small: dict[str, Any] = {}
    rules = BOTH | (TEXT if side == "text" else VISION)
    for key, value in values.items():
        if key == "per_layer_config":  # names layers that are gone
            continue
        if isinstance(value, dict) and "rope" not in key and "label" not in key and "patch_to" not in key:
            inner = "text" if any(word in key for word in ("text", "decoder", "vlm")) else "vision"
            small[key] = shrink(value, words, inner, ids)
        elif isinstance(value, bool) or value is None:
            small[key] = value
        elif key.endswith(IDS) and isinstance(value, int):
            small[key] = special(key, ids)
        elif key in MEETS_TEXT and isinstance(value, int):
            small[key] = TEXT["hidden_size"]
        elif key in MEETS_VISION and isinstance(value, int):
            small[key] = VISION["hidden_size"]
        elif key.endswith("vocab_size") and isinstance(value, int):
            small[key] = words
        elif ("intermediate_size" in key or key in WIDE) and isinstance(value, int):
            small[key] = 72
        elif key in rules and isinstance(value, int | float):
            small[key] = rules[key] if value else value
        elif key in ("image_size", "patch_size") and isinstance(value, list):
            small[key] = [rules[key]] * len(value)
        else:
            small[key] = value
    return shrink_lists(small)


def shrink_lists(small: dict[str, Any]) -> dict[str, Any]:
    """What lists of a config say of each layer, for the layers that are left."""
    kinds = small.get("layer_types")
    if isinstance(kinds, list) and kinds:
        distinct = list(dict.fromkeys(kinds))
        layers = max(small.get("num_hidden_layers", 2), len(distinct))
        small["num_hidden_layers"] = layers
        small["layer_types"] = [*distinct, *[distinct[-1]] * layers][:layers]
    layers = small.get("num_hidden_layers") or small.get("depth") or 2
    for key, value in small.items():
        if key == "layer_types" or not isinstance(value, list):
            continue
        if key in (
            "deepstack_visual_indexes",
            "fullatt_block_indexes",
            "global_attn_indexes",
            "spatial_target_layers",
        ):
            small[key] = [layers - 1]
        elif (
            len(value) > layers
            and key not in ("image_grid_pinpoints",)
            and not any(
                w in key for w in ("token", "label", "mean", "std", "grid", "size", "ratio", "modules")
            )
        ):
            small[key] = value[: layers - 1] + value[-1:]
    rope = small.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        small["rope_parameters"] = shrink_rope(rope, small)
    return small


def shrink_rope(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings whose sections fit the smaller heads."""
    if all(isinstance(v, dict) for v in rope.values()):
        return {k: shrink_rope(v, config) for k, v in rope.items()}
    if rope.get("mrope_section"):
        half = int(config.get("head_dim") or 16) // 2
        half = int(half * rope.get("partial_rotary_factor", 1))
        third = half // len(rope["mrope_section"])
        rest = len(rope["mrope_section"]) - 1
        rope = rope | {"mrope_section": [half - rest * third] + [third] * rest}
    return rope


def special(key: str, ids: dict[str, int]) -> int:
    """The tokenizer's id for a config key as `image_token_id`."""
    for word in ("image", "video", "bos", "eos", "pad"):
        if word in key and "start" not in key and "end" not in key:
            return ids[word]
    return ids["start" if "start" in key or "boi" in key else "end"]


def config_of(model_type: str) -> Any:
    """The shrunken config of a type."""
    words = tokenizer(model_type not in UNNAMED)
    ids = {
        "image": words.convert_tokens_to_ids(PLACES.get(model_type, "<image>")),
        "video": words.convert_tokens_to_ids("<video>"),
        "bos": words.bos_token_id,
        "eos": words.eos_token_id,
        "pad": words.pad_token_id,
        "start": words.convert_tokens_to_ids("<img>"),
        "end": words.convert_tokens_to_ids("</img>"),
    }
    cls = CONFIG_MAPPING[model_type]
    values = shrink(cls().to_dict(), len(words), "text", ids)
    add_sections(values, model_type)
    merge(values, OVERRIDES.get(model_type, {}))
    for key in (
        "image_token_id",
        "image_token_index",
        "vision_start_token_id",
    ):  # which some default configs lack
        if values.get(key, 0) is None or (key, model_type) in LACKING:
            values[key] = ids["image" if "image" in key else "start"]
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype"):
        values.pop(key, None)
    return cls(**values)


def add_sections(values: dict[str, Any], model_type: str) -> None:
    """Give a decoder with M-RoPE its sections, which default configs leave to a constant in the code."""
    text = values.get("text_config", values)
    rope = text.get("rope_parameters") or {}
    if model_type.startswith(MROPE) and "rope_theta" in rope:
        if rope.get("partial_rotary_factor", 1) < 0.5:
            text["head_dim"] = 32
        half = int((text.get("head_dim") or 16) * rope.get("partial_rotary_factor", 1)) // 2
        rope["mrope_section"] = [half - half // 3 * 2, half // 3, half // 3]


def merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge(values[key], value)
        else:
            values[key] = value


def image_processor(model_type: str) -> Any:
    """The type's image processor, set to images of `SIDE` pixels."""
    name = PROCESSOR.get(model_type) or (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get(
        "torchvision"
    )
    if name is None:
        name = (IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}).get("pil")
    if name is None:
        return None
    cls = getattr(transformers, name)
    processor = cls()
    changes: dict[str, Any] = {}
    for key, value in vars(processor).items():
        if key in ("size", "crop_size", "max_image_size") and value:
            if isinstance(value, int):
                changes[key] = SIDE
                continue
            sides = dict(value)
            area = sides.get("longest_edge", 0) > 4096
            changes[key] = {k: (SIDE * SIDE if area else SIDE) for k, v in sides.items() if v is not None}
        elif key == "patch_size" and value:
            changes[key] = dict.fromkeys(dict(value), PATCH) if not isinstance(value, int) else PATCH
        elif key in ("min_pixels", "max_pixels") and value:
            changes[key] = SIDE * SIDE
    changes |= PROCESSOR_OVERRIDES.get(model_type, {})
    return cls(**changes)


def processor(model_type: str, config: Any, images: Any, words: Any) -> Any:
    """The type's whole processor around its image processor, or None where transformers names none."""
    name = PROCESSOR_CLASSES.get(model_type) or PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None or images is None or model_type in REFUSED:
        return None
    cls = getattr(transformers, name)
    vision = getattr(config, "vision_config", config)
    video = VIDEO_PROCESSOR_MAPPING_NAMES.get(model_type, {"torchvision": "LlavaOnevisionVideoProcessor"})
    query_words = copy.deepcopy(words)
    query_words.padding_side = "right"  # as BERT's
    known = {
        "image_processor": images,
        "tokenizer": words,
        "qformer_tokenizer": query_words,
        "chat_template": words.chat_template,
        "patch_size": PATCH,
    }
    for key in ("spatial_merge_size", "vision_feature_select_strategy", "num_query_tokens"):
        known[key] = getattr(config, key, getattr(vision, key, None))
    takes = inspect.signature(cls.__init__).parameters
    given = {key: value for key, value in known.items() if key in takes and value is not None}
    if "video_processor" in takes:
        drawn = {"draw_on_frames": False} if model_type.startswith("ernie") else {}  # it has no font
        given["video_processor"] = getattr(transformers, video["torchvision"])(**drawn)
    if "feature_extractor" in takes:
        given["feature_extractor"] = transformers.WhisperFeatureExtractor(feature_size=8)
    try:
        return cls(**given | WHOLE.get(model_type, {}))
    except ImportError:  # SmolVLM's wants a package that spells numbers
        return None


def build(model_type: str, path: Path) -> Path:
    """Save a random model of a type as a Hugging Face directory."""
    torch.manual_seed(0)
    config = config_of(model_type)
    try:
        model = AutoModelForImageTextToText.from_config(config).float()
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():  # zero at the start, which would hide what lies before
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(path)
    except ValueError:  # named in the mapping, but not of its kind (Evolla)
        config.save_pretrained(path)
    words = copy.deepcopy(tokenizer(model_type not in UNNAMED))
    words.unk_token = words.pad_token  # after which Kosmos-2 has the tokens of its pictures
    words.chat_template = TEMPLATE.replace("<image>", WRITTEN.get(model_type, "<image>"))
    words.save_pretrained(path)
    if (images := image_processor(model_type)) is not None:
        images.save_pretrained(path)
    if (whole := processor(model_type, config, images, words)) is not None:
        whole.save_pretrained(path)
    return path
