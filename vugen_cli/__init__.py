"""VUGEN: turn any vision-language model into an image generator.

The Python API, which is what the commands call: `load_sampler`, `sample`, `reconstruct`, `score` and
`VugenPipeline`. Each is imported when it is first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

from vugen_cli.version import __version__

if TYPE_CHECKING:
    from vugen_cli.metrics.scores import score_sets as score
    from vugen_cli.sampling.draw import draw as sample
    from vugen_cli.sampling.pipeline import VugenPipeline
    from vugen_cli.sampling.trained import load_sampler
    from vugen_cli.studies.reconstruct import reconstruct

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
