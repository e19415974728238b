"""The lowerings of the ops in Inductor: the generated code calls the functions in ``direct``, and does not reuse memory of workspaces."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import SubgraphPythonWrapperCodegen, V, detect_fake_mode, ir, is_collective, is_lowering, lowering, pytree
from . import direct_arguments, fused, linear, partials, placed, reduced, scaled_linear, scaled_linear_v2, start, wait


class _Direct(ir.FallbackKernel):
    """A call of the function in ``direct`` where the generated code is Python, as it is by default; otherwise a call of the op.

    The import of ``direct`` is a line of the generated code, which Inductor caches.
    """

    def codegen(self, wrapper: Any) -> None:
        if not (V.graph.cpp_wrapper or V.graph.fx_wrapper):
            # The wrapper of a subgraph writes no imports.
            writer = wrapper.get_root_graph() if isinstance(wrapper, SubgraphPythonWrapperCodegen) else wrapper
            writer.add_import_once("from tw_compile.ops import direct as tokenweave")
            self.python_kernel_name = f"tokenweave.{self.op_overload._opname}"
        super().codegen(wrapper)

    def codegen_args(self) -> list[str]:
        args = super().codegen_args()
        if V.graph.cpp_wrapper or V.graph.fx_wrapper:
            return args
        return [arg if isinstance(arg, str) else f"({', '.join(arg)})" for arg in direct_arguments(self.op_overload, args)]


class _Site(_Direct, ir._CollectiveKernel):
    """The same for an op that communicates. Inductor keeps collectives in the order of the graph, and does not remove them."""


class _Fence(ir._CollectiveKernel):
    """Generates no code. It keeps later collectives behind ``output``, a result of a layer."""

    def __init__(self, output: Any) -> None:
        super().__init__(ir.NoneLayout(device=output.get_device()), torch.ops._c10d_functional.wait_tensor.default, [output], [], None)

    def codegen(self, wrapper: Any) -> None:
        pass


def _keep_order(call: Any, output: Any) -> None:
    """Keep the call of a layer in order with collectives: a layer communicates, but Inductor does not take it for a collective."""
    earlier = [operation for operation in V.graph.operations if is_collective(operation)]
    if earlier:
        V.graph.additional_buffer_deps[call.get_operation_name()].add(earlier[-1].get_name())
    _Fence(output)


def layer(subgraph: Any, written: Sequence[int], *operands: Any) -> Any:
    """A call of a subgraph that is compiled once, in place of each of several equal layers: see ``passes/outline.py``.

    subgraph: of the layer, with its results in a tuple
    written:  indices of the operands that the layer writes to, which are inputs of the graph
    operands: the inputs of the layer. (InvokeSubgraph expects two arguments before them.)
    Results may be in a workspace: see ``register``.
    """
    if isinstance(subgraph, torch.fx.GraphModule):  # the graph is run, not lowered: on fake tensors, or by debugging tools
        return _fake_results(subgraph, written) if detect_fake_mode(operands) else subgraph(*operands)
    outputs = ir.InvokeSubgraph.create(subgraph, *operands)
    V.graph.never_reuse_buffers.update(output.get_name() for output in outputs)
    call = outputs[0].inputs[0]
    for i in written:
        assert call.inputs[i].get_name() == operands[i].get_name(), "a layer would write to a copy"
        call.mutation_outputs.append(ir.MutationOutput(ir.NoneLayout(device=call.get_device()), call.inputs[i], call))
    _keep_order(call, outputs[0])
    return [ir.TensorBox.create(output) for output in outputs]


def _fake_results(subgraph: torch.fx.GraphModule, written: Sequence[int], *operands: Any) -> tuple[Tensor, ...]:
    """The results of a call, as fake tensors. Sizes are expressions of the graph's own symbols, so all calls return equal ones."""
    (results,) = subgraph.graph.output_node().args
    return tuple(val.new_empty_strided(val.shape, val.stride()) for val in (result.meta["val"] for result in results))


is_lowering(layer, _fake_results)


def register() -> None:
    """Register the lowerings of the ops, unless they are registered.

    Inductor must not reuse, free or write in place results in a workspace. It owns the outputs of an unknown op, and would give their
    memory to a later buffer of the same size.
    """
    if linear in lowering.lowerings:
        return
    for op in (linear, scaled_linear, scaled_linear_v2, partials):
        _register(op, _Direct, lambda args: (True,))
    _register(start, _Site, lambda args: (True,))  # all calls return the same token
    # in_workspace: the norm, also quantised, and its scale; sharded_residual: the residual
    _register(wait, _Direct, lambda args: (args[-5], args[-6], args[-5], args[-5]))
    _register(fused, _Site, lambda args: (args[-3], args[-6], args[-3], args[-3]))
    lowering.register_lowering(reduced, type_promotion_kind=None)(_wait_after)
    lowering.register_lowering(placed, type_promotion_kind=None)(_realized_in_workspace)


def _realized_in_workspace(x: Any, slot: int, group: str, transport: str) -> Any:
    """The lowering of ``placed``: the kernel that computes x writes it to the workspace."""
    out = lowering.lowerings[partials](x.get_size(), x.get_dtype(), x.get_device(), slot, group, transport)
    ir.MutationLayoutSHOULDREMOVE.realize_into(x, out)
    return out


def _wait_after(total: Any, after: Any) -> Any:
    """The lowering of ``reduced``: a wait that stays behind ``after``, and behind the all-reduce if ``after`` is an unfinished sum."""
    if after is not None:
        after.realize()
    before = len(V.graph.operations)
    total = lowering.lowerings[torch.ops._c10d_functional.wait_tensor.default](total)
    for call in V.graph.operations[before:] if after is not None else ():
        begun = [op.get_name() for op in V.graph.operations[:before] if is_collective(op) and after.get_name() in op.alias_names]
        V.graph.additional_buffer_deps[call.get_operation_name()].add(begun[0] if begun else after.get_name())
    return total


def _register(op: Any, kernel: Any, in_workspace: Callable[[tuple], tuple]) -> None:
    """Register the lowering of one op.

    kernel:       class of the lowered calls
    in_workspace: the arguments of a call -> for each result, whether it may be in a workspace
    """

    def lower(*args: Any) -> Any:
        outputs = pytree.tree_map_only(ir.IRNode, ir.TensorBox.create, kernel.create(op, *args))
        for output, is_in_workspace in zip(outputs if isinstance(outputs, (tuple, list)) else (outputs,), in_workspace(args)):
            if is_in_workspace:
                V.graph.never_reuse_buffers.add(output.get_name())
        return outputs

    lowering.fallbacks.add(op)
    lowering.register_lowering(op, type_promotion_kind=None)(lower)
