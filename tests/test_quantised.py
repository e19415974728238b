"""Graphs with quantised linears: cut with their scales, or fused only."""

import functools

import pytest
import torch
from graphs import OPS, trace_with_inputs
from graphs import rewrite as rewrite_by
from graphs import run as run_graph
from quantised import EMULATED, FP8, LINEARS
from sites import H, all_reduce, hf_norm, values
from workspace import Workspace

from tw_compile import TokenWeaveError, backend, forms, ops, passes
from tw_compile.options import Options
from tw_compile.passes.cut import Cut
from tw_compile.passes.graph_utils import arguments

pytestmark = pytest.mark.usefixtures("world")
rewrite = functools.partial(rewrite_by, by=trace_with_inputs)


def block(linear, sites=2):
    """Sites with quantised linears between them. linear: (x, weight) -> y"""

    def run(x, residual, weight, up, down):
        for _ in range(sites):
            residual = residual + all_reduce(x)
            norm = hf_norm(residual, weight)
            x = linear(torch.nn.functional.silu(linear(norm, up)), down)
        return norm

    return run


def inputs(tokens=12, dtype=torch.bfloat16):
    shapes = (1, tokens, H), (1, tokens, H), (H,), (32, H), (H, 32)
    return [values(*shape, dtype=dtype) for shape in shapes]


def is_close(ours, theirs):
    """Whether the results differ at most by what a few values cost that are quantised to the neighbouring number."""
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error < 0.05, f"relative error {error}"


@pytest.mark.parametrize("kind", [kind for kind in LINEARS if "tensor" not in kind])
def test_quantised_linears_are_cut_with_their_scales(kind):
    new = rewrite(block(LINEARS[kind]), *inputs(), dynamic="row" in kind, min_tokens=2)
    assert (new.report.mode, new.report.joins) == ("weave", [])
    is_close(new.outputs()[0], new.expected()[0])


@pytest.mark.parametrize("kind", [kind for kind in LINEARS if "tensor" in kind])
def test_one_scale_for_all_tokens_is_fused_only(kind):
    new = rewrite(block(LINEARS[kind]), *inputs(), min_tokens=2)
    assert new.report.mode == "fuse"
    (reason,) = new.report.reasons
    assert "a quantisation has one scale for all tokens" in reason
    is_close(new.outputs()[0], new.expected()[0])
    with pytest.raises(TokenWeaveError, match="one scale for all tokens"):
        rewrite(block(LINEARS[kind]), *inputs(), mode="weave")


@pytest.mark.parametrize("mode", ["fuse", "weave"])
@pytest.mark.parametrize("kind, written", [("int8 row", "placed"), ("int8 weight", "placed"), ("fp8 row", "scaled_linear")])
def test_nothing_is_copied_between_sites(kind, written, mode):
    """What is reduced is written in the workspace: by the GEMM, or by what scales its result. Norms are quantised from there."""
    if kind not in LINEARS:
        pytest.skip("the CPU kernel of this version of torch has no scales for rows")
    new = rewrite(block(LINEARS[kind], 3), *inputs(), mode=mode, symmetric=True)
    halves = 2 if mode == "weave" else 1
    for order in [None, *range(5)]:
        workspace = Workspace()
        (got,) = new.outputs(workspace, order)
        is_close(got, new.expected()[0])
        # The last norm leaves the graph.
        assert workspace.counts == {written: 2 * halves, "in_workspace": 2 * halves, "sharded_residual": 3 * halves, "linear": 0}


def with_bias(x, weight, bias, version):
    rows, w, one = x.reshape(-1, x.shape[-1]).to(FP8), weight.to(FP8), torch.ones(1, 1)
    if version == 2:
        product = torch.ops.aten._scaled_mm_v2(rows, w.t(), [one], [0], [0], [one], [0], [0], bias, torch.bfloat16)
    else:
        product = torch._scaled_mm(rows, w.t(), one, one, bias, out_dtype=torch.bfloat16)
    return product.view(x.shape)


@pytest.mark.full
def test_through_inductor(unexpanded, monkeypatch):
    """The kernel that scales the product of a GEMM writes it in the workspace, and no kernel reads what is gone from there: it is NaN."""
    workspace = Workspace()
    for name in (*OPS, "partials"):
        monkeypatch.setattr(ops.direct, name, getattr(workspace, name))
    monkeypatch.setattr(forms.Forms, "_may_be_symmetric", lambda *_: True)
    kinds = ["int8 row", *(["fp8 row"] if "fp8 row" in LINEARS else [])]

    def run(x, residual, norm_weight, *weights):
        for kind, weight in zip(kinds, weights):
            residual = residual + all_reduce(x)
            x = LINEARS[kind](torch.nn.functional.silu(LINEARS[kind](hf_norm(residual, norm_weight), weight)), weight)
        return hf_norm(residual + all_reduce(x), norm_weight)

    given = [values(*shape, dtype=torch.bfloat16) for shape in ((1, 12, H), (1, 12, H), (H,), (H, H), (H, H))]
    for tensor in given:
        torch._dynamo.mark_static(tensor, [0, 2] if tensor.dim() == 3 else None)
    with torch.no_grad():
        got = torch.compile(run, backend=backend.tokenweave, dynamic=True, options={"tokenweave.mode": "weave"})(*given)
    assert (workspace.counts["placed"], workspace.counts["scaled_linear"]) == (2, 2 * (len(kinds) - 1))
    is_close(got, rewrite(run, *given, mode="fuse").expected()[0])


@pytest.mark.parametrize("version, op", [(1, ops.scaled_linear), (2, ops.scaled_linear_v2)])
def test_a_scaled_gemm_with_a_bias_writes_in_the_workspace(version, op):
    def run(x, residual, norm_weight, weight, bias):
        return hf_norm(residual + all_reduce(with_bias(x, weight, bias, version)), norm_weight)

    shapes = (1, 12, H), (1, 12, H), (H,), (H, H), (H,)
    new = rewrite(run, *[values(*shape, dtype=torch.bfloat16) for shape in shapes], mode="fuse", symmetric=True)
    assert new.count(op) == 1
    is_close(new.outputs(Workspace())[0], run_graph(new.before, new.inputs, emulated=EMULATED)[0])


def refused(between, symmetric=True):
    """A rewritten graph: between(norm, GEMM of it) is what the second site reduces."""

    def run(x, residual, norm_weight, weight):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, norm_weight)
        return hf_norm(residual + all_reduce(between(norm, LINEARS["int8 row"](norm, weight))), norm_weight)

    shapes = (1, 12, H), (1, 12, H), (H,), (H, H)
    new = rewrite(run, *[values(*shape, dtype=torch.bfloat16) for shape in shapes], mode="fuse", symmetric=symmetric)
    for order in [None, *range(5)]:
        is_close(new.outputs(Workspace(), order)[0], new.expected()[0])
    return new


def test_a_norm_that_is_read_beside_the_chain_does_not_stay():
    new = refused(lambda norm, y: y + norm)
    fused = next(node for node in new.after.nodes if node.target is ops.fused)
    assert new.count(ops.placed) == 1 and not arguments(fused)["in_workspace"]


def test_a_norm_with_a_small_reduction_does_not_stay():
    """Inductor computes it again where its result is read."""
    new = refused(lambda norm, y: y * norm.view(1, 12, -1, 4).amax(-1).amax(-1, keepdim=True).sigmoid())
    assert not any(arguments(node)["in_workspace"] for node in new.after.nodes if node.target is ops.fused)


def test_a_chain_that_something_else_reads_is_not_placed():
    def run(x, residual, norm_weight, weight):
        y = LINEARS["int8 row"](x, weight)
        return hf_norm(residual + all_reduce(y), norm_weight), y.sin()

    shapes = (1, 12, H), (1, 12, H), (H,), (H, H)
    new = rewrite(run, *[values(*shape, dtype=torch.bfloat16) for shape in shapes], mode="fuse", symmetric=True)
    assert new.count(ops.placed) == 0


@pytest.mark.parametrize("first, unsplit", [(128, ""), (64, "the cut is not at a multiple of them")])
def test_a_scale_for_blocks_of_tokens_is_cut_between_blocks(first, unsplit):
    """One scale for 128 tokens and 128 channels of the activations, and one for 128 channels of each row of the weight."""

    def linear(x, weight, scales):
        rows = x.reshape(-1, 128).to(FP8)
        return torch._scaled_mm(rows, weight.to(FP8).t(), scales, torch.ones(1, 128), out_dtype=torch.bfloat16).view(x.shape)

    def run(x, residual, norm_weight, weight, scales):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, norm_weight)
        return hf_norm(residual + all_reduce(linear(norm, weight, scales)), norm_weight)

    given = [values(*shape, dtype=torch.bfloat16) for shape in ((1, 256, 128), (1, 256, 128), (128,), (128, 128))]
    new = rewrite(run, *given, values(2, 1).abs(), mode="weave", split=first)
    reasons = [op.reason for op in new.report.joins]
    assert len(reasons) == bool(unsplit) and all(unsplit in reason for reason in reasons)


def test_where_no_site_may_be_cut_the_graph_is_fused():
    """As after the decision on a graph with the same collectives, and with one scale."""
    graph, _ = trace_with_inputs(block(LINEARS["int8 row"]), *inputs())
    decision = passes.Decision(unwoven=frozenset({0, 1}))
    new = passes.rewrite(graph, Options(), lambda *_: False, lambda sites: Cut(1, 12, 6), decision)
    assert new.report.mode == "fuse" and "the ranks have agreed not to weave" in new.not_woven
