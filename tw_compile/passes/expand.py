"""Sites over the process group -> PyTorch's own all-reduces, and ops that Inductor compiles into its own kernels.

A kernel of ours would save nothing there: the process group runs its all-reduce by itself, and add and norm are one kernel of Inductor's in
any case. So a fused site costs what it costs without this backend, and the halves of a woven one run beside each other.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..compat import detect_fake_mode
from ..quantise import read
from ..site import WITHOUT_NORM
from .emit import Emitter
from .graph_utils import WAIT, aten, c10d, calls, is_one, prims, same_size, value
from .graph_utils import arguments as named
from .quantise import emit_quantised


def expand(graph: Graph, over_process_group: Callable[[str, torch.Tensor], bool]) -> None:
    """Replace the sites that the process group's own all-reduce carries, in place.

    over_process_group: (group name, fake partial sums of a site) -> whether the site is replaced
    """
    sums: dict[Node, Node] = {}  # start -> the sum that it begins
    for node in list(graph.nodes):
        if not calls(node, ops.start, ops.wait, ops.fused):
            continue
        given = named(node)
        x = given["x"]
        if given["token"] not in sums if calls(node, ops.wait) else not over_process_group(given["group"], value(x)):
            continue
        with graph.inserting_before(node):
            emit = Emitter(graph, detect_fake_mode([value(x)]))
            emit.like, emit.half = node, node.meta.get("half")
            if calls(node, ops.wait):
                total = emit(ops.reduced, sums[given["token"]], sums.get(given["after"], given["after"]))
                _replace(node, *_site(emit, total, named(given["token"])))
                continue
            if not _is_contiguous(value(x)):  # Inductor makes this an op in place, which sums wrongly where rows have gaps between
                x = emit(aten.clone.default, x, memory_format=torch.contiguous_format)
            total = emit(c10d.all_reduce.default, x, "sum", given["group"])
            if calls(node, ops.start):
                sums[node] = total
            else:
                _replace(node, *_site(emit, emit(WAIT, total), given))
    for start in reversed(sums):
        graph.erase_node(start)
    graph.lint()


def _is_contiguous(x: torch.Tensor) -> bool:
    """Whether a fake tensor is known to be, without a guard."""
    step: int | torch.SymInt = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride())):
        if not is_one(size) and not same_size(stride, step):
            return False
        step = step * size
    return True


def _replace(done: Node, *results: Node) -> None:
    """Replace the results of a ``wait`` or ``fused`` call, and erase it. results: norm, residual, and those of the quantisation"""
    for result in [*done.users]:
        assert calls(result, operator.getitem)
        result.replace_all_uses_with(results[result.args[1]])
        done.graph.erase_node(result)
    done.graph.erase_node(done)


def _site(emit: Emitter, total: Node, given: dict[str, Any]) -> tuple[Node, ...]:
    """The results of a site as calls of a graph."""
    norm, residual = _add_norm(emit, total, given)
    if not given["quantise"]:
        return norm, residual
    return norm, residual, *emit_quantised(emit, norm, read(given["quantise"]), given["static_scale"])


def _add_norm(emit: Emitter, total: Node, given: dict[str, Any]) -> tuple[Node, Node]:
    """``site.add_norm`` as calls of a graph: (norm, residual), both in the dtypes that they have without this backend."""
    dtype = value(total).dtype
    of_residual = value(given["residual"]).dtype if given["fp32_residual"] and given["residual"] is not None else dtype

    def cast(node: Node, to: torch.dtype) -> Node:
        return node if value(node).dtype == to else emit(prims.convert_element_type.default, node, to)

    def mean(node: Node) -> Node:
        return emit(aten.mean.dim, node, [-1], True)

    r = cast(total, torch.float32)
    if given["bias"] is not None:
        r = emit(aten.add.Tensor, r, cast(given["bias"], torch.float32))
    if given["scale"] != 1.0:
        r = emit(aten.mul.Tensor, r, given["scale"])
    if given["residual"] is not None:
        r = emit(aten.add.Tensor, r, cast(given["residual"], torch.float32))
    if given["eps"] == WITHOUT_NORM:
        return cast(r, dtype), cast(r, of_residual)
    row = emit(aten.sub.Tensor, r, mean(r)) if given["center"] else r
    square = emit(aten.mul.Tensor, row, row)
    norm = emit(aten.mul.Tensor, row, emit(aten.rsqrt.default, emit(aten.add.Tensor, mean(square), given["eps"])))
    if given["weight"] is not None:
        weight = cast(given["weight"], torch.float32)
        norm = emit(aten.mul.Tensor, norm, emit(aten.add.Tensor, weight, given["offset"]) if given["offset"] else weight)
    if given["shift"] is not None:
        norm = emit(aten.add.Tensor, norm, cast(given["shift"], torch.float32))
    return cast(norm, dtype), cast(r, of_residual)
