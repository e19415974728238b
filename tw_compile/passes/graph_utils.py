"""Small questions that every pass asks of a post-grad graph."""

from pathlib import Path

import torch
from torch.fx import Graph, GraphModule, Node

from ..compat import stable_topological_sort

aten = torch.ops.aten
prims = torch.ops.prims

_TORCH = str(Path(torch.__file__).parent)

VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def calls(node, *targets) -> bool:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value(node: Node):
    """The fake value of a node: a tensor, a SymInt, or a tuple of them."""
    return node.meta.get("val")


def is_tensor(node) -> bool:
    return isinstance(node, Node) and isinstance(value(node), torch.Tensor)


def same_size(a, b) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return getattr(getattr(a, "node", None), "expr", a) == getattr(getattr(b, "node", None), "expr", b)


def same_shape(a, b) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def is_one(size) -> bool:
    return isinstance(size, int) and size == 1


def other_operand(node: Node, operand: Node):
    """The other argument of a binary call."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def arguments(call: Node) -> dict[str, object]:
    """The arguments of a call of one of our own ops, which all stand by position, by their names."""
    return {a.name: given for a, given in zip(call.target._schema.arguments, call.args, strict=True)}


def in_order(op, named: dict[str, object]) -> tuple:
    """Those of the named arguments that ``op`` takes, by position."""
    return tuple(named[a.name] for a in op._schema.arguments)


def keeps_rows(view: Node) -> bool:
    """Whether a view leaves the last dimension, so the rows, as they are."""
    return same_size(value(view).shape[-1], value(view.args[0]).shape[-1])


class Ancestors:
    """Which nodes each node of a graph depends on, as one bit each."""

    def __init__(self, graph: Graph):
        self.bit = {node: 1 << i for i, node in enumerate(graph.nodes)}
        self.of: dict[Node, int] = {}
        for node in graph.nodes:
            self.of[node] = 0
            for a in node.all_input_nodes:
                self.of[node] |= self.of[a] | self.bit[a]

    def __call__(self, first: Node, then: Node) -> bool:
        """Whether ``first`` is done before ``then`` begins, by data flow."""
        return bool(self.of[then] & self.bit[first])

    def replace(self, old: Node, new: Node) -> None:
        self.bit[new], self.of[new] = self.bit[old], self.of[old]


def source_of(node: Node, callers: int = 0) -> str:
    """``file:line, in function: code`` of the model's source that a node comes from, or ''.

    The innermost frame outside of torch; ``callers`` asks for the one that many calls further out, where there is one.
    """
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [i for i, line in enumerate(lines) if line.startswith("File ") and _TORCH not in line]
    if not frames:
        return ""
    at = frames[max(len(frames) - 1 - callers, 0)]
    path, number, *function = lines[at].removeprefix("File ").split(", ")
    code = lines[at + 1] if at + 1 < len(lines) else ""
    place = f"{path.strip(chr(34))}:{number.removeprefix('line ')}"
    return f"{place}, {function[0] if function else ''}: {code}"


def subgraphs(graph: Graph) -> list[tuple[str, Graph]]:
    """The graphs of the higher-order ops (cond, while_loop, flex_attention) that a graph calls, at any depth."""
    owner = graph.owning_module
    if owner is None:
        return []
    modules = [(name, module) for name, module in owner.named_modules() if name and isinstance(module, GraphModule)]
    return [(name, module.graph) for name, module in modules]


def sort_and_clean(graph: Graph) -> None:
    """Put every node after its inputs, and drop what nobody uses, a dead ``wait_tensor`` included."""
    def impure(node):
        # wait_tensor is registered as having a side effect: it would keep the all-reduce that a site replaces.
        return node.op in ("placeholder", "output") or (
            node.is_impure() and node.target is not torch.ops._c10d_functional.wait_tensor.default
        )

    stable_topological_sort(graph)
    graph.eliminate_dead_code(is_impure_node=impure)
    graph.lint()
