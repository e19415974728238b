"""Every name of PyTorch that is not public, and that this package needs. Nowhere else is one imported.

Each has the versions that it is for beside it, where these are not all of TESTED. A name that a later PyTorch has no more is no error
when this is imported: ``missing`` tells its path, and the backend leaves all to Inductor. What only GPUs need is told by
``missing_on_gpus``, and costs no more than the transports that need it.
"""

import functools
import importlib
import logging

import torch

log = logging.getLogger("tw_compile")

# The oldest and the newest PyTorch that all tests were run with: see docs/versions.md.
TESTED = ("2.11", "2.14")

_missing: list[str] = []
_missing_on_gpus: list[str] = []


class _Absent(type):
    """What stands for a missing name: it can be imported, inherited from and asked for attributes, but not called."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.path}.{name}")

    def __call__(cls, *args, **kwargs):
        raise RuntimeError(f"PyTorch {torch.__version__} has no {cls.path}; tw_compile was tested with {' to '.join(TESTED)}")


def _absent(path: str) -> _Absent:
    return _Absent(path.rpartition(".")[2], (), {"path": path})


def _name(path: str, uses: tuple[str, ...] = (), missing: list[str] = _missing):
    """What a path stands for, a module or something in one. uses: attributes that it must have"""
    found = _find(path)
    if found is None:
        missing.append(path)
        return _absent(path)
    lacks = [f"{path}.{attribute}" for attribute in uses if not hasattr(found, attribute)]
    missing += lacks
    return _absent(path) if lacks else found


def _find(path: str):
    module, *attributes = path.split(".")
    found = importlib.import_module(module)
    for attribute in attributes:
        module += f".{attribute}"
        try:
            found = getattr(found, attribute) if hasattr(found, attribute) else importlib.import_module(module)
        except Exception:  # whatever a module of a later PyTorch raises while it is imported
            return None
    return found


def missing() -> list[str]:
    """Paths of the names that this PyTorch does not have."""
    return list(_missing)


def missing_on_gpus() -> list[str]:
    """The same of what only transports for GPUs need. CPU builds miss some of it, which says nothing."""
    return list(_missing_on_gpus)


def is_tested() -> bool:
    """Whether this PyTorch is one that was tested."""
    return _release(TESTED[0]) <= _release(torch.__version__) <= _release(TESTED[1])


@functools.cache
def warn_if_untested() -> None:
    """Say, once, that this PyTorch is none that was tested."""
    if not is_tested():
        log.warning(
            "tw_compile was tested with PyTorch %s to %s, and this is %s. If anything is wrong, compare with backend='inductor'",
            *TESTED,
            torch.__version__,
        )


def _release(version: str) -> tuple[int, int]:
    major, minor = str(version).split(".")[:2]
    return int(major), int(minor)


# --- torch -------------------------------------------------------------------------------------------------------------------

# What torch.compile makes of "inductor": its presets for a mode, and its errors for options.
InductorWrapper = _name("torch._TorchCompileInductorWrapper")
OpOverload = _name("torch._ops.OpOverload")
pytree = _name("torch.utils._pytree", ("tree_map", "tree_map_only"))
FloorDiv = _name("torch.utils._sympy.functions.FloorDiv")
is_traceable_wrapper_subclass = _name("torch.utils._python_dispatch.is_traceable_wrapper_subclass")
guard_scalar = _name("torch.fx.experimental.symbolic_shapes.guard_scalar")
free_unbacked_symbols = _name("torch.fx.experimental.symbolic_shapes.free_unbacked_symbols")
ShapeEnv = _name("torch.fx.experimental.symbolic_shapes.ShapeEnv", ("_update_var_to_range",))
SymNode = _name("torch.fx.experimental.sym_node.SymNode")
ValueRanges = _name("torch.utils._sympy.value_ranges.ValueRanges")
int_oo = _name("torch.utils._sympy.numbers.int_oo")
FakeTensorMode = _name("torch._subclasses.fake_tensor.FakeTensorMode")
FakeTensorProp = _name("torch.fx.passes.fake_tensor_prop.FakeTensorProp", ("propagate_dont_convert_inputs",))
enable_python_dispatcher = _name("torch._dispatch.python.enable_python_dispatcher")
no_python_dispatcher = _name("torch._dispatch.python.no_python_dispatcher")
disable_current_modes = _name("torch.utils._python_dispatch._disable_current_modes")
DisableAutocast = _name("torch._C._DisableAutocast")
# How a graph of Dynamo's switches gradients off.
set_grad_enabled = _name("torch._C._set_grad_enabled")
enter_inference_mode = _name("torch.autograd.grad_mode._enter_inference_mode")
statically_known_true = _name("torch.fx.experimental.symbolic_shapes.statically_known_true")

# --- torch.distributed -------------------------------------------------------------------------------------------------------

# 2.11 takes the name of a group alone; from 2.12 on the group itself, too.
resolve_process_group = _name("torch.distributed.distributed_c10d._resolve_process_group")
process_group_store = _name("torch.distributed.distributed_c10d._get_process_group_store")

# --- Dynamo ------------------------------------------------------------------------------------------------------------------

detect_fake_mode = _name("torch._dynamo.utils.detect_fake_mode")
TracingContext = _name("torch._guards.TracingContext")
tracing = _name("torch._guards.tracing")
TensorifyState = _name("torch._dynamo.symbolic_convert.TensorifyState", ("specialize", "should_specialize"))
TensorifyScalarRestartAnalysis = _name("torch._dynamo.exc.TensorifyScalarRestartAnalysis")

# What Dynamo tells of graph breaks: a list of (reason, user_stack) that grows, and counts of reasons, also of frames that it skips.
graph_break_reasons = _name("torch._dynamo.output_graph.graph_break_reasons", missing=[])
dynamo_counters = _name("torch._dynamo.utils.counters", missing=[])

# Calls of a region of torch.compiler.nested_compile_region; and how AOTAutograd calls one that writes to its inputs.
invoke_subgraph = _name("torch.ops.higher_order.invoke_subgraph")
auto_functionalized = _name("torch.ops.higher_order.auto_functionalized_v2")

# --- logging -----------------------------------------------------------------------------------------------------------------

# What shows more than results; none of it is needed for them.
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
ir = _name("torch._inductor.ir", ("_CollectiveKernel", "FallbackKernel", "InvokeSubgraph", "IRNode", "MutationOutput", "NoneLayout", "TensorBox"))
lowering = _name("torch._inductor.lowering", ("fallbacks", "lowerings", "register_lowering"))
SubgraphPythonWrapperCodegen = _name("torch._inductor.codegen.wrapper.SubgraphPythonWrapperCodegen")


def is_lowering(function, fake_results):
    """Let Inductor call ``function`` as it is, with its own IR, where a graph calls it.

    fake_results: the same arguments, as fake values -> what it returns
    """
    function._inductor_lowering_function = True
    # From 2.14 on, passes ask what such a call returns, after they have changed what it takes; and need not where only its place in
    # memory is another. Before, they left the call alone.
    function._inductor_lowering_output_metadata_fn = fake_results
    function._inductor_lowering_output_metadata_ignores_input_storage = True
    return function


def inductor_alone(gm, inputs, mode, options):
    """What backend="inductor" makes of a graph, with torch.compile's arguments as far as this PyTorch is known to take them."""
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
    """Let the current stream wait."""
    torch.cuda._sleep(cycles)


# The SM carveout of GEMMs: experimental in all of these versions, so that its lack is no reason to do without the rest.
BlasBackend = _name("torch._C._BlasBackend", missing=[])
get_blas_preferred_backend = _name("torch._C._get_blas_preferred_backend", missing=[])
set_blas_preferred_backend = _name("torch._C._set_blas_preferred_backend", missing=[])
get_sm_carveout = _name("torch._C._get_sm_carveout_experimental", missing=[])
set_sm_carveout = _name("torch._C._set_sm_carveout_experimental", missing=[])


def has(name) -> bool:
    """Whether this PyTorch has what stands here under a name."""
    return not isinstance(name, _Absent)
