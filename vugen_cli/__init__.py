"""VUGEN: turn any vision-language model into an image generator.

The Python API, which is what the commands call: `load_sampler`, `sample`, `reconstruct`, `score` and
`VugenPipeline`. Each is imported when it is first used, so that importing the package costs nothing.

Image -> z -> reducer -> z̃ -> pixel decoder -> image is stage 1; noise -> z̃, given a prompt, is stage 2. The
packages tell it, and every import runs down this list (`tests/test_layers.py`):

    app, commands  the command line: options in, one call into the library, one summary out
    serve          a sampler behind HTTP: what waits is drawn together; OpenAI's interface, and a page
    nano           the embedded world, a wing of its own: OpenMoji scenes, the small VLM, its judge, the demo
    studies        questions about a trained sampler: reconstructions, over training, understanding, compare
    stages         what is trained, and its losses: reducer and decoder, sampler, VAE, distillation, latents
    sampling       a checkpoint ready to use; z̃ is drawn, with guidance, in `sampler.py`; diffusers pipeline
    metrics        scores of image sets, pairs and prompts; FID is taken in `frechet.py`, on `features.py`
    models         the networks: `reducer.py`, `pixel_decoder.py`; the velocity is `generation_expert.py`
    vlm            the frozen VLM: images to z (`latents.py`), prompts to tokens (`prompts.py`)
    engine         the one training loop, resume, several processes, precision, logs; it knows no stage
    data           sources, mixtures, remote sets; a shard is written in `writer.py`, read in `loader.py`
    a file each    checkpoint (safetensors), card (what its header says), key_map (names of old files),
                   pictures, recipe (every key), hub, flow (path, loss, solvers), seeds, moments, files,
                   progress, processes, torchvision_repair, errors, version
"""

import logging
from typing import TYPE_CHECKING, Any

from vugen_cli.version import __version__

if TYPE_CHECKING:
    from vugen_cli.metrics.scores import score_sets as score
    from vugen_cli.sampling.draw import draw as sample
    from vugen_cli.sampling.pipeline import VugenPipeline
    from vugen_cli.sampling.trained import load_sampler
    from vugen_cli.studies.reconstruct import reconstruct

# Where torchao is installed, transformers and diffusers import it and tell of what it has for others.
_OF_TORCHAO = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
for _name in _OF_TORCHAO:
    logging.getLogger(_name).setLevel(logging.ERROR)

__all__ = ["VugenPipeline", "__version__", "load_sampler", "reconstruct", "sample", "score"]

_WHERE = {
    "load_sampler": ("vugen_cli.sampling.trained", "load_sampler"),
    "sample": ("vugen_cli.sampling.draw", "draw"),
    "reconstruct": ("vugen_cli.studies.reconstruct", "reconstruct"),
    "score": ("vugen_cli.metrics.scores", "score_sets"),
    "VugenPipeline": ("vugen_cli.sampling.pipeline", "VugenPipeline"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)
