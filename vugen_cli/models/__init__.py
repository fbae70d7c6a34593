"""The networks of the method: reducer, pixel decoder, generation expert."""

import vugen_cli.vlm  # noqa: F401 - its torchvision repair must come before transformers is imported
