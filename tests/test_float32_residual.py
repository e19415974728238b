"""Models whose residual is in float32 and whose layers are in 16 bits, as under autocast."""

import pytest
import torch
from graphs import capture_with_inputs, rewrite, trace_with_inputs
from sites import H, all_reduce, gemma_norm, hf_norm, layer_norm, t5_norm, torch_norm, values
from workspace import Workspace

from tw_compile import ops
from tw_compile.passes import expand
from tw_compile.passes.graph_utils import arguments

pytestmark = pytest.mark.usefixtures("world")

BF16 = torch.bfloat16


def layers(norm=hf_norm, add=lambda r, total: r + total, last=lambda normed, r: normed.to(BF16)):
    def model(x, r, w, m):
        for _ in range(2):
            r = add(r, all_reduce(x))
            x = norm(r, w).to(BF16) @ m
        r = add(r, all_reduce(x))
        return last(norm(r, w), r)

    return model


def inputs(weight=BF16):
    return values(8, H, dtype=BF16), values(8, H), values(H, dtype=weight), values(H, H, dtype=BF16) / 4


def check(model, *given, symmetric=True, by=trace_with_inputs, **kwargs):
    new = rewrite(model, *(given or inputs()), symmetric=symmetric, by=by, **kwargs)
    for got, right in zip(new.outputs(Workspace() if symmetric else None), new.expected(), strict=True):
        torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)
    return new


@pytest.mark.parametrize("mode", ["fuse", "weave"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["process group", "symmetric"])
def test_the_residual_stays_in_float32(mode, symmetric):
    new = check(layers(), symmetric=symmetric, mode=mode)
    sites = [arguments(node) for node in new.after.nodes if node.target in (ops.fused, ops.start)]
    assert len(new.report.sites) == 3 and not new.report.refusals and not new.report.joins
    assert all(site["fp32_residual"] and site["sharded_residual"] is symmetric for site in sites)
    assert {site.dtype for site in new.report.sites} == {"bfloat16"}


FORMS = {
    "torch": dict(norm=torch_norm),
    "gemma": dict(norm=gemma_norm),
    "t5": dict(norm=t5_norm),
    "LayerNorm": dict(norm=lambda r, w: layer_norm(r, w.float(), w.float())),
    "no weight": dict(norm=lambda r, w: layer_norm(r)),
    "cast": dict(add=lambda r, total: total.float() + r),
    "factor": dict(add=lambda r, total: r + total.float() * 0.5),
    "factor in 16 bits": dict(add=lambda r, total: r + total * 0.5),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("weight", [BF16, torch.float32], ids=str)
def test_forms(name, weight):
    by = capture_with_inputs if name == "torch" else trace_with_inputs  # it writes in place
    assert len(check(layers(**FORMS[name]), *inputs(weight), mode="fuse", by=by).report.sites) == 3


def test_two_sums_of_a_parallel_block():
    new = check(lambda x, r, w, m: hf_norm(r + (all_reduce(x) + all_reduce(x @ m)), w).to(BF16), mode="fuse")
    assert [site.merged for site in new.report.sites] == [2]


def test_a_residual_that_is_returned():
    """It has the bits of the original graph, which rounds the sum and not the residual. Symmetric memory has no such residual."""
    returned = layers(last=lambda normed, r: (normed.to(BF16), r))
    new = check(returned, symmetric=False, mode="fuse")
    expand(new.after, lambda *_: True)
    assert len(new.report.sites) == 3 and new.outputs()[1].dtype == torch.float32
    assert torch.equal(new.outputs()[1], new.expected()[1])
    new = check(returned, mode="auto")
    assert not new.report.sites
    assert all(refusal.reason.startswith("its residual is float32 and its sum is not") for refusal in new.report.refusals)


def test_a_site_in_float32_before_those_in_16_bits():
    """As an embedding under autocast: their workspaces differ, so that its residual is whole."""

    def model(x, r, w, m):
        return layers()(hf_norm(r := all_reduce(r), w).to(BF16) @ m, r, w, m)

    new = check(model, *inputs(torch.float32), mode="fuse")
    assert len(new.report.sites) == 4
    assert [arguments(n)["sharded_residual"] for n in new.after.nodes if n.target is ops.fused] == [False, True, True, True]


REFUSED = {
    "the norm of a torch.float32 residual is read in that dtype, not only in torch.bfloat16, that of the reduced value": layers(
        last=lambda normed, r: (normed, normed.to(BF16))
    ),
    "a cast to torch.float32 comes before the norm": lambda x, r, w, m: hf_norm(all_reduce(x).float() * 0.5, w).to(BF16),
    "a cast to torch.float64 comes before the residual add": lambda x, r, w, m: hf_norm((all_reduce(x).double() + r).float(), w),
    "the residual is torch.bfloat16, the reduced value torch.float32": lambda x, r, w, m: hf_norm(all_reduce(x).float() + x, w).to(BF16),
    "the graph returns the sum with its residual before a norm: compile the whole model instead of each layer": (
        lambda x, r, w, m: all_reduce(x) + r
    ),
}


@pytest.mark.parametrize("reason", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(reason):
    new = check(REFUSED[reason], mode="auto")
    assert new.report.refusals[-1].reason == reason
