"""Arguments that differ between the two calls that a call becomes. ``Split.args`` and ``Split.kwargs`` may contain them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node


@dataclass(frozen=True)
class PerHalf:
    """An argument that is not the same in both halves."""

    def argument(self, half: int, lengths: tuple[sympy.Expr, ...], size: Callable[[Any], Any], part: Callable[[Node, int], Node]) -> Any:
        """The argument of the call for ``half``.

        lengths: entries of both halves along the axis that is cut
        size:    a formula -> an argument that has its value
        part:    (input of the call, half) -> the half of the input
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Index(PerHalf):
    """0 for the first half, 1 for the second."""

    def argument(self, half: int, lengths: tuple[sympy.Expr, ...], size: Callable[[Any], Any], part: Callable[[Node, int], Node]) -> Any:
        return half


@dataclass(frozen=True)
class Length(PerHalf):
    """The number of entries of a half, times ``unit``. of: 0 or 1; None for the half that the call is for"""

    unit: Any = 1
    of: int | None = None

    def argument(self, half: int, lengths: tuple[sympy.Expr, ...], size: Callable[[Any], Any], part: Callable[[Node, int], Node]) -> Any:
        return size(lengths[half if self.of is None else self.of] * self.unit)


@dataclass(frozen=True)
class First(PerHalf):
    """The first half of an input, in both calls: the second half's call then runs after what made it."""

    source: Node

    def argument(self, half: int, lengths: tuple[sympy.Expr, ...], size: Callable[[Any], Any], part: Callable[[Node, int], Node]) -> Any:
        return part(self.source, 0)
