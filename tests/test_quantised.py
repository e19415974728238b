"""Graphs with quantised linears: cut with their scales, or fused only."""

import functools

import pytest
import torch
from graphs import rewrite as rewrite_by
from graphs import trace_with_inputs
from quantised import FP8, LINEARS
from sites import H, all_reduce, hf_norm, values

from tw_compile import TokenWeaveError, passes
from tw_compile.options import Options
from tw_compile.passes.cut import Cut

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
