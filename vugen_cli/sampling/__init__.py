"""A trained checkpoint ready to use: loading, sampling, drawing to files, the diffusers pipeline."""

from vugen_cli.torchvision_repair import repair_torchvision

repair_torchvision()  # before the first import of diffusers, which imports torchvision
