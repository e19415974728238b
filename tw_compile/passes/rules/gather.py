"""All-gathers along a dimension other than the first: an all-gather, then a split and a cat."""

import operator

import torch
from torch.fx import Node

from ..emit import Emit, size_of
from ..graph_utils import WAIT, aten, c10d, calls, same_size, value

GATHER = c10d.all_gather_into_tensor.default


def gather_along(emit: Emit, x: Node, ranks: int, group: str, dim: int) -> Node:
    """The ranks' ``x`` one after the other along ``dim``."""
    whole = emit(WAIT, emit(GATHER, x, ranks, group))
    if dim == 0:
        return whole
    split = emit(aten.split.Tensor, whole, size_of(emit, x, 0))
    return emit(aten.cat.default, [emit(operator.getitem, split, rank) for rank in range(ranks)], dim)


def side_by_side(call: Node) -> tuple[Node, int, list[Node]] | None:
    """(the cat, its dimension, the calls between) of a GATHER whose only use is that of ``gather_along``, with dim > 0."""
    x, ranks, _ = call.args
    wait = _only_user(call)
    split = _only_user(wait) if calls(wait, WAIT) else None
    if not calls(split, aten.split.Tensor) or len(split.args) > 2 or not _same(split.args[1], value(x).shape[0]):
        return None
    parts = sorted(split.users, key=lambda part: part.args[1])
    cats = {_only_user(part) for part in parts}
    cat = cats.pop() if len(cats) == 1 else None
    if not calls(cat, aten.cat.default) or list(cat.args[0]) != parts or len(parts) != ranks:
        return None
    dim = (cat.args[1] if len(cat.args) > 1 else 0) % value(cat).dim()
    return (cat, dim, [wait, split, *parts]) if dim else None


def _same(argument: int | Node, size: int | torch.SymInt) -> bool:
    return same_size(value(argument) if isinstance(argument, Node) else argument, size)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
