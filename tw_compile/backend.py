"""The backend: options, and Inductor with the passes in front of it."""

import torch

from . import breaks, compat, regions
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
from .forms import Forms, compile_forms
from .ops import lowering
from .options import parse
from .report import say_once


def tokenweave(gm, inputs, *, mode=None, options=None):
    """What ``torch.compile(model, backend="tokenweave")`` calls for each graph.

    mode, options: torch.compile's; options in the namespace ``tokenweave.*`` are ours (``options.Options``), all others
    Inductor's. Raises TokenWeaveError for a request that cannot be met, on every rank alike.
    """
    return compile_graph(gm, inputs, mode=mode, options=options)


def compile_graph(gm, inputs, *, mode=None, options=None, forms=Forms, inner_compile=None):
    """The backend. forms: what is made of a graph with sites; inner_compile: what compiles them, Inductor where it is None"""
    ours, inductor = parse(options)
    compat.warn_if_untested()
    if missing := compat.missing():
        say_once(f"PyTorch {torch.__version__} does not have what tokenweave needs of it ({', '.join(missing)}): all is left to Inductor")
        return compat.inductor_alone(gm, inputs, mode, inductor)
    # What backend="inductor" does with them: the same presets, the same errors.
    patches = InductorWrapper(mode, inductor, None).config
    if _trains(gm, inputs):
        say_once(_NEEDS_GRADIENTS)
        return compile_fx(gm, inputs, config_patches=patches)
    lowering.register()
    _fix_module_floats(gm)
    broken = breaks.break_of(gm)
    if any(map(is_traceable_wrapper_subclass, inputs)):
        regions.inline(gm)  # AOTAutograd does not pass a DTensor to a region

    def inner(gm, inputs, **kwargs):
        """What Inductor does with a graph that AOTAutograd has traced, with the passes in front."""
        if not kwargs.get("is_inference"):
            say_once(_NEEDS_GRADIENTS)
            return compile_fx_inner(gm, inputs, **kwargs)
        if regions.inline(gm):
            with torch.no_grad():
                fake_tensor_prop(gm, inputs)
        return compile_forms(gm, inputs, ours, inner_compile or _inductor, kwargs, forms, broken)

    # What Inductor caches is the graph that the passes have made, by its content. AOTAutograd would cache what comes of the graph
    # before them, which does not say what the ranks have agreed on.
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)


_NEEDS_GRADIENTS = "a graph needs gradients: tokenweave leaves it to Inductor. For inference, run under torch.no_grad()"


def _inductor(gm, inputs, **kwargs):
    return compile_fx_inner(gm, inputs, **kwargs)


def _reset() -> None:
    """torch._dynamo.reset() calls this: what Inductor's own backend does."""
    compat.reset_cudagraph_trees()


tokenweave.reset = _reset


def _trains(gm, inputs) -> bool:
    """Whether a graph needs gradients, as far as can be told before it is traced: one that switches them off itself may not."""
    needs = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    return needs and not any(node.target in _SWITCHES for node in gm.graph.nodes)


_SWITCHES = (set_grad_enabled, enter_inference_mode)


def _fix_module_floats(gm: torch.fx.GraphModule) -> None:
    """Make constants of the float attributes of modules: a norm's eps, a residual multiplier.

    With ``dynamic=True`` Dynamo traces them as inputs of the graph. Fixing one adds the guard that it stays what it is.
    """
    told, numbers = False, {}
    for node in gm.graph.find_nodes(op="placeholder"):
        number, graph_argument = getattr(node.meta.get("example_value"), "item_memo", None), node.meta.get("grapharg")
        if isinstance(number, torch.SymFloat) and graph_argument is not None:
            source = graph_argument.source
            if source.guard_source.is_unspecialized_nn_module() or source.guard_source.is_unspecialized_builtin_nn_module():
                name = str(number.node._expr)
                told = told or not TensorifyState.should_specialize(name)
                TensorifyState.specialize(name)
                numbers[node] = guard_scalar(number)
    if told:
        # Dynamo begins again, and makes constants of them itself: as inputs, every call would make a tensor of each.
        raise TensorifyScalarRestartAnalysis
    regions.fix_numbers(gm, numbers)  # where they are passed to regions, Dynamo has not
