"""Helpers of all passes: what a node of a post-grad graph is, copies of graphs, the order of nodes."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from ..compat import HigherOrderOperator, OpOverload, has
from ..options import TokenWeaveError

aten = torch.ops.aten
prims = torch.ops.prims
c10d = torch.ops._c10d_functional
WAIT = c10d.wait_tensor.default

_TORCH = str(Path(torch.__file__).parent)

# Ops that change only the shape: they keep all elements and their order.
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def calls(node: object, *targets: object) -> TypeGuard[Node]:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_view(op: object) -> bool:
    """Whether a call of ``op`` returns the memory of its input in another shape, or a copy where such a view is not possible.

    The op's schema declares the alias (``OpOverload.is_view``). That of RESHAPES does not, as they may copy.
    """
    return op in RESHAPES or getattr(op, "is_view", False)


def value(node: Node) -> Any:
    """The fake value of a node: a tensor, a SymInt, or a tuple of them."""
    return node.meta.get("val")


def is_tensor(node: object) -> TypeGuard[Node]:
    """Whether it is a node whose value is a tensor."""
    return isinstance(node, Node) and isinstance(value(node), torch.Tensor)


def same_size(a: object, b: object) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return _expr(a) == _expr(b)


def _expr(size: object) -> Any:
    return getattr(getattr(size, "node", None), "expr", size)


def same_shape(a: Sequence, b: Sequence) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def other_operand(node: Node, operand: Node) -> Any:
    """The other argument of a binary call."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def arguments(call: Node) -> dict[str, Any]:
    """Name -> argument of a call of one of our own ops. Such calls have positional arguments only."""
    return {a.name: given for a, given in zip(call.target._schema.arguments, call.args, strict=True)}


def positional(call: Node) -> tuple:
    """All arguments of a call of an op by position, with those that are keywords, and those that have their default."""
    schema = call.target._schema.arguments
    given = {a.name: v for a, v in zip(schema, call.args)} | call.kwargs
    return tuple(given.get(a.name, a.default_value) for a in schema)


def in_order(op: Any, named: dict[str, Any]) -> tuple:
    """The positional arguments of a call of ``op``. named: name -> argument; names that ``op`` does not take are ignored"""
    return tuple(named[a.name] for a in op._schema.arguments)


def keeps_rows(view: Node) -> bool:
    """Whether a view keeps the last dimension, and so the rows."""
    return same_size(value(view).shape[-1], value(view.args[0]).shape[-1])


def keeps_order(node: object) -> TypeGuard[Node]:
    """Whether a node is a view that keeps all values and their order: it only adds, drops, splits or merges dimensions."""
    if not isinstance(node, Node) or not is_view(node.target) or not is_tensor(node) or not is_tensor(node.args[0]):
        return False
    if node.target in RESHAPES:
        return True
    new, old = value(node), value(node.args[0])
    if new.dtype != old.dtype or old.is_complex() or new.is_neg() != old.is_neg():
        return False  # other values: other bits, perhaps the conjugate, or the negative
    sizes, old_sizes = ([each for pair in zip(x.shape, x.stride()) if not is_one(pair[0]) for each in pair] for x in (new, old))
    return same_shape(sizes, old_sizes)


def keeps_entries(node: object) -> TypeGuard[Node]:
    """Whether a node is a view that has each entry of its input, in any order and any number of times.

    That excludes a slice that takes a part.
    """
    if not isinstance(node, Node) or not is_view(node.target) or not is_tensor(node) or not is_tensor(node.args[0]):
        return False
    new, old = (sympy.Mul(*(sympy.sympify(_expr(n)) for n in value(x).shape)) for x in (node, node.args[0]))
    return node.target in RESHAPES or old == 0 or (new / old).is_integer is True


class Ancestors:
    """The nodes that each node of a graph depends on, as a bit set."""

    def __init__(self, graph: Graph):
        self.bit = {node: 1 << i for i, node in enumerate(graph.nodes)}
        self.of: dict[Node, int] = {}
        for node in graph.nodes:
            self.of[node] = 0
            for a in node.all_input_nodes:
                self.of[node] |= self.of[a] | self.bit[a]

    def __call__(self, first: Node, then: Node) -> bool:
        """Whether ``then`` depends on ``first``, so that it runs later in any order."""
        return bool(self.of[then] & self.bit[first])

    def replace(self, old: Node, new: Node) -> None:
        self.bit[new], self.of[new] = self.bit[old], self.of[old]


def source_of(node: Node, callers: int = 0) -> str:
    """``file:line, in function: code`` of the model's source that a node comes from, or ''.

    This is the innermost frame outside of torch. callers: take the frame that many calls further out, if there is one
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


def copied_graph(graph: Graph) -> Graph:
    """A copy of a graph, with the same owning module."""
    new = Graph(graph.owning_module)
    env: dict[Node, Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, env.__getitem__)
    return new


def sort_and_clean(graph: Graph, stays: Callable[[Node], bool], first: Mapping[Node, Iterable[Node]] | None = None) -> None:
    """Put each node after its inputs, and remove the nodes without users.

    A node moves only forward, and only if an earlier node needs it. Calls that need no later node keep their order.

    stays: whether a node without users is kept; placeholders and the output are kept in any case
    first: a node -> other nodes to put before it, although they are not its inputs
    """
    order: list[Node] = []
    placed: set[Node] = set()
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
    for before, node in itertools.pairwise(order):
        if before.next is not node:
            before.append(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or stays(node))
    graph.lint()


# --- what users register -------------------------------------------------------------------------------------------------------------


def check_ops(targets: Sequence[object]) -> None:
    """Raises TokenWeaveError for targets of calls that cannot have a token-axis rule, and if there are none."""
    wrong = [f"{op!r:.200}" for op in targets if not _is_op(op)] or ([] if targets else ["nothing"])
    if wrong:
        what = "OpOverloads, such as torch.ops.library.op.default, or names such as 'library::op'"
        raise TokenWeaveError(f"register_token_rule takes {what}, not {', '.join(wrong)}")


def _is_op(op: object) -> bool:
    return "::" in op if isinstance(op, str) else isinstance(op, OpOverload | HigherOrderOperator) or not has(op)


def check_function(given: object, what: str) -> None:
    """Raises TokenWeaveError for what cannot be called. what: what should be given"""
    if not callable(given):
        raise TokenWeaveError(f"{what}, not {given!r:.200}")
