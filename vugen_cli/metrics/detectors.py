"""Objects in an image, by a detector or an instance segmenter of transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vugen_cli.checkpoint import fingerprint
from vugen_cli.errors import VugenError, first_line
from vugen_cli.torchvision_repair import repair_torchvision

MOST = 100  # objects of an image that a segmenter gives, as mmdet's Mask2Former does
SEGMENTERS = ("mask2former", "maskformer")


@dataclass(frozen=True)
class Found:
    """One object.

    Attributes:
        label: the class, as the detector names it.
        score: confidence in [0, 1].
        box: left, top, right, bottom in pixels of the image.
        mask: bool [H, W], or None of a detector that gives boxes alone.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Detector:
    """A loaded detector.

    Attributes:
        name: where it is from.
        kind: its model type, as in "mask2former".
        labels: the classes it knows.
        fingerprint: hash of its weights.
        find: uint8 RGB [3, H, W] -> the objects, in no order, unsure ones included.
    """

    name: str
    kind: str
    labels: frozenset[str]
    fingerprint: str
    find: Callable[[torch.Tensor], list[Found]]


def load_detector(directory: Path, device: torch.device | str = "cpu") -> Detector:
    """An object detector (DETR, YOLOS, RT-DETR, ...) or instance segmenter (Mask2Former, MaskFormer).

    Args:
        directory: a Hugging Face directory of it, with its image processor.
        device: where the network runs.

    Raises:
        VugenError: there is no such directory, or it holds another kind of model.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise VugenError(
            f"--detector {directory} has no config.json: give a Hugging Face directory of a detector, such "
            "as a download of facebook/mask2former-swin-small-coco-instance."
        )
    repair_torchvision()
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForObjectDetection,
        AutoModelForUniversalSegmentation,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

    source = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(directory, **source)
        segments = config.model_type in SEGMENTERS
        auto = AutoModelForUniversalSegmentation if segments else AutoModelForObjectDetection
        if not segments and config.model_type not in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
            raise VugenError(
                f"--detector {directory} holds a {config.model_type} model: give an object detector (DETR, "
                "YOLOS, RT-DETR, ...), Mask2Former or MaskFormer."
            )
        processor = AutoImageProcessor.from_pretrained(directory, **source)
        network, report = auto.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **source
        )
    except VugenError:
        raise
    except Exception as error:  # a foreign directory can fail in as many ways as there are model classes
        reason = first_line(error)
        raise VugenError(f"--detector {directory} could not be loaded: {reason}") from error
    if report["missing_keys"]:  # transformers would leave these at random
        raise VugenError(
            f"--detector {directory} lacks weights, such as {sorted(report['missing_keys'])[0]}."
        )
    network.eval().requires_grad_(False).to(device)
    names = {int(number): str(label) for number, label in network.config.id2label.items()}

    @torch.inference_mode()
    def find(image: torch.Tensor) -> list[Found]:
        inputs = processor(images=[image], return_tensors="pt").to(device)
        outputs = network(**inputs)
        size = (image.shape[1], image.shape[2])
        if segments:
            return _instances(outputs, inputs, size, names)
        result = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[size])[0]
        rows = zip(
            result["scores"].tolist(), result["labels"].tolist(), result["boxes"].tolist(), strict=True
        )
        return [Found(names[label], score, tuple(box)) for score, label, box in rows if label in names]

    return Detector(str(directory), config.model_type, frozenset(names.values()), fingerprint(network), find)


def _instances(outputs: Any, inputs: Any, size: tuple[int, int], names: dict[int, str]) -> list[Found]:
    """Instances of one image from a mask classifier's queries, as mmdet's Mask2Former gives them.

    transformers' own post-processing brings every mask to 384x384 first, whatever the image's shape.

    Args:
        outputs: with class_queries_logits [1, Q, C + 1] and masks_queries_logits [1, Q, h, w].
        inputs: with pixel_values [1, 3, H', W'] and perhaps pixel_mask [1, H', W'], 0 where it is padded.
        size: (H, W) of the image.
        names: of the classes.
    """
    scores = outputs.class_queries_logits[0].float().softmax(-1)[:, :-1]
    best, place = scores.flatten().topk(min(MOST, scores.numel()))
    queries, labels = place // scores.shape[1], place % scores.shape[1]
    masks = outputs.masks_queries_logits.float()
    masks = F.interpolate(masks, inputs["pixel_values"].shape[-2:], mode="bilinear", align_corners=False)
    if "pixel_mask" in inputs:
        inside = inputs["pixel_mask"][0].bool()
        masks = masks[..., : int(inside.any(1).sum()), : int(inside.any(0).sum())]
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]
    found = []
    for score, query, label in zip(best.tolist(), queries.tolist(), labels.tolist(), strict=True):
        mask = masks[query] > 0
        if label not in names or not mask.any():
            continue
        sure = score * masks[query][mask].sigmoid().mean().item()
        rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
        box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
        found.append(Found(names[label], sure, box, mask.cpu().numpy()))
    return found
