"""Finds repeated layers in a placed graph.

Sites mark the layers. A section is the nodes from one site to the next. Layers are the longest run of sections that repeats with some
period. Repetitions are equal if their ops, constants, shapes and data flow are equal. Their operands, mostly weights, and the numbers of
their sites differ. An operand may also be an opaque object, such as the name of a layer.
"""

import itertools
import operator
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .. import ops
from ..compat import FakeScriptObject, OpOverload, auto_functionalized
from ..site import NEXT_SITE
from .graph_utils import arguments, aten, c10d, calls, in_order, value
from .rules.functional import given, name_of
from .rules.token_axis import expr

# Sites, and what ``expand`` has made of them.
SITES = (ops.start, ops.fused, c10d.all_reduce.default)


@dataclass(frozen=True)
class Repetition:
    """A layer, or several that repeat together.

    nodes: its nodes, writes last
    outer: the inputs of these nodes that are not among them, in order of first use
    """

    nodes: list[Node]
    outer: list[Node]

    def operands(self) -> list[Node]:
        """The tensors in ``outer``, then the objects. (Inductor takes a call's device from the first of them.)"""
        return [a for kind in (torch.Tensor, FakeScriptObject) for a in self.outer if isinstance(value(a), kind)]

    def written(self) -> list[Node]:
        """The inputs of the graph that the layer writes to."""
        return [node.args[0] for node in self.nodes if is_write(node)]


def sections_of(graph: Graph) -> list[list[Node]]:
    """The nodes from each site to the next.

    A site begins a section. An all-reduce of PyTorch's own ends one: what it reduces is then mostly made in the same layer, and Inductor
    reduces it in place. In a later layer it would be an input, of which Inductor makes a copy.
    """
    sections: list[list[Node]] = []
    for node in graph.nodes:
        if calls(node, ops.start, ops.fused):
            sections.append([])
        if sections and node.op == "call_function" and not is_write(node):
            sections[-1].append(node)
        if calls(node, c10d.all_reduce.default):
            sections.append([])
    return [section for section in sections if section]


def is_write(node: Node) -> bool:
    """Whether it is a write to an input of the graph. These are at the end of a graph, for a model's operations in place."""
    return calls(node, aten.copy_.default) and node.args[0].op == "placeholder"


def _with_writes(nodes: list[Node]) -> list[Node]:
    """The nodes, then the writes of their results to inputs of the graph that no other node reads."""
    inside = set(nodes)
    writes = [u for node in nodes for u in node.users if is_write(u) and u.args[1] is node]
    return nodes + [write for write in writes if set(write.args[0].users) <= {write, *inside}]


def longest_run(
    sections: list[list[Node]], numbers: dict[Node, int], refused: Container[tuple[int, int]], texts: bool = True
) -> tuple[tuple[int, int], list[Repetition]]:
    """The repetitions that save the most nodes; among equals those of the shortest period. [] if no two are equal.

    refused: the runs that are not taken, as (first section, sections of a repetition)
    texts:   whether equal repetitions have equal texts among their constants
    Returns ((first section, sections of a repetition), the repetitions).
    """
    known: dict[tuple, int] = {}
    kinds = [known.setdefault(_key(section, numbers, texts)[0], len(known)) for section in sections]
    at, saved = (0, 0), 0
    best: list[Repetition] = []
    for period in range(1, len(sections) // 2 + 1):
        first = 0
        while first + 2 * period <= len(sections):
            end = first + period
            while end < len(sections) and kinds[end] == kinds[end - period]:
                end += 1
            count = (end - first) // period
            if (first, period) in refused:
                first += 1
                continue
            if count > 1 and (count - 1) * sum(map(len, sections[first : first + period])) > saved:
                run = _equal(sections, first, period, count, numbers, texts)
                if (len(run) - 1) * len(run[0].nodes) > saved:
                    at, best, saved = (first, period), run, (len(run) - 1) * len(run[0].nodes)
            first = max(end - period, first) + 1
    return at, best


def _equal(
    sections: list[list[Node]], first: int, period: int, count: int, numbers: dict[Node, int], texts: bool
) -> list[Repetition]:
    """The longest run of equal repetitions, among repetitions whose sections are equal."""
    repetitions = []
    for at in range(first, first + count * period, period):
        nodes = _with_writes([node for section in sections[at : at + period] for node in section])
        key, outer = _key(nodes, numbers, texts)
        repetitions.append((key, Repetition(nodes, outer)))
    runs = [[repetition for _, repetition in run] for _, run in itertools.groupby(repetitions, key=operator.itemgetter(0))]
    return max(runs, key=len)


def different_text(sections: list[list[Node]], numbers: dict[Node, int]) -> str:
    """Why no two repetitions are equal, if only texts differ, such as names of layers; else ''."""
    _, alike = longest_run(sections, numbers, (), texts=False)
    for one, other in zip(*(repetition.nodes for repetition in alike[:2])) if alike else ():
        is_op = isinstance(one.target, OpOverload) or calls(one, auto_functionalized)
        for (name, text), theirs in zip(given(one).items(), given(other).values()) if is_op else ():
            if isinstance(text, str) and text != theirs:
                return f"its layers differ in {name} of {name_of(one)}, a constant: {text!r} and {theirs!r}"
    return ""


def site_numbers(graph: Graph) -> dict[Node, int]:
    """Site -> its number in a layer: NEXT_SITE if it is one more than that of the slot's previous site."""
    numbers: dict[Node, int] = {}
    last: dict[tuple[str, int], int] = {}
    for node in graph.nodes:
        if calls(node, ops.start, ops.fused):
            group, slot, site = (arguments(node)[name] for name in ("group", "slot", "site"))
            numbers[node] = NEXT_SITE if last.get((group, slot)) == site - 1 else site
            last[group, slot] = site
    return numbers


def _key(nodes: list[Node], numbers: dict[Node, int], texts: bool) -> tuple[tuple, list[Node]]:
    """(a key, which is equal for nodes that compute the same, the inputs of the nodes that are not among them)"""
    inner = {node: i for i, node in enumerate(nodes)}
    outer: dict[Node, int] = {}

    def encoded(a: Any) -> tuple:
        if isinstance(a, Node):
            return ("inner", inner[a]) if a in inner else ("outer", outer.setdefault(a, len(outer)))
        if isinstance(a, (list, tuple)):
            return tuple(map(encoded, a))
        if isinstance(a, dict):
            return tuple((name, encoded(item)) for name, item in a.items())
        if isinstance(a, str) and not texts:
            return (str,)
        return type(a), str(a)  # as 1 == 1.0 == True, and -0.0 == 0.0

    key = [
        (node.target, encoded(arguments_of(node, numbers)), encoded(node.kwargs), _signature(value(node)), node.meta.get("half"))
        for node in nodes
    ]
    return (tuple(key), tuple(_signature(value(node)) for node in outer)), list(outer)


def arguments_of(node: Node, numbers: dict[Node, int]) -> tuple:
    """The arguments of a call in a layer. numbers: see ``site_numbers``"""
    return in_order(node.target, arguments(node) | {"site": numbers[node]}) if node in numbers else node.args


def _signature(val: Any) -> tuple:
    if isinstance(val, torch.Tensor):
        return val.device, val.dtype, tuple(map(expr, val.shape)), tuple(map(expr, val.stride())), _is_aligned(val)
    if isinstance(val, FakeScriptObject):  # an object is no constant
        return FakeScriptObject, val.script_class_name
    return tuple(map(_signature, val)) if isinstance(val, (list, tuple)) else (type(val), str(val))


def _is_aligned(val: torch.Tensor) -> bool:
    """Whether its offset in its storage is known to be a multiple of 16 bytes."""
    return sympy.Mod(expr(val.storage_offset()) * val.itemsize, 16) == 0
