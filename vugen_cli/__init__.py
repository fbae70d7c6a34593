"""VUGEN: turn any vision-language model into an image generator.

From Python: `load_sampler`, `sample`, `reconstruct`, `score` and `VugenPipeline` (docs/python.md). They are
what the commands call, and are imported when they are first used, so that `vugen --help` stays quick.
"""

from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "load_sampler": ("vugen_cli.engine.sampling", "load_sampler"),
    "sample": ("vugen_cli.engine.draw", "draw"),
    "reconstruct": ("vugen_cli.engine.reconstruct", "reconstruct"),
    "score": ("vugen_cli.metrics.scores", "score_sets"),
    "VugenPipeline": ("vugen_cli.pipeline", "VugenPipeline"),
}
__all__ = ["VugenPipeline", "load_sampler", "reconstruct", "sample", "score"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)
