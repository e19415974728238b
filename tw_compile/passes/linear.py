"""The calls that a sum over the ranks may go through: what is done to the sum is done to each rank's part of it."""

from typing import Any

from torch.fx import Node

from .graph_utils import aten, calls, is_one, same_shape, same_size, value
from .norms import is_number

# Ops that pick or arrange whole rows: the same is done to the rows of each rank.
ROWS = (aten.slice.Tensor, aten.select.int, aten.permute.default)
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


def takes_rows(node: Node) -> bool:
    """Whether a call picks or arranges whole rows."""
    rank = value(node.args[0]).dim()
    return node.args[1][-1] % rank == rank - 1 if calls(node, aten.permute.default) else node.args[1] % rank < rank - 1


def is_vector(x: Node, total: Node) -> bool:
    """Whether it is one row, that is added to all rows of ``total``. That of a single token is its residual."""
    shape, whole = value(x).shape, value(total).shape
    is_row = len(shape) > 0 and all(map(is_one, shape[:-1])) and same_size(shape[-1], whole[-1])
    return is_row and not same_shape(shape, whole)


def is_scalar(factor: Any) -> bool:
    return is_number(factor) or value(factor).dim() == 0


def has_all_rows(x: Node, node: Node) -> bool:
    """Whether ``node``, a call that broadcasts its inputs, has no more rows than its input ``x``."""
    mine, whole = value(x).shape, value(node).shape
    more = len(whole) - len(mine)
    return all(map(is_one, whole[:more])) and same_shape(mine, whole[more:])
