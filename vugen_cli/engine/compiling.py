"""torch.compile where it pays: one graph for all layers of the expert, one for the pixel decoder.

Regional compilation: a network's layers are alike, so compiling one serves all of them, in a fraction of the
time. For that a layer may depend on nothing but its inputs and weights, and what varies from batch to batch
(the length of the prompts) must be known to vary.
"""

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vugen_cli.errors import VugenError, first_line
from vugen_cli.recipe import Engine

# On a CPU, compiling the expert's layers takes about 30 s and makes its steps 1.4 times as fast.
STEPS_THAT_PAY = 1000
NEEDS = "it needs a C++ compiler such as g++, and after one that was killed an empty /tmp/torchinductor_$USER"


def wants_compile(engine: Engine, device: torch.device, steps: int, on_cpu: bool) -> bool:
    """Whether a run compiles its network.

    Args:
        engine: its `compile` is true, false or `auto`.
        device: `auto` compiles on GPUs,
        steps: of the whole run, not of what is left: a resumed run computes as it did before;
        on_cpu: and on CPUs, if it pays there and the run is long enough.
    """
    if engine.compile != "auto":
        return engine.compile
    return device.type == "cuda" or (device.type == "cpu" and on_cpu and steps >= STEPS_THAT_PAY)


def compile_forward(
    modules: Iterable[nn.Module],
    must: bool,
    training: bool = True,
    mode: str | None = None,
    shapes: int = 1,
) -> None:
    """Compile the forward passes that train, or those that do not; the others, in previews, stay as they are.

    Modules of one class and size share a graph. Hooks (FSDP's, those of `compile_layers`) stay outside of it.

    Args:
        modules: changed in place, before they are sharded or recomputed.
        must: whether a failure is an error (VugenError, at the first pass) or a line and a slower run.
        training: which passes: those with gradients, or those without.
        mode: of `torch.compile`.
        shapes: of what comes, each with a graph of its own if there are several; otherwise what varies is
            made part of the one graph.
    """
    works, dynamic = True, None if shapes == 1 else False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, shapes)
    # Otherwise a backward pass that cannot be compiled is told of when it is too late to go without.
    with suppress(AttributeError):  # not of every version of torch
        torch._functorch.config.force_non_lazy_backward_lowering = True

    def run(plain: Any, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal works
        if works and torch.is_grad_enabled() == training:
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = first_line(getattr(error, "inner_exception", error))
                said = f"torch.compile fails here ({reason}): {NEEDS}"
                if must:
                    raise VugenError(
                        f"{said}; or go without it (engine.compile=false, or no --compile)"
                    ) from error
                works = False
                tqdm.write(f"{said}; going on without it")
        return plain(*args, **kwargs)

    for module in modules:
        compiled = torch.compile(module.forward, fullgraph=True, mode=mode, dynamic=dynamic)
        module.forward = partial(run, module.forward, compiled)


def compile_layers(
    layers: Iterable[nn.Module], must: bool, training: bool = True, mode: str | None = None
) -> None:
    """`compile_forward` of a generation expert's layers: one graph for all, whatever the prompts' length."""
    layers = list(layers)
    compile_forward(layers, must, training, mode)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(_own_prefix, number), with_kwargs=True)


def _own_prefix(number: int, _layer: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Give a layer its part of the prefix as data: one that used its number would be compiled by itself."""
    if "attention_mask" not in inputs:
        return args, inputs  # a family that calls its layers by position (GIT)
    if inputs["attention_mask"] is not None:
        _varies(inputs["attention_mask"], 3)
    if "past_key_values" not in inputs:  # a DiT's block is called with its part
        _varies(inputs["prompt"], 1)
        return args, inputs
    prefix = inputs["past_key_values"].layer(number)
    _varies(prefix.keys, 2)
    _varies(prefix.values, 2)
    return args, {**inputs, "past_key_values": prefix}


def _varies(tensor: Tensor, dimension: int) -> None:
    torch._dynamo.maybe_mark_dynamic(tensor, dimension)
