"""The backend: options, and Inductor with the passes in front of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from . import breaks, compat, context, regions
from .compat import (
    InductorWrapper,
    TensorifyScalarRestartAnalysis,
    TensorifyState,
    compile_fx,
    compile_fx_inner,
    enter_inference_mode,
    fake_tensor_prop,
    functorch_config,
    guard_scalar,
    is_traceable_wrapper_subclass,
    set_grad_enabled,
)
from .forms import compile_forms
from .ops import lowering
from .options import parse
from .report import say_once
from .variants import Compiler


def tokenweave(gm: GraphModule, inputs: list, *, mode: str | None = None, options: dict | None = None) -> Callable:
    """Compile a graph of Dynamo's: ``torch.compile(model, backend="tokenweave")`` calls this.

    mode, options: those of torch.compile. Options in the namespace ``tokenweave.*`` are those of ``options.Options``, all others are
    Inductor's.
    Raises TokenWeaveError on all ranks for a request that cannot be met.
    """
    return compile_graph(gm, inputs, mode=mode, options=options)


def compile_graph(
    gm: GraphModule,
    inputs: list,
    *,
    mode: str | None = None,
    options: dict | None = None,
    compiler: Callable[..., Compiler] = Compiler,
    inner_compile: Callable | None = None,
) -> Callable:
    """The backend, of which a part can be replaced.

    compiler:      makes what compiles the forms of a graph with sites
    inner_compile: compiles one form; None for Inductor
    """
    ours, inductor = parse(options)
    compat.warn_if_untested()
    if missing := compat.missing():
        say_once(
            f"PyTorch {torch.__version__} lacks names that tokenweave needs ({', '.join(missing)}): all graphs are left to Inductor. Use "
            f"PyTorch {' to '.join(compat.TESTED)}"
        )
        return compat.inductor_alone(gm, inputs, mode, inductor)
    # The presets and errors of backend="inductor".
    patches = InductorWrapper(mode, inductor, None).config
    if _trains(gm, inputs):
        say_once(_NEEDS_GRADIENTS)  # here, too: AOTAutograd's cache may have the graph, and then nothing is compiled
        return compile_fx(gm, inputs, inner_compile=_with_gradients, config_patches=patches)
    lowering.register()
    _fix_module_floats(gm)
    broken = breaks.break_of(gm)
    # AOTAutograd does not pass a DTensor to a region.
    marked = any(map(is_traceable_wrapper_subclass, inputs)) and regions.inline(gm)

    def inner(gm: GraphModule, inputs: list, **kwargs: Any) -> Any:
        """Inductor's ``compile_fx_inner`` for a graph that AOTAutograd has traced, with the passes in front."""
        if not kwargs.get("is_inference"):
            return _with_gradients(gm, inputs, **kwargs)
        inlined = regions.inline(gm)
        if inlined:
            with torch.no_grad():
                fake_tensor_prop(gm, inputs)
        return compile_forms(gm, inputs, ours, inner_compile or _inductor, kwargs, compiler, broken, marked or inlined)

    # Inductor's cache is keyed by the graph that the passes have made. AOTAutograd's cache is keyed by the graph before them, which does
    # not contain what the ranks have agreed on: it is off.
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)


_NEEDS_GRADIENTS = "a graph needs gradients: tokenweave leaves it to Inductor. For inference, run under torch.no_grad()"


def _with_gradients(gm: GraphModule, inputs: list, **kwargs: Any) -> Any:
    """Inductor's ``compile_fx_inner`` for a graph of a training step. Ranks that run without gradients are not to wait for this one."""
    say_once(_NEEDS_GRADIENTS)
    context.pass_by(gm.graph)
    return compile_fx_inner(gm, inputs, **kwargs)


def _inductor(gm: GraphModule, inputs: list, **kwargs: Any) -> Any:
    return compile_fx_inner(gm, inputs, **kwargs)


def _reset() -> None:
    """Do what Inductor's own backend does in torch._dynamo.reset(), which calls this."""
    compat.reset_cudagraph_trees()


tokenweave.reset = _reset  # type: ignore[attr-defined]  # where torch._dynamo.reset() looks for it


def _trains(gm: GraphModule, inputs: list) -> bool:
    """Whether a graph needs gradients, as far as is known before it is traced: a graph that switches them off itself may not."""
    needs = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    return needs and not any(node.target in _SWITCHES for node in gm.graph.nodes)


_SWITCHES = (set_grad_enabled, enter_inference_mode)


def _fix_module_floats(gm: GraphModule) -> None:
    """Turn the float attributes of modules, such as a norm's eps, into constants.

    With ``dynamic=True`` Dynamo traces them as inputs of the graph. Each constant adds a guard on the attribute's value.
    """
    restart, numbers = False, {}
    for node in gm.graph.find_nodes(op="placeholder"):
        number, graph_argument = getattr(node.meta.get("example_value"), "item_memo", None), node.meta.get("grapharg")
        if isinstance(number, torch.SymFloat) and graph_argument is not None:
            source = graph_argument.source
            if source.guard_source.is_unspecialized_nn_module() or source.guard_source.is_unspecialized_builtin_nn_module():
                name = str(number.node._expr)
                restart = restart or not TensorifyState.should_specialize(name)
                TensorifyState.specialize(name)
                numbers[node] = guard_scalar(number)
    if restart:
        # Dynamo traces again, and specialises the floats itself. As inputs, each would become a tensor in every call.
        raise TensorifyScalarRestartAnalysis
    regions.fix_numbers(gm, numbers)  # Dynamo does not specialise those that are passed to regions
