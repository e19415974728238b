"""Which values of a graph may differ between the ranks of a group.

The contract of a site is that its total is the same on all ranks, as each rank gets the rows of others. So what is added to a reduced
value, and what multiplies it, is the same on all ranks of a model that computes anything: the graph's inputs among them are not compared.
What a graph itself tells to be this rank's own is not: a partial sum, the operands of a GEMM that makes one, what another collective
returns, random numbers, and all that is made of these. The sum over the group and a gather within the group are the same again.
"""

import torch
from torch.fx import Graph, Node

from .find import all_reduce_of, collective_group, communicates
from .graph_utils import aten, c10d, calls, is_view, keeps_entries, positional, value

_GEMMS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


def own_values(graph: Graph, group: str) -> dict[Node, str]:
    """Each value that is known to be a rank's own in ``group`` -> what it is made of, in words."""
    own: dict[Node, str] = {}
    for node in graph.nodes:
        call = all_reduce_of(node)
        if call is not None and collective_group(node) == group:
            own |= dict.fromkeys(_around(call.x), f"{call.x}, a partial sum of this rank")
    for node in graph.nodes:
        if _equals_ranks(node, group):
            continue
        if communicates(node):
            own.setdefault(node, f"{node}, which another collective returns")
        elif _draws(node):
            own.setdefault(node, f"{node}, random numbers")
        elif made := next((own[a] for a in node.all_input_nodes if a in own and not isinstance(value(node), torch.SymInt)), None):
            own.setdefault(node, made)
    return own


def _around(x: Node) -> list[Node]:
    """A partial sum, and the operands of the GEMM that makes it: its rows and columns are this rank's part of longer ones.

    What a view takes a part of is a partial sum, too. An operand may be this rank's part of a value that all ranks have.
    """
    found = [x]
    while x.op == "call_function" and is_view(x.target):
        x = x.args[0]
        found.append(x)
    operands = list(x.args[-2:]) if calls(x, *_GEMMS) else []
    while operands:
        found.append(operand := operands.pop())
        operands += [operand.args[0]] if keeps_entries(operand) else []
    return found


def _draws(node: Node) -> bool:
    """Whether a call draws random numbers. An attention does with dropout only."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    named = {a.name: given for a, given in zip(node.target._schema.arguments, positional(node))}
    return named.get("dropout_p", 1.0) != 0.0


def _equals_ranks(node: Node, group: str) -> bool:
    """Whether it is a collective that returns the same on all ranks of the group."""
    gathers = calls(node, c10d.all_gather_into_tensor.default)
    return (gathers or all_reduce_of(node) is not None) and collective_group(node) == group
