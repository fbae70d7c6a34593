"""LPIPS: how far apart two images look to VGG16, by layers weighted to agree with people.

Zhang et al. (2018), "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1 on
VGG16, which is what papers call LPIPS where they compare reconstructions.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from vugen_cli.errors import VugenError, first_line
from vugen_cli.torchvision_repair import repair_torchvision

# torchvision's weights of VGG16, and the weights of its five layers as torch-fidelity carries them.
FILES = {
    "vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "weights-vgg16-lpips.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-vgg16-lpips.pth",
}
LAYERS = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as VGG16 was trained


def load_lpips(
    device: torch.device | str = "cpu",
) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dict[str, str]]:
    """LPIPS of pairs, with its two files from torch's hub folder ($TORCH_HOME/hub/checkpoints).

    Returns:
        A function of two float [B, 3, H, W] in [0, 1] to float [B], differentiable, and the files' hashes by
        name.

    Raises:
        VugenError: a file is missing or damaged; says where to get it and where to put it. The function
            raises it for images of less than 16 pixels a side, of which VGG16 leaves nothing.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name, url in FILES.items():
        if not (folder / name).is_file():
            raise VugenError(f"LPIPS needs {folder / name}: get it from {url}, or do without LPIPS.")
    paths = [folder / name for name in FILES]
    vgg = vgg16()
    try:
        states = [torch.load(path, map_location="cpu", weights_only=True) for path in paths]
        prefix = "features."
        vgg.load_state_dict({k.removeprefix(prefix): v for k, v in states[0].items() if k.startswith(prefix)})
        weights = [states[1][f"lin{i}.model.1.weight"].to(device) for i in range(len(LAYERS))]
    except Exception as error:  # torch.load and load_state_dict raise a dozen kinds on another file
        reason = first_line(error)
        raise VugenError(f"{paths[0]} or {paths[1].name} holds no weights of LPIPS: {reason}.") from error
    lpips = lpips_of(vgg.to(device), weights, device)
    return lpips, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def vgg16() -> torch.nn.Sequential:
    """The convolutions of VGG16, untrained, in evaluation mode."""
    repair_torchvision()
    from torchvision.models.vgg import cfgs, make_layers

    return make_layers(cfgs["D"]).eval().requires_grad_(False)


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """Features [B, channels, H, W] scaled to length 1 along the channels.

    The small number is under the root: beside it, the root has no gradient where all channels are 0.
    """
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


def lpips_of(
    vgg: torch.nn.Sequential, weights: list[torch.Tensor], device: torch.device | str
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function that `load_lpips` returns, of networks on a device.

    Args:
        vgg: from `vgg16`.
        weights: of each of LAYERS, [1, channels, 1, 1].
        device: where both are.
    """
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def lpips(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if min(a.shape[-2:]) < 16:
            raise VugenError(f"LPIPS needs images of at least 16x16 pixels, got {a.shape[-2]}x{a.shape[-1]}.")
        distance = torch.zeros((), device=device)
        x = (torch.cat([a, b]).to(device, torch.float32) - mean) / std
        for index, layer in enumerate(vgg):
            x = layer(x)
            if index in LAYERS:
                # The weighted squared difference, averaged over the places.
                left, right = unit_length(x).chunk(2)
                weight = weights[LAYERS.index(index)]
                distance = distance + ((left - right).square() * weight).sum(1).mean(dim=(1, 2))
        return distance

    return lpips
