"""The frozen vision-language model: images to latents, prompts to a prefix."""

from vugen_cli.torchvision_repair import repair_torchvision

repair_torchvision()  # before the first import of transformers, which imports torchvision
