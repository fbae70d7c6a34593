"""The networks of the method: reducer, pixel decoders, generation expert. They know no files and no ranks."""

from vugen_cli.torchvision_repair import repair_torchvision

repair_torchvision()  # before the first import of transformers, which imports torchvision
