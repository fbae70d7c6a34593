"""A trained checkpoint ready to use: loading, sampling, drawing to files, the diffusers pipeline."""

import logging

from vugen_cli.torchvision_repair import repair_torchvision

repair_torchvision()  # before the first import of diffusers, which imports torchvision
for library in (
    "torchao",
    "torch.utils._pytree",
):  # that import tells of torchao's kernels for other machines
    logging.getLogger(library).setLevel(logging.ERROR)
