"""How Inductor lowers the ops: what its code calls in their place, and that their results are not its own."""

import torch

from ..compat import SubgraphPythonWrapperCodegen, V, detect_fake_mode, ir, is_lowering, lowering, pytree
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
    _register(linear, lambda args: (True,))
    _register(start, lambda args: (True,))  # a token for all calls
    _register(wait, lambda args: (args[-1], args[-2]))  # borrow: the norm, shard: the residual
    _register(fused, lambda args: (args[-1], args[-2]))


def _register(op, lent):
    """lent: the arguments of a call -> which of its results are in a workspace"""

    def lower(*args):
        outputs = pytree.tree_map_only(ir.IRNode, ir.TensorBox.create, _Direct.create(op, *args))
        for output, is_lent in zip(outputs if isinstance(outputs, (tuple, list)) else (outputs,), lent(args)):
            if is_lent:
                V.graph.never_reuse_buffers.add(output.get_name())
        return outputs

    lowering.fallbacks.add(op)
    lowering.register_lowering(op, type_promotion_kind=None)(lower)
