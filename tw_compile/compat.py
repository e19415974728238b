"""All names of PyTorch that this package uses and that are not public. No other module imports such a name.

A comment gives the versions that have a name, where these are not all of TESTED. Importing this module does not fail if a later PyTorch
lacks a name: ``missing`` returns its path, and the backend leaves all graphs to Inductor. Names that only the transports over symmetric
memory need are in ``missing_on_gpus``, and make only these transports unavailable.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

log = logging.getLogger("tw_compile")

# The oldest and the newest PyTorch with which all tests were run: see docs/versions.md.
TESTED = ("2.11", "2.14")

_missing: list[str] = []
_missing_on_gpus: list[str] = []


class _Absent(type):
    """A placeholder for a missing name. It can be imported, inherited from, and has any attribute; a call of it raises RuntimeError."""

    path: str

    def __getattr__(cls, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.path}.{name}")

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        raise RuntimeError(f"PyTorch {torch.__version__} has no {cls.path}; tw_compile was tested with {' to '.join(TESTED)}")


def _absent(path: str) -> _Absent:
    return _Absent(path.rpartition(".")[2], (), {"path": path})


def _name(path: str, uses: tuple[str, ...] = (), missing: list[str] = _missing) -> Any:
    """The module or object at a path; a placeholder if it, or an attribute in ``uses``, is missing, which is added to ``missing``."""
    found = _find(path)
    if found is None:
        missing.append(path)
        return _absent(path)
    lacks = [f"{path}.{attribute}" for attribute in uses if not hasattr(found, attribute)]
    missing += lacks
    return _absent(path) if lacks else found


def _find(path: str) -> Any:
    module, *attributes = path.split(".")
    found: Any = importlib.import_module(module)
    for attribute in attributes:
        module += f".{attribute}"
        try:
            found = getattr(found, attribute) if hasattr(found, attribute) else importlib.import_module(module)
        except Exception:  # a module of a later PyTorch may raise anything when it is imported
            return None
    return found


def missing() -> list[str]:
    """Paths of the names that this PyTorch lacks and that every graph needs."""
    return list(_missing)


def missing_on_gpus() -> list[str]:
    """Paths of the names that this PyTorch lacks and that only the transports over symmetric memory need. CPU builds always lack some."""
    return list(_missing_on_gpus)


def is_tested() -> bool:
    """Whether the version of this PyTorch is within TESTED."""
    return _release(TESTED[0]) <= _release(torch.__version__) <= _release(TESTED[1])


@functools.cache
def warn_if_untested() -> None:
    """Warn once if this version of PyTorch was not tested."""
    if not is_tested():
        log.warning(
            "tw_compile was tested with PyTorch %s to %s, and this is %s. If a result is wrong, compare it with backend='inductor'",
            *TESTED,
            torch.__version__,
        )


def _release(version: str) -> tuple[int, int]:
    major, minor = str(version).split(".")[:2]
    return int(major), int(minor)


# --- torch -------------------------------------------------------------------------------------------------------------------

# torch.compile's wrapper of "inductor": its presets for a mode, and its errors for options.
InductorWrapper = _name("torch._TorchCompileInductorWrapper")
OpOverload = _name("torch._ops.OpOverload")
HigherOrderOperator = _name("torch._ops.HigherOrderOperator")
get_layout_constraint_tag = _name("torch._library.utils.get_layout_constraint_tag")
pytree = _name("torch.utils._pytree", ("tree_map", "tree_map_only"))
FloorDiv = _name("torch.utils._sympy.functions.FloorDiv")
is_traceable_wrapper_subclass = _name("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
guard_scalar = _name("torch.fx.experimental.symbolic_shapes.guard_scalar")
free_unbacked_symbols = _name("torch.fx.experimental.symbolic_shapes.free_unbacked_symbols")
ShapeEnv = _name("torch.fx.experimental.symbolic_shapes.ShapeEnv", ("_update_var_to_range",))
symbolic_config = _name("torch.fx.experimental._config", ("patch", "backed_size_oblivious"))
SymNode = _name("torch.fx.experimental.sym_node.SymNode")
ValueRanges = _name("torch.utils._sympy.value_ranges.ValueRanges")
int_oo = _name("torch.utils._sympy.numbers.int_oo")
FakeTensorMode = _name("torch._subclasses.fake_tensor.FakeTensorMode")
FakeTensorProp = _name("torch.fx.passes.fake_tensor_prop.FakeTensorProp", ("propagate_dont_convert_inputs",))
enable_python_dispatcher = _name("torch._dispatch.python.enable_python_dispatcher")
no_python_dispatcher = _name("torch._dispatch.python.no_python_dispatcher")
disable_current_modes = _name("torch.utils._python_dispatch._disable_current_modes")
DisableAutocast = _name("torch._C._DisableAutocast")
# The calls in a graph of Dynamo's that switch gradients off.
set_grad_enabled = _name("torch._C._set_grad_enabled")
enter_inference_mode = _name("torch.autograd.grad_mode._enter_inference_mode")
statically_known_true = _name("torch.fx.experimental.symbolic_shapes.statically_known_true")

# --- torch.distributed -------------------------------------------------------------------------------------------------------

# 2.11 takes only the name of a group; from 2.12 on also the group.
resolve_process_group = _name("torch.distributed.distributed_c10d._resolve_process_group")
process_group_store = _name("torch.distributed.distributed_c10d._get_process_group_store")
_world = _name("torch.distributed.distributed_c10d._world", ("pg_map",))


def process_groups() -> list[Any]:
    """The process groups that this process is in."""
    return [*_world.pg_map]


# --- Dynamo ------------------------------------------------------------------------------------------------------------------

detect_fake_mode = _name("torch._dynamo.utils.detect_fake_mode")
TracingContext = _name("torch._guards.TracingContext")
tracing = _name("torch._guards.tracing")
TensorifyState = _name("torch._dynamo.symbolic_convert.TensorifyState", ("specialize", "should_specialize"))
TensorifyScalarRestartAnalysis = _name("torch._dynamo.exc.TensorifyScalarRestartAnalysis")

# For a warning only.
dynamo_config = _name("torch._dynamo.config", ("recompile_limit", "fail_on_recompile_limit_hit"), missing=[])

# Dynamo's graph breaks: a list of (reason, user_stack) that grows, and counts of reasons, also of frames that it skips.
graph_break_reasons = _name("torch._dynamo.output_graph.graph_break_reasons", missing=[])
dynamo_counters = _name("torch._dynamo.utils.counters", missing=[])

# The calls of a region of torch.compiler.nested_compile_region, and of a region that writes to its inputs (AOTAutograd).
invoke_subgraph = _name("torch.ops.higher_order.invoke_subgraph")
auto_functionalized = _name("torch.ops.higher_order.auto_functionalized_v2")

# The name in schemas of a type that Python has registered (opaque objects): for vLLM only.
get_opaque_type_name = _name("torch._library.opaque_object.get_opaque_type_name", missing=[])
# What stands for an input of a graph that is an object of such a type.
FakeScriptObject = _name("torch._library.fake_class_registry.FakeScriptObject", missing=[])

# --- logging -----------------------------------------------------------------------------------------------------------------

# For logs only: nothing else depends on these.
register_log = _name("torch._logging._internal.register_log", missing=[])
trace_structured = _name("torch._logging.trace_structured", missing=[])
CompileContext = _name("torch._guards.CompileContext", ("current_compile_id",), missing=[])

# --- Inductor ----------------------------------------------------------------------------------------------------------------

inductor_config = _name(
    "torch._inductor.config", ("patch", "post_grad_custom_pre_pass", "reorder_for_locality", "cpp_wrapper", "fx_wrapper")
)
compile_fx = _name("torch._inductor.compile_fx.compile_fx")
compile_fx_inner = _name("torch._inductor.compile_fx.compile_fx_inner")
# From 2.12 on.
CustomInferenceAwareGraphPass = _name("torch._inductor.custom_graph_pass.CustomInferenceAwareGraphPass", missing=[])
fake_tensor_prop = _name("torch._inductor.compile_fx.fake_tensor_prop")
reorder_for_locality = _name("torch._inductor.fx_passes.post_grad.reorder_for_locality")
view_to_reshape = _name("torch._inductor.fx_passes.post_grad.view_to_reshape")
BoxedBool = _name("torch._inductor.utils.BoxedBool")
is_collective = _name("torch._inductor.utils.is_collective")
functorch_config = _name("torch._functorch.config", ("patch", "enable_autograd_cache"))
reset_cudagraph_trees = _name("torch._inductor.cudagraph_trees.reset_cudagraph_trees")
V = _name("torch._inductor.virtualized.V")
ir = _name(
    "torch._inductor.ir",
    (
        "_CollectiveKernel", "FallbackKernel", "InvokeSubgraph", "IRNode", "MutationLayoutSHOULDREMOVE", "MutationOutput", "NoneLayout",
        "TensorBox",
    ),
)
lowering = _name("torch._inductor.lowering", ("fallbacks", "lowerings", "register_lowering"))
SubgraphPythonWrapperCodegen = _name("torch._inductor.codegen.wrapper.SubgraphPythonWrapperCodegen")


def is_lowering(function: Any, fake_results: Callable) -> Any:
    """Mark a function as a lowering: Inductor calls it with its IR where a graph calls it. Returns the function.

    fake_results: the same arguments as fake values -> the results as fake values
    """
    function._inductor_lowering_function = True
    # From 2.14 on, passes that change the inputs of such a call ask for its new results, unless only the inputs' storage has changed.
    # Earlier versions leave the call as it is.
    function._inductor_lowering_output_metadata_fn = fake_results
    function._inductor_lowering_output_metadata_ignores_input_storage = True
    return function


def inductor_alone(gm: torch.fx.GraphModule, inputs: list, mode: str | None, options: dict) -> Callable:
    """Compile a graph as backend="inductor" does. Mode and options are ignored if this PyTorch lacks the wrapper that takes them."""
    if isinstance(InductorWrapper, _Absent):
        return torch._dynamo.lookup_backend("inductor")(gm, inputs)
    return InductorWrapper(mode, options, None)(gm, inputs)


# --- GPUs --------------------------------------------------------------------------------------------------------------------

_on_gpus = functools.partial(_name, missing=_missing_on_gpus)
current_raw_stream = _on_gpus("torch._C._cuda_getCurrentRawStream")
SymmetricMemory = _on_gpus("torch._C._distributed_c10d._SymmetricMemory")
DeviceType = _on_gpus("torch._C._autograd.DeviceType")
symmetric_memory = _on_gpus("torch.distributed._symmetric_memory", ("empty", "rendezvous", "get_signal_pad_size"))

_on_gpus("torch.cuda._sleep")


def cuda_sleep(cycles: int) -> None:
    """Make the current stream wait for this many clock cycles of the GPU."""
    torch.cuda._sleep(cycles)


# The SM carveout of GEMMs. It is experimental in all tested versions, and the backend works without it.
BlasBackend = _name("torch._C._BlasBackend", missing=[])
get_blas_preferred_backend = _name("torch._C._get_blas_preferred_backend", missing=[])
set_blas_preferred_backend = _name("torch._C._set_blas_preferred_backend", missing=[])
get_sm_carveout = _name("torch._C._get_sm_carveout_experimental", missing=[])
set_sm_carveout = _name("torch._C._set_sm_carveout_experimental", missing=[])


def has(name: object) -> bool:
    """Whether this PyTorch has a name of this module: whether it is no placeholder."""
    return not isinstance(name, _Absent)
