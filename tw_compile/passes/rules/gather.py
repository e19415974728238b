"""All-gathers along another dimension than the first: what comes from each rank is put side by side by a split and a cat."""

import operator

from torch.fx import Node

from ..emit import size_of
from ..graph_utils import WAIT, aten, c10d, calls, same_size, value

GATHER = c10d.all_gather_into_tensor.default


def gather_along(emit, x: Node, ranks: int, group: str, dim: int) -> Node:
    """The ranks' ``x`` one after the other along ``dim``. emit: a function (target, *args) -> Node"""
    whole = emit(WAIT, emit(GATHER, x, ranks, group))
    if dim == 0:
        return whole
    split = emit(aten.split.Tensor, whole, size_of(emit, x, 0))
    return emit(aten.cat.default, [emit(operator.getitem, split, rank) for rank in range(ranks)], dim)


def side_by_side(call: Node) -> tuple[Node, int, list[Node]] | None:
    """(the cat, its dimension, the calls in between) of a GATHER that is used as in ``gather_along``, and in no other way."""
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


def _same(argument, size) -> bool:
    return same_size(value(argument) if isinstance(argument, Node) else argument, size)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
