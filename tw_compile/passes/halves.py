"""A value in two halves, and whether two values are the halves of a third: the shapes and dtypes of each answer of a rule are compared."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..compat import statically_known_true
from .cut import Cut
from .graph_utils import calls, value
from .rules.token_axis import TokenAxis, equal, expr, expr_of


@dataclass(frozen=True)
class Halves:
    """A value in two halves.

    axis: the TokenAxis along which they are joined; for a tuple of values, a tuple of them
    """

    nodes: tuple[Node, Node]
    axis: Any


@dataclass(frozen=True)
class Check:
    """Compares the halves of values with the whole, for one cut."""

    cut: Cut
    fake_mode: Any

    def is_size(self, size: Any, wanted: Any) -> bool:
        """Whether a size is known to equal a sympy expression, also by the guards that exist."""
        env = self.fake_mode.shape_env
        if equal(expr(size), wanted):
            return True
        if env is None or (wanted.is_number and isinstance(size, int)) or not wanted.is_integer:
            return False
        return statically_known_true(size == (int(wanted) if wanted.is_number else env.create_symintnode(wanted, hint=None)))

    def fault(self, node: Node, made: Halves) -> str | None:
        """Why the halves that a rule makes of a call are not halves of its result; None if they are."""
        whole, parts = value(node), [value(part) for part in made.nodes]
        if isinstance(whole, torch.Tensor):
            return self.fault_of_one(whole, parts, made.axis)
        has_axes = isinstance(whole, (tuple, list)) and isinstance(made.axis, tuple)
        if not has_axes or not all(calls(user, operator.getitem) for user in node.users):
            return "its token-axis rule does not give the token axis of each result"
        if any(len(results) != len(whole) for results in (made.axis, *parts)):
            return f"its token-axis rule gives a number of results other than {len(whole)}"
        used = {user.args[1] for user in node.users}
        faults = (self.fault_of_one(whole[i], [part[i] for part in parts], made.axis[i]) for i in sorted(used))
        return next(filter(None, faults), None)

    def fault_of_one(self, whole: torch.Tensor, parts: list, axis: object) -> str | None:
        """The same for a single result."""
        if not isinstance(axis, TokenAxis) or not 0 <= axis.dim < whole.dim():
            return f"its token-axis rule returns {axis!r}, which is not an axis of the result"
        shape = [expr(size) for size in whole.shape]
        for tensor, length in zip((whole, *parts), (self.cut.length, *self.cut.halves)):
            # Without a unit each half has a value of its own, of the same shape.
            along = shape[axis.dim] if axis.unit is None else expr(length) * expr_of(axis.unit)
            wanted = [*shape[: axis.dim], along, *shape[axis.dim + 1 :]]
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != whole.dtype or tensor.dim() != len(wanted):
                return "its token-axis rule gives halves whose dtype or number of dimensions is not that of the result"
            if not all(map(self.is_size, tensor.shape, wanted)):
                return f"its token-axis rule gives a part of shape {list(tensor.shape)}, not {wanted}"
        return None
