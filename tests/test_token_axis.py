"""Token-axis rules: what a rule promises is checked on real tensors, by doing the op on each half and joining the results."""

import pytest
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tw_compile.passes.rules import token_axis
from tw_compile.passes.rules.token_axis import Split, TokenAxis, map_places, register_token_rule, split_rule

aten, prims = torch.ops.aten, torch.ops.prims
LENGTH, FIRST = 6, 2  # of the axis that is cut, and where: not in the middle


class Cut:
    """A tensor that is cut along an axis."""

    def __init__(self, tensor, dim, unit=1):
        self.tensor, self.axis = tensor, TokenAxis(dim, unit)
        assert tensor.shape[dim] == LENGTH * unit


def call(op, args, kwargs):
    """The node of a call on real tensors, the axes of those that are cut, and the tensors."""
    graph, axes, tensors = Graph(), {}, {}

    def to_node(argument):
        if isinstance(argument, (list, tuple)):
            return type(argument)(map(to_node, argument))
        if not isinstance(argument, (Cut, torch.Tensor)):
            return argument
        node = graph.placeholder(f"input{len(tensors)}")
        node.meta["val"] = tensors[node] = argument.tensor if isinstance(argument, Cut) else argument
        if isinstance(argument, Cut):
            axes[node] = argument.axis
        return node

    node = graph.call_function(op, to_node(tuple(args)), {k: to_node(v) for k, v in kwargs.items()})
    node.meta["val"] = op(*map_arg(node.args, tensors.get), **map_arg(node.kwargs, tensors.get))
    return node, axes, tensors


def part(tensor, axis, half):
    at, end = FIRST * int(axis.unit), LENGTH * int(axis.unit)
    return tensor.narrow(axis.dim, 0, at) if half == 0 else tensor.narrow(axis.dim, at, end - at)


def halves_of(op, *args, **kwargs):
    """The results of each half as the op's rule has it, the axes along which they are joined, and the result of the whole."""
    node, axes, tensors = call(op, args, kwargs)
    rule = split_rule(node, axes)
    assert isinstance(rule, Split), rule

    def of_half(half):
        def tensor(place, a):
            if not isinstance(a, Node):
                return a
            axis = None if rule.takes_whole(place, a) else axes.get(a) or rule.slice_of(place, a)
            return tensors[a] if axis is None else part(tensors[a], axis, half)

        args, kwargs = map_places(tensor, node.args if rule.args is None else rule.args, node.kwargs)
        return (rule.target or op)(*args, **kwargs)

    results = [of_half(0), of_half(1)]
    return results, rule.axis, node.meta["val"]


def check(op, *args, **kwargs):
    results, axis, whole = halves_of(op, *args, **kwargs)
    if isinstance(whole, torch.Tensor):
        results, axis, whole = [[r] for r in results], [axis], [whole]
    for one, other, along, expected in zip(*results, axis, whole, strict=True):
        assert one.shape[along.dim] == FIRST * along.unit, "the first half has the first half's entries"
        torch.testing.assert_close(torch.cat((one, other), along.dim), expected)


def joined(op, *args, **kwargs):
    node, axes, _ = call(op, args, kwargs)
    assert split_rule(node, axes) == "its token-axis rule does not cover this use"


def x(*shape):
    return torch.randn(*shape)


T = LENGTH


@pytest.mark.parametrize(
    "op, args",
    [
        (aten.relu.default, lambda: [Cut(x(T, 4), 0)]),
        (aten.neg.default, lambda: [Cut(x(2, T, 4), 1)]),
        (aten.neg.default, lambda: [Cut(x(3 * T, 4), 0, unit=3)]),
        (aten.add.Tensor, lambda: [Cut(x(T, 4), 0), Cut(x(T, 4), 0)]),
        (aten.add.Tensor, lambda: [Cut(x(T, 4), 0), x(T, 4)]),
        (aten.add.Tensor, lambda: [x(T, 4), Cut(x(T, 4), 0)]),
        (aten.add.Tensor, lambda: [Cut(x(T, 4), 0), x(4)]),
        (aten.add.Tensor, lambda: [Cut(x(T, 4), 0), x(1, 4)]),
        (aten.add.Tensor, lambda: [Cut(x(T, 4), 0), x(T, 1)]),
        (aten.add.Tensor, lambda: [Cut(x(T, 4), 0), 3.0]),
        (aten.add.Tensor, lambda: [Cut(x(1, T, 4), 1), Cut(x(T, 4), 0)]),
        (aten.add.Tensor, lambda: [Cut(x(T), 0), x(2, T)]),
        (aten.add.Tensor, lambda: [Cut(x(T, 1), 0), x(T, T)]),
        (aten.mul.Tensor, lambda: [Cut(x(1, 2, T, 4), 2), x(T, 4)]),
        (aten.mul.Tensor, lambda: [Cut(x(T, 3, 4), 0), x(3, 4)]),
        (aten.mul.Tensor, lambda: [Cut(x(T, T, 4), 0), x(T, 4)]),
        (aten.where.self, lambda: [x(T, 1) > 0, Cut(x(T, 4), 0), torch.tensor(0.0)]),
        (aten.where.self, lambda: [Cut(x(T, 1) > 0, 0), x(4), x(T, 4)]),
        (aten.clamp.default, lambda: [Cut(x(T, 4), 0), -1.0, 1.0]),
        (aten.pow.Tensor_Scalar, lambda: [Cut(x(T, 4), 0), 2]),
        (aten.clone.default, lambda: [Cut(x(T, 4), 0)]),
        (prims.convert_element_type.default, lambda: [Cut(x(T, 4), 0), torch.float64]),
        (aten.mm.default, lambda: [Cut(x(T, 4), 0), x(4, 5)]),
        (aten.mm.default, lambda: [Cut(x(2 * T, 4), 0, unit=2), x(4, 5)]),
        (aten.mm.default, lambda: [x(5, 4), Cut(x(4, T), 1)]),
        (aten.addmm.default, lambda: [x(5), Cut(x(T, 4), 0), x(4, 5)]),
        (aten.addmm.default, lambda: [x(1, 5), Cut(x(T, 4), 0), x(4, 5)]),
        (aten.addmm.default, lambda: [x(T, 5), Cut(x(T, 4), 0), x(4, 5)]),
        (aten.addmm.default, lambda: [x(T, 1), Cut(x(T, 4), 0), x(4, 5)]),
        (aten.bmm.default, lambda: [Cut(x(T, 3, 4), 0), Cut(x(T, 4, 5), 0)]),
        (aten.bmm.default, lambda: [Cut(x(2 * T, 3, 4), 0, unit=2), Cut(x(2 * T, 4, 5), 0, unit=2)]),
        (aten.bmm.default, lambda: [Cut(x(T, 3, 4), 0), x(T, 4, 5)]),
        (aten.bmm.default, lambda: [x(T, 3, 4), Cut(x(T, 4, 5), 0)]),
        (aten.bmm.default, lambda: [Cut(x(2, T, 4), 1), x(2, 4, 5)]),
        (aten.bmm.default, lambda: [Cut(x(2, T, 4), 1), Cut(x(2, 4, T), 2)]),
        (aten.bmm.default, lambda: [Cut(x(2, T, T), 1), Cut(x(2, T, 5), 1)]),
        (aten.bmm.default, lambda: [x(2, 3, 4), Cut(x(2, 4, T), 2)]),
        (aten.reshape.default, lambda: [Cut(x(T, 8), 0), [1, T, 2, 4]]),
        (aten.reshape.default, lambda: [Cut(x(1, T, 8), 1), [T, 8]]),
        (aten.reshape.default, lambda: [Cut(x(1, T, 8), 1), [-1, 8]]),
        (aten.reshape.default, lambda: [Cut(x(T, 8), 0), [T, -1, 4]]),
        (aten.reshape.default, lambda: [Cut(x(T, 8), 0), [2 * T, 4]]),
        (aten.reshape.default, lambda: [Cut(x(2 * T, 4), 0, unit=2), [T, 8]]),
        (aten.reshape.default, lambda: [Cut(x(T, 5, 8), 0), [T * 5, 8]]),
        (aten.reshape.default, lambda: [Cut(x(T * 5, 8), 0, unit=5), [T, 5, 8]]),
        (aten.reshape.default, lambda: [Cut(x(T * 5, 8), 0, unit=5), [T, 5, 2, 4]]),
        (aten.reshape.default, lambda: [Cut(x(T * 5, 8), 0, unit=5), [T * 40]]),
        (aten.reshape.default, lambda: [Cut(x(T * 5, 8), 0, unit=5), [T * 2, 20]]),
        (aten.reshape.default, lambda: [Cut(x(3, T, 8), 1), [3, T, 2, 4]]),
        (aten.reshape.default, lambda: [Cut(x(3, T, 8), 1), [1, 3, T * 8]]),
        (aten.reshape.default, lambda: [Cut(x(T, T), 0), [1, T, T]]),
        (aten.view.default, lambda: [Cut(x(T, 8), 0), [T, 2, 4]]),
        (aten.permute.default, lambda: [Cut(x(1, T, 2, 4), 1), [0, 2, 1, 3]]),
        (aten.permute.default, lambda: [Cut(x(1, T, 2, 4), 1), [0, -2, -3, -1]]),
        (aten.permute.default, lambda: [Cut(x(T * 2, 4), 0, unit=2), [1, 0]]),
        (aten.transpose.int, lambda: [Cut(x(2, T, 4), 1), -1, -2]),
        (aten.transpose.int, lambda: [Cut(x(2, T, 4), 1), 0, 2]),
        (aten.unsqueeze.default, lambda: [Cut(x(T, 4), 0), 0]),
        (aten.unsqueeze.default, lambda: [Cut(x(T, 4), 0), 1]),
        (aten.unsqueeze.default, lambda: [Cut(x(T, 4), 0), -1]),
        (aten.squeeze.dim, lambda: [Cut(x(1, T, 1), 1), 0]),
        (aten.squeeze.dim, lambda: [Cut(x(1, T, 1), 1), -1]),
        (aten.squeeze.dim, lambda: [Cut(x(1, T, 1), 1), 1]),
        (aten.squeeze.dims, lambda: [Cut(x(1, T, 1), 1), [0, 2]]),
        (aten.expand.default, lambda: [Cut(x(T, 1, 4), 0), [T, 3, 4]]),
        (aten.expand.default, lambda: [Cut(x(T, 1), 0), [2, -1, 5]]),
        (aten.slice.Tensor, lambda: [Cut(x(T, 8), 0), 1, 0, 4]),
        (aten.slice.Tensor, lambda: [Cut(x(T, 8), 0), -1, 4, 9223372036854775807]),
        (aten.slice.Tensor, lambda: [Cut(x(8, T), 1), 0, 2]),
        (aten.slice.Tensor, lambda: [Cut(x(8, T), 1)]),
        (aten._softmax.default, lambda: [Cut(x(T, 8), 0), -1, False]),
        (aten.cumsum.default, lambda: [Cut(x(T, 8), 0), 1]),
        (aten.flip.default, lambda: [Cut(x(2, T, 8), 1), [0, 2]]),
        (aten.topk.default, lambda: [Cut(x(T, 8), 0), 2]),
        (aten.topk.default, lambda: [Cut(x(8, T), 1), 2, 0]),
        (aten.sort.default, lambda: [Cut(x(T, 8), 0)]),
        (aten.split.Tensor, lambda: [Cut(x(T, 8), 0), 3, 1]),
        (aten.split_with_sizes.default, lambda: [Cut(x(T, 8), 0), [3, 5], -1]),
        (aten.glu.default, lambda: [Cut(x(T, 8), 0)]),
        (aten.glu.default, lambda: [Cut(x(8, T), 1), 0]),
        (aten.select.int, lambda: [Cut(x(3, T, 4), 1), 0, 1]),
        (aten.select.int, lambda: [Cut(x(3, T, 4), 1), -1, 1]),
        (aten.cat.default, lambda: [[Cut(x(T, 4), 0), Cut(x(T, 2), 0)], 1]),
        (aten.cat.default, lambda: [[Cut(x(T, 4), 0), x(T, 2)], -1]),
        (aten.cat.default, lambda: [[Cut(x(4, T), 1), x(2, T)]]),
        (aten.sum.dim_IntList, lambda: [Cut(x(T, 8), 0), [1]]),
        (aten.sum.dim_IntList, lambda: [Cut(x(2, T, 8), 1), [0, -1]]),
        (aten.sum.dim_IntList, lambda: [Cut(x(2, T, 8), 1), [0], True]),
        (aten.mean.dim, lambda: [Cut(x(2, T, 8), 1), [-1], True]),
        (aten.amax.default, lambda: [Cut(x(2, T, 8), 1), [0]]),
        (aten.amin.default, lambda: [Cut(x(T, 8), 0), [-1], True]),
        (aten.prod.dim_int, lambda: [Cut(x(2, T), 1), 0]),
        (aten.any.dim, lambda: [Cut(x(T, 8) > 1, 0), 1]),
        (aten.any.dims, lambda: [Cut(x(2, T, 8) > 2, 1), [0, 2]]),
        (aten.argmax.default, lambda: [Cut(x(T, 8), 0), -1]),
        (aten.argmax.default, lambda: [Cut(x(8, T), 1), 0, True]),
        (aten.var.correction, lambda: [Cut(x(T, 8), 0), [1]]),
        (aten.var_mean.correction, lambda: [Cut(x(2, T, 8), 1), [0, 2]]),
        (aten.embedding.default, lambda: [x(9, 4), Cut(torch.randint(9, (1, T)), 1)]),
        (aten.gather.default, lambda: [Cut(x(T, 8), 0), 1, Cut(torch.randint(8, (T, 3)), 0)]),
        (aten.gather.default, lambda: [Cut(x(T, 8), 0), -1, torch.randint(8, (T, 3))]),
        (aten.gather.default, lambda: [x(T, 8), 1, Cut(torch.randint(8, (T, 3)), 0)]),
        (aten.constant_pad_nd.default, lambda: [Cut(x(T, 8), 0), [1, 2]]),
        (aten.constant_pad_nd.default, lambda: [Cut(x(8, T), 1), [0, 0, 1, 2]]),
    ],
)
def test_the_halves_make_the_whole(op, args):
    check(op, *args())


@pytest.mark.parametrize("keywords", [{"correction": 0}, {"correction": 1, "keepdim": True}], ids=str)
def test_keywords_are_kept(keywords):
    check(aten.var.correction, Cut(x(2, T, 8), 1), [0], **keywords)


@pytest.mark.parametrize(
    "op, args",
    [
        (aten.add.Tensor, lambda: [Cut(x(T, T), 0), Cut(x(T, T), 1)]),
        (aten.mm.default, lambda: [Cut(x(5, T), 1), x(T, 4)]),
        (aten.mm.default, lambda: [x(5, T), Cut(x(T, 4), 0)]),
        (aten.mm.default, lambda: [Cut(x(T, 4), 0), Cut(x(4, T), 1)]),
        (aten.addmm.default, lambda: [Cut(x(T), 0), x(5, 4), x(4, T)]),
        (aten.addmm.default, lambda: [x(4), Cut(x(5, T), 1), x(T, 4)]),
        (aten.bmm.default, lambda: [Cut(x(2, 3, T), 2), Cut(x(2, T, 5), 1)]),
        (aten.bmm.default, lambda: [x(2, 3, T), Cut(x(2, T, 5), 1)]),
        (aten.bmm.default, lambda: [Cut(x(2, 3, T), 2), x(2, T, 5)]),
        (aten.reshape.default, lambda: [Cut(x(T, 8), 0), [T // 2, 16]]),
        (aten.reshape.default, lambda: [Cut(x(2, T, 8), 1), [2 * T, 8]]),
        (aten.reshape.default, lambda: [Cut(x(T * 5, 8), 0, unit=5), [15, 16]]),
        (aten.reshape.default, lambda: [Cut(x(T, 6), 0), [4, 9]]),
        (aten.slice.Tensor, lambda: [Cut(x(T, 8), 0), 0, 1, 5]),
        (aten.slice.Tensor, lambda: [Cut(x(T, 8), 0)]),
        (aten._softmax.default, lambda: [Cut(x(8, T), 1), -1, False]),
        (aten.cumsum.default, lambda: [Cut(x(T, 8), 0), 0]),
        (aten.flip.default, lambda: [Cut(x(T, 8), 0), [0, 1]]),
        (aten.topk.default, lambda: [Cut(x(8, T), 1), 2]),
        (aten.sort.default, lambda: [Cut(x(8, T), 1)]),
        (aten.split.Tensor, lambda: [Cut(x(T, 8), 0), 2]),
        (aten.glu.default, lambda: [Cut(x(8, T), 1)]),
        (aten.select.int, lambda: [Cut(x(T, 8), 0), 0, 1]),
        (aten.cat.default, lambda: [[Cut(x(T, 4), 0), Cut(x(T, 4), 0)]]),
        (aten.cat.default, lambda: [[Cut(x(T, T), 0), Cut(x(T, T), 1)]]),
        (aten.sum.dim_IntList, lambda: [Cut(x(T, 8), 0), [0]]),
        (aten.sum.dim_IntList, lambda: [Cut(x(T, 8), 0), []]),
        (aten.mean.dim, lambda: [Cut(x(2, T, 8), 1), [-1, -2], True]),
        (aten.argmax.default, lambda: [Cut(x(T, 8), 0)]),
        (aten.amax.default, lambda: [Cut(x(T, 8), 0)]),
        (aten.any.dim, lambda: [Cut(x(T, 8) > 0, 0), 0]),
        (aten.embedding.default, lambda: [Cut(x(T, 4), 0), torch.randint(T, (3,))]),
        (aten.gather.default, lambda: [Cut(x(T, 8), 0), 0, torch.randint(T, (3, 8))]),
        (aten.constant_pad_nd.default, lambda: [Cut(x(T, 8), 0), [0, 0, 1, 0]]),
        (aten.constant_pad_nd.default, lambda: [Cut(x(8, T), 1), [1, 0]]),
    ],
)
def test_a_use_that_needs_both_halves_is_refused(op, args):
    joined(op, *args())


def test_an_op_without_a_rule_is_refused():
    node, axes, _ = call(aten.index_select.default, [Cut(x(T, 4), 0), 0, torch.tensor([1])], {})
    assert split_rule(node, axes) == "no token-axis rule for this op"


def test_every_pointwise_op_has_a_rule():
    """By its tag, so that a new one needs nothing."""
    for op in (aten.gelu.default, aten.erf.default, aten.maximum.default, aten.nan_to_num.default):
        args = [Cut(x(T, 4), 0)] * len([a for a in op._schema.arguments if a.name in ("self", "other")])
        check(op, *args)


def test_a_registered_rule_replaces_the_one_there_was(monkeypatch):
    monkeypatch.setattr(token_axis, "_RULES", dict(token_axis._RULES))
    register_token_rule(aten.relu.default)(lambda node, axes: None)
    joined(aten.relu.default, Cut(x(T, 4), 0))


def test_the_units_of_an_axis_must_agree():
    """Two values as long as each other, of which one has two entries a token, and the other three."""
    node, _, _ = call(aten.add.Tensor, [x(12, 4), x(12, 4)], {})
    one, other = node.args
    assert isinstance(split_rule(node, {one: TokenAxis(0, 2), other: TokenAxis(0, 3)}), str)
