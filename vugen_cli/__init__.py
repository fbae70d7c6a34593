"""VUGEN: turn any vision-language model into an image generator.

The Python API, which is what the commands call: `load_sampler`, `sample`, `reconstruct`, `score` and
`VugenPipeline`. Each is imported when it is first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vugen_cli.engine.draw import draw as sample
    from vugen_cli.engine.reconstruct import reconstruct
    from vugen_cli.engine.sampling import load_sampler
    from vugen_cli.metrics.scores import score_sets as score
    from vugen_cli.pipeline import VugenPipeline

__version__ = "0.1.0"
__all__ = ["VugenPipeline", "load_sampler", "reconstruct", "sample", "score"]

_WHERE = {
    "load_sampler": ("vugen_cli.engine.sampling", "load_sampler"),
    "sample": ("vugen_cli.engine.draw", "draw"),
    "reconstruct": ("vugen_cli.engine.reconstruct", "reconstruct"),
    "score": ("vugen_cli.metrics.scores", "score_sets"),
    "VugenPipeline": ("vugen_cli.pipeline", "VugenPipeline"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)
