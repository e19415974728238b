"""How Inductor lowers the ops: what its code calls in their place, and that their results are not its own."""

import torch

from ..compat import SubgraphPythonWrapperCodegen, V, detect_fake_mode, ir, is_collective, is_lowering, lowering, pytree
from . import fused, linear, start, wait


class _Direct(ir.FallbackKernel):
    """A call of an op; of the function in ``direct``, where the code is Python, as it is by default.

    The import is a line of that code, which Inductor caches.
    """

    def codegen(self, wrapper):
        if not (V.graph.cpp_wrapper or V.graph.fx_wrapper):
            # That of a subgraph writes no imports.
            writer = wrapper.get_root_graph() if isinstance(wrapper, SubgraphPythonWrapperCodegen) else wrapper
            writer.add_import_once("from tw_compile.ops import direct as tokenweave")
            self.python_kernel_name = f"tokenweave.{self.op_overload._opname}"
        super().codegen(wrapper)


class _Site(_Direct, ir._CollectiveKernel):
    """The same of an op that communicates: one of those that Inductor leaves in the order of the graph, and never drops."""


class _Fence(ir._CollectiveKernel):
    """No code: it keeps the collectives that follow behind ``output``, which a layer returns."""

    def __init__(self, output):
        super().__init__(ir.NoneLayout(device=output.get_device()), torch.ops._c10d_functional.wait_tensor.default, [output], [], None)

    def codegen(self, wrapper):
        pass


def _keep_place(call, output) -> None:
    """Let a layer, which communicates but is no collective to Inductor, keep its place among those that are."""
    earlier = [operation for operation in V.graph.operations if is_collective(operation)]
    if earlier:
        V.graph.additional_buffer_deps[call.get_operation_name()].add(earlier[-1].get_name())
    _Fence(output)


def layer(subgraph, written, *operands):
    """What ``passes/outline.py`` puts in the place of a layer: a call of what the first such call compiles.

    written: numbers of the operands that it writes to, which are inputs of the graph. (InvokeSubgraph looks for the operands behind two
    other arguments.) Some of the results are in a workspace: see register.
    """
    if isinstance(subgraph, torch.fx.GraphModule):  # the graph itself is run: by fake tensors, or tools that look for errors in it
        return _fake_results(subgraph, written) if detect_fake_mode(operands) else subgraph(*operands)
    outputs = ir.InvokeSubgraph.create(subgraph, *operands)
    V.graph.never_reuse_buffers.update(output.get_name() for output in outputs)
    call = outputs[0].inputs[0]
    for i in written:
        assert call.inputs[i].get_name() == operands[i].get_name(), "a layer would write to a copy"
        call.mutation_outputs.append(ir.MutationOutput(ir.NoneLayout(device=call.get_device()), call.inputs[i], call))
    _keep_place(call, outputs[0])
    return [ir.TensorBox.create(output) for output in outputs]


def _fake_results(subgraph, written, *operands):
    """What a call returns, as fake tensors. Sizes are expressions of the graph's own symbols, so all calls return equal ones."""
    (results,) = subgraph.graph.output_node().args
    return tuple(val.new_empty_strided(val.shape, val.stride()) for val in (result.meta["val"] for result in results))


is_lowering(layer, _fake_results)


def register() -> None:
    """Make these the lowerings of the ops, once.

    Results in a workspace are not Inductor's to reuse, write in place or free. It owns the outputs of an op that it does not
    know: it would hand their memory to a later buffer of the same size.
    """
    if linear in lowering.lowerings:
        return
    _register(linear, _Direct, lambda args: (True,))
    _register(start, _Site, lambda args: (True,))  # a token for all calls
    _register(wait, _Direct, lambda args: (args[-3], args[-4]))  # in_workspace: the norm, sharded_residual: the residual
    _register(fused, _Site, lambda args: (args[-3], args[-4]))


def _register(op, kernel, lent):
    """kernel: its class; lent: the arguments of a call -> which of its results are in a workspace"""

    def lower(*args):
        outputs = pytree.tree_map_only(ir.IRNode, ir.TensorBox.create, kernel.create(op, *args))
        for output, is_lent in zip(outputs if isinstance(outputs, (tuple, list)) else (outputs,), lent(args)):
            if is_lent:
                V.graph.never_reuse_buffers.add(output.get_name())
        return outputs

    lowering.fallbacks.add(op)
    lowering.register_lowering(op, type_promotion_kind=None)(lower)
