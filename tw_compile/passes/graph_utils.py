"""Small questions that every pass asks of a post-grad graph."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional
WAIT = c10d.wait_tensor.default

_TORCH = str(Path(torch.__file__).parent)

# What changes the shape alone: all elements are there, in their order.
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def calls(node, *targets) -> bool:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_view(op) -> bool:
    """Whether a call of ``op`` returns its input's memory in another shape, or copies it if there is no other way to that shape.

    By the op's schema, which names the alias (``OpOverload.is_view``). RESHAPES may copy, or return an alias without a name.
    """
    return op in RESHAPES or getattr(op, "is_view", False)


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


def sort_and_clean(graph: Graph, stays: Callable[[Node], bool], first: Mapping[Node, Iterable[Node]] | None = None) -> None:
    """Put every node after its inputs, and drop what nobody uses.

    A node moves only to the front, and only when one that stood before it needs it: calls which do not need a later one keep
    their order.

    stays: whether a node is kept although nobody uses it; placeholders and the output always are
    first: a node -> others that go before it, although they are not its inputs
    """
    order, placed = [], set()
    for node in graph.nodes:
        stack = [node]
        while stack:
            top = stack[-1]
            needs = [*top.all_input_nodes, *(first.get(top, ()) if first else ())]
            if top not in placed and (missing := [a for a in needs if a not in placed]):
                stack.extend(reversed(missing))
                continue
            if stack.pop() not in placed:
                placed.add(top)
                order.append(top)
    for before, node in zip(order, order[1:]):
        if before.next is not node:
            before.append(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or stays(node))
    graph.lint()
