"""Which entries of an attention mask are known to be False, by the graph that computes it.

Many models are traced with a materialised mask that contains the causal mask, ``key position <= query position``. If that can be proved,
the first half's queries do not need the second half's keys. Integer tensors are expressed as sympy formulas of their own index:
``arange(n)`` is i₀, a slice from s on is i₀ + s, and so on.
"""

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..graph_utils import aten, calls, is_one, is_tensor, prims, value
from .token_axis import expr

_INDEX = sympy.symbols("i0:8", integer=True, nonnegative=True)

INDEX = (torch.int32, torch.int64)  # dtypes that are wide enough for an index
_AND = (aten.bitwise_and.Tensor, aten.logical_and.default)
_SHAPED = (aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default, aten.alias.default)
_COMPARISONS = {
    aten.le.Tensor: lambda a, b: b - a,
    aten.lt.Tensor: lambda a, b: b - a - 1,
    aten.ge.Tensor: lambda a, b: a - b,
    aten.gt.Tensor: lambda a, b: a - b - 1,
}


def hides_later_keys(mask: Node, offset: Any = 0) -> bool:
    """Whether a mask hides each key j > i + offset from query i.

    mask:   [..., queries, keys], True or 0 where attention is allowed
    offset: int or a sympy formula of sizes, see ``first_row``
    """
    later = offset + sympy.Symbol("d", integer=True, positive=True)
    while calls(mask, *_SHAPED) and _keeps_queries_and_keys(mask):
        mask = mask.args[0]
    if not calls(mask, aten.where.self):
        return any(_slack(part, later).is_negative for part in _conjunction(mask))
    allowed, shown, hidden = mask.args[0], *map(_constant, mask.args[1:])
    if shown != 0 or hidden is None or not hides_later_keys(allowed, offset):
        return False
    # If a finite number hides all keys from a query, the query attends to all of them equally, also to later ones.
    shows_own = all(_slack(part, offset).is_nonnegative for part in _conjunction(allowed))
    return hidden == -math.inf or (hidden <= torch.finfo(value(mask).dtype).min and shows_own)


def _conjunction(mask: Node) -> list[Node]:
    """The masks of which ``mask`` is the conjunction."""
    if calls(mask, *_SHAPED) and _keeps_queries_and_keys(mask):
        return _conjunction(mask.args[0])
    if calls(mask, *_AND):
        return [part for a in mask.args if _constant(a) is not True for part in _conjunction(a)]
    return [mask]


def _keeps_queries_and_keys(call: Node) -> bool:
    """Whether a call keeps the last two dimensions, with the indices of queries and keys."""
    before, after = value(call.args[0]).shape, value(call).shape
    if len(before) < 2:
        return False
    if calls(call, aten.unsqueeze.default):
        return call.args[1] % len(after) < len(after) - 2
    if calls(call, aten.slice.Tensor):
        # A slice of the last two that begins at 0 keeps the indices.
        return call.args[1] % len(before) < len(before) - 2 or (call.args[2] == 0 and len(call.args) < 5)
    return all(not is_one(b) or is_one(a) for b, a in zip(before[-2:], after[-2:]))


def _slack(mask: Node, key: Any) -> Any:
    """For a comparison [..., queries, keys]: a formula that is >= 0 where query i may attend to key i + ``key``. NaN if unknown."""
    rank = value(mask).dim()
    a, b = (_formula(operand, rank) for operand in mask.args) if mask.target in _COMPARISONS and rank >= 2 else (None, None)
    if a is None or b is None:
        return sympy.nan
    return sympy.expand(_COMPARISONS[mask.target](a, b).subs(_INDEX[rank - 1], _INDEX[rank - 2] + key))


def first_row(positions: Node, dim: int = 0) -> Any:
    """The formula of the first of ``positions``, if they are consecutive along ``dim`` and alike along the others; otherwise None."""
    formula = _own_formula(positions)
    first = None if formula is None else sympy.expand(formula - _INDEX[dim])
    return None if first is None or first.has(*_INDEX) else first


def _constant(node: Node) -> Any:
    return node.args[1] if calls(node, aten.full.default) else None


def _formula(node: Any, rank: int) -> Any:
    """The formula of an integer tensor in its index, broadcast to ``rank`` dimensions; None if unknown."""
    own = _own_formula(node)
    if own is None or not is_tensor(node):
        return own
    shift = rank - value(node).dim()
    return own.subs({_INDEX[d]: _INDEX[d + shift] for d in range(value(node).dim())}, simultaneous=True)


def _own_formula(node: Any) -> Any:
    """The formula of an integer tensor in its own index, or of an int or a size; None if unknown."""
    if isinstance(node, int):
        return sympy.Integer(node)
    if not is_tensor(node):
        return expr(value(node)) if isinstance(node, Node) and isinstance(value(node), torch.SymInt) else None
    if calls(node, prims.iota.default):
        return node.kwargs["start"] + node.kwargs["step"] * _INDEX[0]
    if calls(node, aten.full.default) and isinstance(node.args[1], int):
        return sympy.Integer(node.args[1])
    if calls(node, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        a, b = (_formula(operand, value(node).dim()) for operand in node.args)
        if a is None or b is None:
            return None
        return a + b if calls(node, aten.add.Tensor) else a - b
    if calls(node, prims.convert_element_type.default, aten.clone.default, aten.alias.default):
        return _own_formula(node.args[0]) if value(node).dtype in INDEX else None
    if calls(node, aten.unsqueeze.default):
        at = node.args[1] % value(node).dim()
        return _moved(node.args[0], lambda d: _INDEX[d + (d >= at)])
    if calls(node, aten.expand.default):
        shift = value(node).dim() - value(node.args[0]).dim()
        return _moved(node.args[0], lambda d: _INDEX[d + shift])
    if calls(node, aten.view.default, aten.reshape.default):
        return _reshaped(node)
    if calls(node, aten.slice.Tensor):
        dim, start = node.args[1] % value(node).dim(), node.args[2] if len(node.args) > 2 else 0
        start = expr(value(start)) if isinstance(start, Node) else start
        if len(node.args) > 4 or (isinstance(start, int) and start < 0):
            return None
        return _moved(node.args[0], lambda d: _INDEX[d] + (start if d == dim else 0))
    if calls(node, aten.index.Tensor):
        return _indexed(node)
    if value(node).dim() == 0 and value(node).dtype in INDEX:
        return sympy.Symbol(f"%{node.name}", integer=True)  # an unknown number, the same wherever it is used
    return None


def _moved(source: Node, index: Callable[[int], Any]) -> Any:
    """The formula of ``source``, with index(d) in place of its index of dimension d. In a dimension of size one that index is 0."""
    formula = _own_formula(source)
    if formula is None:
        return None
    shape = value(source).shape
    new = {_INDEX[d]: 0 if is_one(shape[d]) else index(d) for d in range(len(shape))}
    return sympy.sympify(formula).subs(new, simultaneous=True)


def _reshaped(node: Node) -> Any:
    """A reshape that only adds or removes dimensions of size one."""
    before, after = value(node.args[0]).shape, value(node).shape
    old = [d for d, size in enumerate(before) if not is_one(size)]
    new = [d for d, size in enumerate(after) if not is_one(size)]
    if [expr(before[d]) for d in old] != [expr(after[d]) for d in new]:
        return None
    place = dict(zip(old, new))
    return _moved(node.args[0], lambda d: _INDEX[place[d]])


def _indexed(node: Node) -> Any:
    """The formula of ``source[index, …]``, with an index tensor for each dimension."""
    source, indices = node.args
    if len(indices) != value(source).dim() or any(index is None for index in indices):
        return None
    formula, rank = _own_formula(source), value(node).dim()
    if formula is None:
        return None
    new = {}
    for d, index in enumerate(indices):
        if not sympy.sympify(formula).has(_INDEX[d]):
            continue
        at = _formula(index, rank)
        if at is None or not sympy.sympify(at).is_nonnegative:  # a negative index counts from the end
            return None
        new[_INDEX[d]] = at
    return sympy.sympify(formula).subs(new, simultaneous=True)
