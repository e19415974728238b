"""Every token-axis rule in a woven graph, on shapes whose sizes coincide, against the graph that it came from.

Each registered op has samples of its use here, on a value [..., H] that two sites have between them. A rule is never trusted:
what it answers is checked, and an answer that does not hold makes an unsplit op.
"""

import operator
import os

import pytest
import quantised
import torch
import torch.distributed as dist
from graphs import run
from sites import H, values
from test_attention import CUDA_OPS
from test_split import between
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from tw_compile import ops
from tw_compile.compat import auto_functionalized
from tw_compile.passes import split, weave
from tw_compile.passes.cut import Cut
from tw_compile.passes.emit import Emitter
from tw_compile.passes.graph_utils import c10d, in_order, value
from tw_compile.passes.rules import token_axis
from tw_compile.passes.rules.token_axis import Split, TokenAxis, register_token_rule

pytestmark = pytest.mark.usefixtures("world")
aten, prims = torch.ops.aten, torch.ops.prims

# (shape, the dimension that is cut, what lies in front): halves of one token and of none; as many tokens as channels, as
# sequences, or one; one entry beside. One in three of them, or with TW_FULL=1 all.
SHAPES = [
    ((2, H), 0, 1), ((H, H), 0, 1), ((H, H), 0, 7), ((1, 2, H), 1, 1), ((1, H, H), 1, 9), ((1, 1, 6, H), 2, 5),
    ((2, 1, H), 0, 1), ((2, 2, H), 0, 1), ((4, 4, H), 0, 2), ((H, H, H), 0, 5), ((2, H, H), 0, 1), ((5, H), 0, 0), ((1, 4, H), 1, 4),
][:: 1 if os.environ.get("TW_FULL") else 3]  # fmt: skip


class Use:
    """Makes the calls of a sample. n: the value that is cut; same: another of its shape, m: [H, H], v: [H], which are not."""

    def __init__(self, emit, n, same, m, v):
        self.emit, self.n, self.same, self.m, self.v = emit, n, same, m, v
        self.shape = list(value(n).shape)
        self.rank, self.tokens = len(self.shape), value(n).numel() // H
        self.dims = range(self.rank)

    def __call__(self, op, *args, **kwargs):
        return self.emit(op, *args, **kwargs)

    @property
    def rows(self):
        """n as [tokens, H]."""
        return self(aten.reshape.default, self.n, [self.tokens, H])

    @property
    def batched(self):
        """n as [batch, tokens, H]."""
        return self(aten.reshape.default, self.n, [-1, self.shape[-2], H])

    @property
    def heads(self):
        """n as [batch, 2, tokens, H / 2]."""
        return self(aten.transpose.int, self(aten.reshape.default, self.n, [-1, self.shape[-2], 2, H // 2]), 1, 2)

    @property
    def index(self):
        """[..., 1], a column of each row of n."""
        return self(aten.argmax.default, self.n, -1, True)

    @property
    def zeros(self):
        """Indices of the shape of n."""
        return self(prims.convert_element_type.default, self(aten.mul.Tensor, self.n, 0.0), torch.int64)

    @property
    def first(self):
        """The index of the first entry, [1]."""
        return self(prims.iota.default, 1, start=0, step=1, dtype=torch.int64, device=torch.device("cpu"), requires_grad=False)

    def turned(self, x):
        return self(aten.transpose.int, x, -1, -2)


def each_dim(op, *more, positive=False, listed=False, **kwargs):
    """A sample of an op of (value, dimension, *more) for each dimension, counted from the front and from the back."""

    def sample(u):
        for d in (*u.dims, *(() if positive else (d - u.rank for d in u.dims))):
            yield u(op, u.n, [d] if listed else d, *more, **kwargs)

    return sample


def attention(op, mask):
    """With one tensor as all, two or none of its arguments. mask: -> the arguments that say so"""

    def sample(u):
        h, other, m = u.heads, u(aten.sin.default, u.heads), u(aten.mm.default, u.same_rows, u.turned(u.same_rows))
        causal = {"_for_cpu": (0.0, True)}.get(op._schema.name[-8:]) or CUDA_OPS[op][1](True, None)
        plain = {"_for_cpu": (0.0, False)}.get(op._schema.name[-8:]) or CUDA_OPS[op][1](False, None)
        for q, k, v in ((h, h, h), (h, h, other), (other, h, h), (h, other, h)):
            yield u(op, q, k, v, *plain, scale=0.3)
            yield u(op, q, k, v, *causal, scale=0.3)
        if mask and u.shape[-2] == u.tokens:
            wide = u(aten.reshape.default, m, [1, 1, u.tokens, u.tokens])
            with_mask = {} if op in CUDA_OPS else {"attn_mask": wide}
            args = CUDA_OPS[op][1](False, wide) if op in CUDA_OPS else plain
            yield u(op, h, h, h, *args, scale=0.3, **with_mask)

    return sample


def group():
    return dist.group.WORLD.group_name


def squares(u):
    """[H, H] of tokens and channels alike."""
    return [u.rows] if u.tokens == H else []


FLASH, EFFICIENT, CUDNN = CUDA_OPS
CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
reshapes = lambda op: lambda u: [  # noqa: E731
    u(op, u.n, [u.tokens, H]), u(op, u.n, [-1, 2, H // 2]), u(op, u.n, [*u.shape[:-1], 4, 4]), u(op, u.n, [u.tokens * 2, H // 2]),
    u(op, u.n, [H, u.tokens]), u(op, u.n, [1, u.tokens * H]), *([u(op, u.n, [u.tokens // 2, 2 * H])] if u.tokens % 2 == 0 else []),
]  # fmt: skip
on_n = lambda op, *args, **kwargs: lambda u: [u(op, u.n, *args, **kwargs)]  # noqa: E731

SAMPLES = {
    prims.convert_element_type.default: on_n(prims.convert_element_type.default, torch.float64),
    aten.clone.default: on_n(aten.clone.default),
    aten.alias.default: on_n(aten.alias.default),
    aten.detach.default: on_n(aten.detach.default),
    aten.where.self: lambda u: [
        u(aten.where.self, u(aten.gt.Scalar, u.n, 0), *pair) for pair in ((u.n, u.n), (u.same, u.n), (u.v, u.same))
    ],
    c10d.all_reduce.default: lambda u: [u(c10d.wait_tensor.default, u(c10d.all_reduce.default, u.n, "sum", group()))],
    c10d.wait_tensor.default: lambda u: [u(c10d.wait_tensor.default, u(c10d.all_reduce.default, u.n, "sum", group()))],
    c10d.all_gather_into_tensor.default: lambda u: [
        u(c10d.wait_tensor.default, u(c10d.all_gather_into_tensor.default, u.turned(u.n), 2, group()))
    ],
    aten.mm.default: lambda u: [
        u(aten.mm.default, u.rows, u.m), u(aten.mm.default, u.m, u.turned(u.rows)), u(aten.mm.default, u.rows, u.turned(u.rows)),
        *(u(aten.mm.default, x, x) for x in squares(u)), *(u(aten.mm.default, u.m, x) for x in squares(u)),
    ],
    aten.addmm.default: lambda u: [
        u(aten.addmm.default, u.v, u.rows, u.m), u(aten.addmm.default, u.same_rows, u.rows, u.m),
        u(aten.addmm.default, u.rows, u.rows, u.m),
        *(u(aten.addmm.default, u.m, x, u.m) for x in squares(u)), *(u(aten.addmm.default, x, u.m, x) for x in squares(u)),
    ],
    aten.bmm.default: lambda u: [
        u(aten.bmm.default, u.batched, u.turned(u.batched)),
        u(aten.bmm.default, u(aten.unsqueeze.default, u.rows, 1), u(aten.unsqueeze.default, u.rows, 2)),
        u(aten.bmm.default, u(aten.unsqueeze.default, u.rows, 0), u(aten.unsqueeze.default, u.m, 0)),
        *(u(aten.bmm.default, x, x) for x in ([u.batched] if u.shape[-2] == H else [])),
        *(u(aten.bmm.default, u(aten.unsqueeze.default, u.m, 0), u(aten.unsqueeze.default, x, 0)) for x in squares(u)),
    ],
    aten.reshape.default: reshapes(aten.reshape.default),
    aten.view.default: reshapes(aten.view.default),
    aten._unsafe_view.default: reshapes(aten._unsafe_view.default),
    aten.permute.default: lambda u: [u(aten.permute.default, u.n, [*u.dims][::-1]), u(aten.permute.default, u.n, [-1, *range(u.rank - 1)])],
    aten.transpose.int: each_dim(aten.transpose.int, 0),
    aten.unsqueeze.default: each_dim(aten.unsqueeze.default),
    aten.squeeze.dim: each_dim(aten.squeeze.dim),
    aten.squeeze.dims: lambda u: [
        u(aten.squeeze.dims, u.n, [*u.dims]), u(aten.squeeze.dims, u.n, [-2]),
        u(aten.squeeze.dims, u(aten.unsqueeze.default, u.n, 1), [0, 1]),
    ],
    aten.squeeze.default: on_n(aten.squeeze.default),
    aten.expand.default: lambda u: [
        u(aten.expand.default, u.n, [3, *u.shape]),
        u(aten.expand.default, u(aten.slice.Tensor, u.n, -1, 0, 1), [-1] * (u.rank - 1) + [u.tokens]),
        u(aten.expand.default, u.n, u.shape),
    ],
    aten.slice.Tensor: lambda u: [u(aten.slice.Tensor, u.n, d, 0, 1) for d in (*u.dims, -1)] + [u(aten.slice.Tensor, u.n, 0)],
    aten._softmax.default: each_dim(aten._softmax.default, False),
    aten.cumsum.default: each_dim(aten.cumsum.default),
    aten.flip.default: each_dim(aten.flip.default, listed=True),
    aten.topk.default: lambda u: [u(aten.topk.default, u.n, 1, d) for d in u.dims] + [u(aten.topk.default, u.n, 2)],
    aten.sort.default: each_dim(aten.sort.default),
    aten.split.Tensor: lambda u: [u(aten.split.Tensor, u.n, size, d) for d in u.dims for size in (1, 2)] + [u(aten.split.Tensor, u.n, 1)],
    aten.split_with_sizes.default: on_n(aten.split_with_sizes.default, [H // 4, 3 * H // 4], -1),
    aten.glu.default: lambda u: [u(aten.glu.default, u.n, d) for d in u.dims if u.shape[d] % 2 == 0],
    aten.select.int: each_dim(aten.select.int, 0),
    aten.cat.default: lambda u: [
        u(aten.cat.default, pair, d)
        for d in (*u.dims, -1) for pair in ([u.n, u.n], [u.n, u.same], [u.same, u.n], [u.same, u.same, u.n])
    ],
    aten.sum.dim_IntList: lambda u: [
        *each_dim(aten.sum.dim_IntList, listed=True)(u), *each_dim(aten.sum.dim_IntList, True, listed=True)(u)
    ],
    aten.mean.dim: each_dim(aten.mean.dim, True, listed=True),
    aten.amax.default: each_dim(aten.amax.default, listed=True),
    aten.amin.default: each_dim(aten.amin.default, listed=True),
    aten.prod.dim_int: each_dim(aten.prod.dim_int),
    aten.any.dim: each_dim(aten.any.dim),
    aten.any.dims: each_dim(aten.any.dims, listed=True),
    aten.argmax.default: each_dim(aten.argmax.default),
    aten.var.correction: each_dim(aten.var.correction, listed=True, correction=0),
    aten.var_mean.correction: each_dim(aten.var_mean.correction, listed=True, correction=0, keepdim=True),
    aten.embedding.default: lambda u: [
        u(aten.embedding.default, u.m, u.index), *(u(aten.embedding.default, x, u.index) for x in squares(u))
    ],
    aten.index.Tensor: lambda u: [
        u(aten.index.Tensor, u.m, [u.index]), u(aten.index.Tensor, u.m, [None, u.index]), u(aten.index.Tensor, u.n, [u.zeros]),
        *(u(aten.index.Tensor, u.n, [*[None] * d, u(aten.argmax.default, u.m, -1)]) for d in u.dims if u.shape[d] == H),
        u(aten.index.Tensor, u.n, [*[None] * (u.rank - 1), u(aten.argmax.default, u.m, -1, True)]),
        u(aten.index.Tensor, u.m, [u(aten.squeeze.dim, u.index, -1), u(aten.squeeze.dim, u.index, -1)]),
    ],
    aten.gather.default: lambda u: [
        u(aten.gather.default, u.n, -1, u.index), u(aten.gather.default, u.same, -1, u.index),
        *(
            u(aten.gather.default, z, d, z)
            for z in [u(prims.convert_element_type.default, u(aten.mul.Tensor, u.n, 0.0), torch.int64)] for d in u.dims
        ),
    ],
    aten.constant_pad_nd.default: lambda u: [u(aten.constant_pad_nd.default, u.n, [0, 0] * d + [1, 2]) for d in u.dims],
    aten.copy.default: lambda u: [u(aten.copy.default, *pair) for pair in ((u.n, u.same), (u.same, u.n), (u.n, u.v), (u.n, u.n))],
    aten.view_as_complex.default: lambda u: [
        u(aten.view_as_real.default, u(aten.view_as_complex.default, u(aten.reshape.default, u.n, [*u.shape[:-1], -1, 2])))
    ],
    aten.view_as_real.default: lambda u: [
        u(aten.view_as_real.default, u(prims.convert_element_type.default, u.n, torch.complex64)),
    ],
    aten.repeat.default: lambda u: [u(aten.repeat.default, u.n, [2, *(2 if i == d else 1 for i in u.dims)]) for d in u.dims],
    aten.scatter.src: lambda u: [
        u(aten.scatter.src, *pair[:1], d, u.zeros, pair[1]) for d in u.dims for pair in ((u.n, u.same), (u.same, u.n), (u.same, u.same))
    ],
    aten.scatter_add.default: lambda u: [
        u(aten.scatter_add.default, x, d, u.zeros, y) for d in u.dims for x, y in ((u.n, u.same), (u.same, u.n))
    ],
    aten.index_put.default: lambda u: [
        *(u(aten.index_put.default, x, [*[None] * d, u.first], u(aten.slice.Tensor, y, d, 0, 1))
          for d in u.dims for x, y in ((u.n, u.same), (u.same, u.n), (u.n, u.n))),
        u(aten.index_put.default, u.same_rows, [u(aten.select.int, u(aten.reshape.default, u.zeros, [-1, H]), 1, 0)], u.rows, True),
    ],
    aten.scatter.value: lambda u: [u(aten.scatter.value, x, d, u.zeros, 3.0) for d in (*u.dims, -1) for x in (u.n, u.same)],
    aten.slice_scatter.default: lambda u: [
        u(aten.slice_scatter.default, x, u(aten.slice.Tensor, y, d, 0, 1), d, 0, 1)
        for d in (*u.dims, -1) for x, y in ((u.n, u.n), (u.n, u.same), (u.same, u.n))
    ],
    aten.select_scatter.default: lambda u: [
        u(aten.select_scatter.default, x, u(aten.select.int, y, d, 0), d, 0)
        for d in (*u.dims, -1) for x, y in ((u.n, u.n), (u.n, u.same), (u.same, u.n))
    ],
    aten.max.dim: lambda u: [*each_dim(aten.max.dim)(u), *each_dim(aten.max.dim, True)(u)],
    aten.min.dim: each_dim(aten.min.dim),
    aten.baddbmm.default: lambda u: [
        u(aten.baddbmm.default, added, u.batched, u(aten.expand.default, u.m, [value(u.batched).shape[0], H, H]))
        for added in (u.v, u.batched, u(aten.sin.default, u.batched))
    ] + [
        u(aten.baddbmm.default, u.v, u(aten.unsqueeze.default, u.rows, 1), u(aten.expand.default, u.m, [u.tokens, H, H])),
        u(aten.baddbmm.default, u.v, u.batched, u.turned(u.batched)) if u.shape[-2] == H else u.n,
    ],
    aten.convolution.default: lambda u: [
        u(aten.convolution.default, x, u(aten.expand.default, u(aten.slice.Tensor, u(aten.unsqueeze.default, u.m, 2), 2, 0, 1), [H, H, k]),
          None, [stride], [pad], [1], False, [0], 1)
        for x in (u.turned(u.batched), *([u.batched] if u.shape[-2] == H else []))
        for k, stride, pad in ((1, 1, 0), (1, 1, 1), (1, 2, 0), *([(2, 1, 0)] if u.shape[-2] > 1 else []))
    ],
    aten.linalg_solve_triangular.default: lambda u: [
        u(aten.linalg_solve_triangular.default, u(aten.tril.default, u(aten.add.Scalar, squared, 5.0)), u.turned(u.batched), upper=False)
        for squared in (u(aten.bmm.default, u.turned(u.batched), u.batched), u(aten.unsqueeze.default, u.m, 0))
    ],
    CPU: attention(CPU, True), FLASH: attention(FLASH, False), EFFICIENT: attention(EFFICIENT, True), CUDNN: attention(CUDNN, True),
    **quantised.SAMPLES,
    # Of those that are known by their tag alone.
    aten.frexp.Tensor: on_n(aten.frexp.Tensor),
    aten.addcmul.default: lambda u: [u(aten.addcmul.default, u.n, u.same, u.same), u(aten.addcmul.default, u.n, u.n, u.v)],
    aten.add.Tensor: lambda u: [
        *(u(aten.add.Tensor, u.n, x) for x in (u.n, u.same, u.v)), *(u(aten.add.Tensor, x, u.turned(x)) for x in squares(u)),
        *(u(aten.add.Tensor, u.m, x) for x in squares(u)),
    ],
}  # fmt: skip
Use.same_rows = property(lambda u: u(aten.reshape.default, u.same, [u.tokens, H]))


def graph_of(sample, shape):
    """A site, a call of the sample after the other, and a site that waits for them. Returns the graph, and both sites."""
    root, mode = GraphModule(torch.nn.Module(), Graph()), FakeTensorMode()
    graph = Graph(root)
    emit = Emitter(graph, mode)

    def placeholder(name, *sizes):
        node = graph.placeholder(name)
        with mode:
            node.meta["val"] = torch.empty(*sizes)
        return node

    x, same, m, v = placeholder("x", *shape), placeholder("same", *shape), placeholder("m", H, H), placeholder("v", H)
    named = dict(residual=None, bias=None, shift=None, eps=1e-5, scale=1.0, offset=0.0, center=False, group=group(),
                 transport="auto", ctas=0, slot=ops.SLOT_WHOLE,
                 fp32_residual=False, sharded_residual=False, in_workspace=False, quantise="", static_scale=None)  # fmt: skip
    site = lambda x, i: emit(ops.fused, *in_order(ops.fused, named | {"x": x, "weight": v, "site": i}))  # noqa: E731
    first = site(x, 0)
    n, results = emit(operator.getitem, first, 0), []
    for made in sample(Use(emit, n, same, m, v)):
        several, attends = isinstance(value(made), (tuple, list)), "scaled_dot" in str(made.target)
        indices = range(1 if attends else len(value(made))) if several else []
        results += [emit(operator.getitem, made, i) for i in indices] if several else [made]
    total = n
    for result in results:
        wide = emit(prims.convert_element_type.default, result, torch.float32)
        total = emit(aten.add.Tensor, total, emit(aten.mul.Tensor, emit(aten.sum.default, wide), 0.0))
    last = site(total, 1)
    graph.output((emit(operator.getitem, last, 0), *results))
    return graph, [first, last], mode


def test_every_rule_has_samples():
    # test_functional.py has those of calls that were functionalised.
    assert set(token_axis._RULES) - {auto_functionalized} <= set(SAMPLES) | quantised.NAMES


@pytest.mark.parametrize("op", SAMPLES, ids=str)
def test_what_a_rule_makes_is_what_the_whole_gives(op, monkeypatch):
    monkeypatch.setattr(token_axis, "_RULES", token_axis._RULES | quantised.rules_of_stand_ins())
    emulated, was_cut = {op: CUDA_OPS[op][0]} if op in CUDA_OPS else quantised.EMULATED, False
    for shape, dim, first in SHAPES[1::2] if op in quantised.SAMPLES else SHAPES:
        graph, sites, mode = graph_of(SAMPLES[op], shape)
        with mode:
            new, woven, joins, *_ = split(graph, sites, Cut(dim, shape[dim], first))
            new = weave(new)
        assert woven == sites
        unsplit = [*joins.values()]
        whole = [each for each in unsplit if each.op == str(op)]
        was_cut |= len(whole) < sum(node.target is op for node in graph.nodes)
        assert not any("raises" in each.reason for each in unsplit), unsplit
        inputs = values(*shape), values(*shape), values(H, H), values(H)
        whole, halves = run(graph, inputs, emulated=emulated), run(new, inputs, emulated=emulated)
        torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda said: f"{shape}, {dim}, {first}: {said}")
    assert was_cut


# --- rules that are wrong --------------------------------------------------------------------------------------------


def raises(node, axes):
    raise LookupError("of no use")


WRONG = {  # name -> (rule, what the report says)
    "raises": (raises, "its token-axis rule raises LookupError: of no use"),
    "no split": (lambda node, axes: True, "its token-axis rule returns True, which is not a Split"),
    "another axis": (lambda node, axes: Split(TokenAxis(1)), "its token-axis rule gives a part of shape"),
    "no axis": (lambda node, axes: Split(TokenAxis(-1)), "its token-axis rule returns TokenAxis(dim=-1, unit=1), which is not an axis"),
    "another unit": (lambda node, axes: Split(TokenAxis(0, 2)), "its token-axis rule gives a part of shape"),
    "another number of results": (lambda node, axes: Split((TokenAxis(0),)), "its token-axis rule returns (TokenAxis"),
    "another kind": (lambda node, axes: Split(TokenAxis(0), target=aten.isnan.default), "its token-axis rule gives halves whose dtype"),
    "whole": (lambda node, axes: Split(TokenAxis(0), whole=frozenset([0])), "its token-axis rule gives a part of shape"),
    "a call that fails": (lambda node, axes: Split(TokenAxis(0), args=(*node.args, 1)), "it fails on half of the tokens: "),
    "another size": (lambda node, axes: Split(TokenAxis(0), target=aten.t.default), "its token-axis rule gives a part of shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_is_wrong_is_a_join(name, monkeypatch):
    rule, reason = WRONG[name]
    monkeypatch.setattr(token_axis, "_RULES", dict(token_axis._RULES))
    register_token_rule(aten.sinh.default)(rule)
    new = between(lambda x: x.sinh().cos(), unsplit=["aten.sinh.default"], tokens=H)
    assert new.report.joins[0].reason.startswith(reason)


def test_a_rule_may_name_its_inputs_by_node(monkeypatch):
    monkeypatch.setattr(token_axis, "_RULES", dict(token_axis._RULES))
    def rule(node, axes):
        return Split(TokenAxis(0), slices={a: TokenAxis(0) for a in node.args if a not in axes})

    register_token_rule(aten.addcmul.default)(rule)
    between(lambda x, y: torch.ops.aten.addcmul.default(x, y, y), values(6, H))
