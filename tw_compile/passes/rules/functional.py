"""Token-axis rules of ops that write to their arguments, and of custom ops that compute row by row.

AOTAutograd makes a call that writes to its arguments functional: ``auto_functionalized_v2(op, ..., _all_bases=[...])`` returns the results
of ``op``, and the *bases* with what was written. A base is a tensor of which an argument is a view, or the argument itself. ``split`` makes
that call for each half, on its half of each base. A base that was made for the call (``empty``) is made for each half, so that nothing is
copied: Inductor lets the op write to it.
"""

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from ...compat import OpOverload, auto_functionalized
from ..emit import Emit
from ..graph_utils import aten, calls, is_one, is_tensor, value
from .token_axis import _RULES, Axes, Rule, Split, TokenAxis, register_token_rule, same_axis

EMPTY = aten.empty.memory_format
BASES = "_all_bases"


def name_of(call: Node) -> str:
    """The name of the op that a call runs."""
    return str(call.args[0] if calls(call, auto_functionalized) else call.target)


def fresh(emit: Emit, empty: Node, dim: int, size: Any) -> Node:
    """A tensor like ``empty``, a call of EMPTY, with another size."""
    sizes = list(empty.args[0])
    sizes[dim] = size
    return emit(empty.target, sizes, **empty.kwargs)


def given(call: Node) -> dict[str, Any]:
    """Name -> argument of a call of an op. An argument that the op writes to is left out if the call is functional."""
    if calls(call, auto_functionalized):
        return {a.name: call.kwargs[a.name] for a in call.args[0]._schema.arguments if a.name in call.kwargs}
    return {a.name: argument for a, argument in zip(call.target._schema.arguments, call.args)} | call.kwargs


def base_of(call: Node, name: str) -> tuple[int, Node, int | None] | str | None:
    """(index, base, the dimension that is sliced or None) of an argument that a functional call writes to; None if it is None.

    A text if the argument is a view of another kind, which plain.py has not been able to replace.
    """
    index = call.kwargs[f"_{name}_base_index"]
    if index is None:
        return None
    if f"_{name}_size" in call.kwargs:
        return f"it writes to {name}, a view that is neither a slice nor a reshape"
    return index, call.kwargs[BASES][index], call.kwargs.get(f"_{name}_slice_dim")


def written(op: OpOverload) -> list[str]:
    """The names of the arguments that an op writes to."""
    return [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


@register_token_rule(auto_functionalized)
def _functional(node: Node, axes: Axes) -> Split | str | None:
    """The rule of the op that it calls. That rule gets this node."""
    op = node.args[0]
    rule = _RULES.get(op) or _RULES.get(op.name())
    return rule(node, axes) if rule is not None else f"no token-axis rule for {op}"


def rows(*names: str) -> Rule:
    """The rule of an op that computes row by row, for calls and for functional calls.

    names: the arguments that have a row for each token along their first dimension, also those that the op writes to. Those with a single
           row, such as one scale for all tokens, and all other arguments are the same for all tokens. All results have rows
    """

    def rule(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | str | None:
        return split_rows(node, axes, names)

    return rule


def split_rows(node: Node, axes: Mapping[Node, TokenAxis], names: tuple[str, ...]) -> Split | str | None:
    """See ``rows``."""
    axis, slices = next(iter(axes.values())), {}
    if axis.dim != 0 or not all(same_axis(axis, other) for other in axes.values()):
        return None
    inputs: dict[str | tuple[str, int] | int, Any] = {}
    for name, argument in given(node).items():
        if name in names:
            inputs[place_of(node, name)] = argument
        elif isinstance(argument, Node) and argument in axes:
            return f"its argument {name} is not the same for all tokens"
    if calls(node, auto_functionalized):
        for name in written(node.args[0]):
            base = base_of(node, name)
            if isinstance(base, str):
                return base
            if base is not None and (name not in names or base[2] == 0):
                return f"it writes to {name}, which is not one row for each token"
            if base is not None:
                inputs[BASES, base[0]] = base[1]
    for place, argument in inputs.items():
        if is_tensor(argument) and argument not in axes and value(argument).dim() > 0 and not is_one(value(argument).shape[0]):
            slices[place] = axis
    # The length of vLLM's positions is a symbol of its own. They have one entry for each token; no other vector is trusted.
    vectors = {place for place in slices if value(inputs[place]).dim() == 1}
    agrees = vectors <= {place_of(node, name) for name in names if name == "positions"}
    results = value(node)
    return Split((axis,) * len(results) if isinstance(results, (tuple, list)) else axis, slices=slices, agrees=agrees)


def place_of(node: Node, name: str) -> str | int:
    """The place of an argument in a call, as in ``Split``."""
    if name in node.kwargs:
        return name
    return [a.name for a in node.target._schema.arguments].index(name)
