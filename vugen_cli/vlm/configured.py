"""A VLM from its config alone, on the `meta` device: its layers and sizes without one of its weights."""

from types import SimpleNamespace
from typing import Any

import torch

from vugen_cli.errors import VugenError, first_line
from vugen_cli.hub import CONFIGS, may_be_id, reach_hub
from vugen_cli.recipe import Recipe
from vugen_cli.vlm.frozen import FrozenVLM, local_path


def configured_vlm(name: str, recipe: Recipe) -> FrozenVLM:
    """A VLM that has no weights and no tokenizer.

    Where there is no config of an image processor, it is taken to be its family's usual one, at the size that
    the vision config names.

    Args:
        name: `nano`, a Hugging Face directory of which `config.json` is enough, that file itself, or a hub
            id or `hf:owner/name[@revision]`, of which only configs are loaded.
        recipe: says how the VLM is used.

    Raises:
        VugenError: there is no such config, the hub cannot be reached, or it is of no vision-language model.
    """
    path = local_path(name, CONFIGS)
    if not path.exists() and not may_be_id(name):
        raise VugenError(
            f"no VLM at {path}: give a Hugging Face directory, its config.json, a hub id (owner/name) or "
            "`nano`"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise VugenError(f"{path} has no config.json: it is not a Hugging Face model directory")
    options = {
        "local_files_only": path.exists() or not reach_hub(name, "the VLM"),
        "trust_remote_code": False,
    }
    from transformers import AutoConfig, AutoModelForImageTextToText

    source = str(path) if path.exists() else name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, recipe.vlm_dtype))
        images = _image_processor(str(path.parent) if path.is_file() else source, config, options)
    except Exception as error:  # a foreign config can fail in as many ways as there are model classes
        raise VugenError(
            f"{name} is not the config of a vision-language model: {first_line(error)}"
        ) from error
    processor = SimpleNamespace(image_processor=images, tokenizer=None)
    return FrozenVLM(name, model, processor, recipe, digests={})


def _image_processor(source: str, config: Any, options: dict[str, Any]) -> Any:
    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    try:
        return AutoImageProcessor.from_pretrained(source, **options)
    except (OSError, ValueError):
        processor = IMAGE_PROCESSOR_MAPPING[type(config)]["torchvision"]()
    vision = config.vision_config
    for mine, theirs in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
        if hasattr(processor, mine) and hasattr(vision, theirs):
            setattr(processor, mine, getattr(vision, theirs))
    side = getattr(vision, "image_size", None) or dict(getattr(vision, "model_args", None) or {}).get(
        "img_size"
    )
    side = side if isinstance(side, int | None) else side[0]
    if side:
        for name in ("size", "crop_size", "max_image_size"):
            if sizes := getattr(processor, name, None):
                setattr(processor, name, type(sizes)(**{k: side for k, v in dict(sizes).items() if v}))
        if hasattr(processor, "tile_size"):
            processor.tile_size = side
    return processor
