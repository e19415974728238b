"""quantise: a site ends in the quantisation of its norm, with the bits that the graph computes by itself."""

from types import SimpleNamespace
from unittest import mock

import expecttest
import pytest
import torch
from graphs import rewrite, run, text, trace_with_inputs, without_codegen
from quantised import FP8, LINEARS
from sites import H, all_reduce, hf_norm, layer_norm, values
from workspace import Workspace

import tw_compile
from tw_compile import backend, ops, passes
from tw_compile.passes import fingerprint
from tw_compile.passes.graph_utils import arguments
from tw_compile.quantise import quantised, read

pytestmark = pytest.mark.usefixtures("world")
BF16 = torch.bfloat16


# --- quantisations: y -> (q, scale) -----------------------------------------------------------------------------------


def example(y):
    """That of examples/llama.py: of rows, without limits."""
    y = y.reshape(-1, H)
    scale = y.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 448.0
    return (y.float() / scale).to(FP8), scale


def torchao_fp8(y):
    """Float8DynamicActivationFloat8WeightConfig with PerRow: the scale is computed in the dtype of the model."""
    scale = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return (y.float() / scale).clamp(-448.0, 448.0).to(FP8), scale.reshape(-1, 1)


def torchao_int8(y):
    """Int8DynamicActivationInt8WeightConfig."""
    below, above = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    most = torch.max(-torch.min(below, torch.zeros_like(below)), torch.max(above, torch.zeros_like(above)))
    scale = (most / 127.5).clamp(min=torch.finfo(torch.float32).eps).float()
    return (y * (1.0 / scale)).round().clamp(-128, 127).to(torch.int8), scale


def transformers_fp8(y):
    """Of its linear layers for FP8 checkpoints of compressed-tensors."""
    most = y.reshape(-1, H).float().abs().amax(-1)
    scale = torch.where(most > 0, most, torch.ones_like(most)) / 448.0
    return (y.reshape(-1, H).float() / scale.unsqueeze(-1)).clamp(min=-448.0, max=448.0).to(FP8), scale.unsqueeze(-1)


def of_sum(y):
    """A step of each kind, without a last dimension until it is needed."""
    scale = ((y.float().abs().amax(-1) + 1e-6).clamp_min(1e-5) / 127.0).clamp_min(1e-7).unsqueeze(-1)
    return (y / scale).round().clamp(-127, 127).to(torch.int8), scale


DYNAMIC = {
    example: "fp8 1 divide 0 0.0 1e-12 448.0 0.0 -448.0 448.0 0.0 0",
    torchao_fp8: "fp8 1 divide 1 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 0",
    torchao_int8: f"int8 1 inverse 1 0.0 0.0 127.5 {torch.finfo(torch.float32).eps} -128.0 127.0 0.0 0",
    transformers_fp8: "fp8 1 divide 0 0.0 0.0 448.0 0.0 -448.0 448.0 1.0 0",
    of_sum: "int8 1 divide 0 1e-06 1e-05 127.0 1e-07 -127.0 127.0 0.0 0",
}


# Of groups of 128 channels, in a row of WIDE.
WIDE = 384


def deep_gemm(y):
    """Its per_token_cast_to_fp8: the largest magnitude in float32, and the inverse of the scale."""
    groups = y.reshape(-1, WIDE).view(-1, WIDE // 128, 128)
    scale = groups.abs().float().amax(2).view(-1, WIDE // 128).clamp(1e-4) / 448.0
    return (groups * (1.0 / scale.unsqueeze(2))).to(FP8).view(-1, WIDE), scale


def torchao_groups(y):
    """Float8DynamicActivationFloat8WeightConfig with PerBlock([1, 128]): the scale is expanded to the channels."""
    scale = (y.view(*y.shape[:-1], WIDE // 128, 128).abs().amax(-1, keepdim=True) / 448.0).reshape(*y.shape[:-1], -1).float()
    return (y.float() / scale.repeat_interleave(128, -1)).clamp(-448.0, 448.0).to(FP8), scale


def flat_groups(y):
    """As rows of 128, with scales that a GEMM of CUDA takes: those of a group of all tokens lie together."""
    groups = y.reshape(-1, WIDE).reshape(-1, 128)
    scale = (groups.float().abs().amax(-1, keepdim=True) + 1e-6) / 127.0
    q = (groups.float() / scale).round().clamp(-127, 127).to(torch.int8).reshape(-1, WIDE)
    return q, scale.reshape(-1, WIDE // 128).t().contiguous().t()


GROUPS = {
    deep_gemm: "fp8 1 inverse 0 0.0 0.0001 448.0 0.0 -448.0 448.0 0.0 128",
    torchao_groups: "fp8 1 divide 1 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 128",
    flat_groups: "int8 1 divide 0 1e-06 0.0 127.0 0.0 -127.0 127.0 0.0 128",
}
STATIC = {
    "fp8 0 divide": lambda y, scale: (y.float() / scale).clamp(-448, 448).to(FP8),
    "fp8 0 multiply": lambda y, scale: (y.float() * scale).clamp(-448, 448).to(FP8),
    "int8 0 divide": lambda y, scale: (y.float() / scale.view(1, 1)).round().clamp(-128, 127).to(torch.int8),
}


def inputs(dtype=BF16, *others, hidden=H):
    return [*(values(*shape, dtype=dtype) for shape in ((2, 6, hidden), (2, 6, hidden), (hidden,))), *others]


def site(quantise, *given, norm=hf_norm, **kwargs):
    def block(x, residual, weight, *others):
        residual = residual + all_reduce(x)
        made = quantise(norm(residual, weight), *others)
        return *(made if isinstance(made, tuple) else (made,)), residual

    return rewrite(block, *given, mode="fuse", by=trace_with_inputs, **kwargs)


def how_of(new):
    (call,) = [node for node in new.after.nodes if node.target is ops.fused]
    return arguments(call)["quantise"]


def unquantised(new):
    """The same with the quantisation in the graph."""
    with mock.patch.object(passes, "quantise", return_value=None):
        return passes.rewrite(new.before, passes.Options(mode="fuse"), lambda *_: False, lambda _: "").graph


def assert_same_bits(new):
    """As where the graph quantises what a site returns."""
    for ours, theirs in zip(new.outputs(), run(unquantised(new), new.inputs), strict=True):
        assert ours.dtype == theirs.dtype  # what FP8 has no number for is NaN, or the largest number in later versions
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0, equal_nan=True)


# --- found -----------------------------------------------------------------------------------------------------------


class Snapshot(expecttest.TestCase):
    def test_a_site_returns_the_quantised_norm_and_its_scale(self):
        new = site(torchao_fp8, *inputs(), dynamic=True)
        self.assertExpectedInline(text(new.after, "x residual weight"), """\
%0 = tokenweave.fused(x, residual, weight, slot=2, quantise=FP8 per token) : (bf16[0], bf16[s0, s1, 16], fp8[s0, s1, 16], f32[s0, s1, 1])
%1 = getitem(%0, 2) : fp8[s0, s1, 16]
%2 = getitem(%0, 3) : f32[s0, s1, 1]
%3 = getitem(%0, 1) : bf16[s0, s1, 16]
%4 = aten.reshape(%2, [-1, 1]) : f32[s0*s1, 1]
return %1, %4, %3
""")

    def test_the_norm_comes_out_as_well_where_it_is_read(self):
        new = site(lambda y, scale: (STATIC["fp8 0 divide"](y, scale), y.sin()), *inputs(BF16, torch.tensor(0.5)))
        self.assertExpectedInline(text(new.after, "x residual weight scale"), """\
%0 = tokenweave.fused(x, residual, weight, slot=2, quantise=FP8 per tensor, scale) : (bf16[2, 6, 16], bf16[2, 6, 16], fp8[2, 6, 16])
%1 = getitem(%0, 2) : fp8[2, 6, 16]
%2 = getitem(%0, 0) : bf16[2, 6, 16]
%3 = getitem(%0, 1) : bf16[2, 6, 16]
%4 = aten.sin(%2) : bf16[2, 6, 16]
return %1, %4, %3
""")

    def test_its_row_of_the_report(self):
        expected = "2×6×16 bfloat16    all-reduce + add + RMSNorm + FP8 per token"
        assert expected in str(site(example, *inputs()).report)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("quantise", DYNAMIC, ids=lambda f: f.__name__)
def test_a_scale_for_each_row(quantise, dtype):
    new = site(quantise, *inputs(dtype), norm=layer_norm if quantise is of_sum else hf_norm)
    assert how_of(new) == f"{DYNAMIC[quantise]} 0"
    assert_same_bits(new)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("quantise", GROUPS, ids=lambda f: f.__name__)
def test_a_scale_for_each_group(quantise, dynamic):
    new = site(quantise, *inputs(torch.float16 if quantise is flat_groups else BF16, hidden=WIDE), dynamic=dynamic)
    assert how_of(new) == f"{GROUPS[quantise]} 0"
    assert "per group of 128" in str(new.report)
    assert_same_bits(new)


def test_groups_of_torchao():
    """What Float8DynamicActivationFloat8WeightConfig with PerBlock calls; its GEMM runs on GPUs alone."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")

    def quantise(y):
        scale = primitives._choose_scale_float8(y, [1, 1, 128])
        return primitives._quantize_affine_float8(y, scale), scale

    new = site(quantise, *inputs(hidden=WIDE))
    assert how_of(new) == f"{GROUPS[torchao_groups]} 0"
    assert_same_bits(new)


def test_a_row_that_is_one_group_has_one_scale():
    def one_group(y):
        scale = y.view(2, 6, 1, 128).abs().amax(-1, keepdim=True).float() / 448.0
        return (y.view(2, 6, 1, 128) / scale).to(FP8).view(2, 6, 128), scale

    new = site(one_group, *inputs(hidden=128))
    assert how_of(new) == "fp8 1 divide 0 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 0 0"
    assert_same_bits(new)


def test_groups_and_rows_of_one_norm():
    """The first quantisation is the site's, and the other one reads the norm."""
    new = site(lambda y: (*deep_gemm(y), *example(y.reshape(-1, WIDE // 24)), *deep_gemm(y)), *inputs(hidden=WIDE))
    assert how_of(new) == f"{GROUPS[deep_gemm]} 1"
    assert_same_bits(new)


@pytest.mark.parametrize("how", STATIC)
def test_a_given_scale(how):
    new = site(STATIC[how], *inputs(BF16, torch.tensor(0.037)))
    assert how_of(new).startswith(how)
    assert_same_bits(new)


def test_equal_quantisations_become_one():
    """As of a query, a key and a value. Another one of the same norm reads it in its dtype."""
    new = site(lambda y: (*example(y), *example(y), *torchao_int8(y)), *inputs(), dynamic=True)
    assert how_of(new) == f"{DYNAMIC[example]} 1" and new.count(torch.ops.aten.amax.default) == 1
    assert_same_bits(new)


def test_a_row_of_zeros_becomes_zeros():
    for how in (*DYNAMIC.values(), *GROUPS.values()):
        q, scale = quantised(torch.zeros(2, WIDE, dtype=BF16), read(f"{how} 0"), None)
        assert not q.float().any() and scale.isfinite().all()


@pytest.mark.parametrize("quantise", [transformers_fp8, example], ids=lambda f: f.__name__)
def test_rows_of_zeros_and_of_nan(quantise):
    """As the graph has them."""
    given = inputs()
    for partial in given[:2]:
        partial[0, 0], partial[1, 1] = 0, torch.nan
    new = site(quantise, *given)
    q, scale, _ = (t.float() for t in new.outputs())
    theirs, their_scale, _ = (t.float() for t in run(unquantised(new), new.inputs))
    torch.testing.assert_close(scale.flatten(), their_scale.flatten(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(q, theirs, rtol=0, atol=0, equal_nan=True)


def test_the_quantisation_of_transformers():
    """Of its own code."""
    from_transformers = pytest.importorskip("transformers.integrations.compressed_tensors")
    if not hasattr(from_transformers, "quantize_fp8_per_row"):
        pytest.skip("this version of transformers decompresses the weights")
    new = site(lambda y: from_transformers.quantize_fp8_per_row(y.reshape(-1, H)), *inputs())
    assert how_of(new) == f"{DYNAMIC[transformers_fp8]} 0"
    assert_same_bits(new)


# --- not found -------------------------------------------------------------------------------------------------------


def whole(y):
    """One scale for all tokens, which no rank has when it could quantise its first row."""
    scale = y.abs().amax().float() / 448.0
    return (y.float() / scale).clamp(-448, 448).to(FP8)


def power_of_two(y):
    scale = (y.abs().amax(-1, keepdim=True).float() / 448.0).to(torch.float8_e8m0fnu).float()
    return (y.float() / scale).clamp(-448, 448).to(FP8)


def of_a_column(y):
    """A scale for each channel."""
    return (y.float() / (y.abs().amax(1, keepdim=True).float() / 448.0)).to(FP8)


def of_the_next_row(y):
    return (y.float() / (y.abs().amax(-1, keepdim=True).float() / 448.0).roll(1, 1)).to(FP8)


def of_groups(y):
    groups = y.unflatten(-1, (2, -1)).float()
    return (groups / (groups.abs().amax(-1, keepdim=True) / 448.0)).to(FP8)


def of_small_rows(y):
    """Another number than 0 decides."""
    most = y.abs().amax(-1, keepdim=True).float()
    scale = torch.where(most > 0.5, most, torch.ones_like(most)) / 448.0
    return (y.float() / scale).clamp(-448.0, 448.0).to(FP8)


def of_64(y):
    """Groups that the kernels do not have."""
    groups = y.unflatten(-1, (-1, 64)).float()
    return (groups / (groups.abs().amax(-1, keepdim=True) / 448.0)).to(FP8)


def of_groups_and_a_row(y):
    """Scaled by that of the whole row, which is not that of the group."""
    groups = y.unflatten(-1, (-1, 128)).float()
    return (groups / (groups.abs().amax((-2, -1), keepdim=True) / 448.0)).to(FP8)


def interleaved(y):
    """A group is every third channel."""
    groups = y.unflatten(-1, (128, -1)).transpose(-2, -1).float()
    return (groups / (groups.abs().amax(-1, keepdim=True) / 448.0)).to(FP8)


def repeated(y):
    """The scales of the groups in turns, not each for its own group."""
    groups = y.unflatten(-1, (-1, 128)).float()
    scale = groups.abs().amax(-1) / 448.0
    return (y.float() / scale.unsqueeze(-2).expand(*y.shape[:-1], 128, WIDE // 128).reshape(y.shape)).to(FP8)


def truncated(y):
    return (y.float() / (y.abs().amax(-1, keepdim=True).float() / 127.0)).to(torch.int8)


def limited(y):
    return (y.float() / (y.abs().amax(-1, keepdim=True).float() / 127.0)).round().clamp(-99.5, 99.5).to(torch.int8)


OTHERS = whole, power_of_two, of_small_rows, of_a_column, of_the_next_row, of_groups, truncated, limited


@pytest.mark.parametrize("quantise", OTHERS, ids=lambda f: f.__name__)
def test_what_a_site_does_not_compute_stays_in_the_graph(quantise):
    new = site(quantise, *inputs())
    assert how_of(new) == ""
    assert_same_bits(new)


@pytest.mark.parametrize("quantise", [of_64, of_groups_and_a_row, interleaved, repeated], ids=lambda f: f.__name__)
def test_other_groups_stay_in_the_graph(quantise):
    new = site(quantise, *inputs(hidden=WIDE))
    assert how_of(new) == ""
    assert_same_bits(new)


def test_a_given_scale_without_limits_stays_in_the_graph():
    """What is too large becomes NaN there."""
    assert how_of(site(lambda y, scale: (y.float() / scale).to(FP8), *inputs(BF16, torch.tensor(0.5)))) == ""


def test_a_scale_that_depends_on_the_tokens_is_not_given():
    assert how_of(site(lambda y: STATIC["fp8 0 divide"](y, y.float().sum()), *inputs())) == ""


def test_a_float32_norm_stays_in_the_graph():
    assert how_of(site(torchao_fp8, *inputs(torch.float32))) == ""


# --- with the other passes ---------------------------------------------------------------------------------------------


def layers(linear):
    def block(x, residual, weight, *weights):
        for up, down in zip(weights[::2], weights[1::2]):
            residual = residual + all_reduce(x)
            x = linear(torch.nn.functional.silu(linear(hf_norm(residual, weight), up)), down)
        return hf_norm(residual + all_reduce(x), weight)

    return block


KINDS = [kind for kind in ("fp8 row", "int8 row") if kind in LINEARS]


@pytest.mark.parametrize("mode", ["fuse", "weave"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_workspace(kind, mode):
    """Also in halves, and where nothing but what the contract promises can be read."""
    given = inputs(BF16, *(values(H, H, dtype=BF16) for _ in range(4)))
    new = rewrite(layers(LINEARS[kind]), *given, mode=mode, symmetric=True, by=trace_with_inputs)
    assert [site.output[-9:] for site in new.report.sites] == ["per token", "per token", ""]
    expected = new.outputs()
    for order in [None, *range(3)]:
        workspace = Workspace()
        torch.testing.assert_close(new.outputs(workspace, order), expected)
        assert workspace.counts["in_workspace"] == 2 * (2 if mode == "weave" else 1)


def grouped_linear(quantise):
    def linear(x, weight):
        q, scale = quantise(x)
        rows = q.float().view(-1, WIDE // 128, 128) * scale.reshape(-1, WIDE // 128, 1)
        return (rows.view(-1, WIDE).to(x.dtype) @ weight.t()).view(*x.shape[:-1], -1)

    return linear


@pytest.mark.parametrize("mode", ["fuse", "weave"])
@pytest.mark.parametrize("quantise", GROUPS, ids=lambda f: f.__name__)
def test_groups_in_the_workspace(quantise, mode):
    given = inputs(BF16, *(values(WIDE, WIDE, dtype=BF16) for _ in range(4)), hidden=WIDE)
    new = rewrite(layers(grouped_linear(quantise)), *given, mode=mode, symmetric=True, by=trace_with_inputs)
    assert [site.output[-16:] for site in new.report.sites] == ["per group of 128", "per group of 128", ""]
    assert not new.report.joins
    expected = new.outputs()
    for order in [None, *range(3)]:
        workspace = Workspace()
        torch.testing.assert_close(new.outputs(workspace, order), expected)
        assert workspace.counts["in_workspace"] == 2 * (2 if mode == "weave" else 1)


def test_groups_are_quantised_in_the_graph_where_the_residual_is_read_elsewhere():
    """Over symmetric memory: the residual has the place of the quantised norm."""

    def block(x, residual, weight):
        residual = residual + all_reduce(x)
        return *deep_gemm(hf_norm(residual, weight)), residual

    given = inputs(hidden=WIDE)
    new = rewrite(block, *given, mode="fuse", symmetric=True, by=trace_with_inputs, dynamic=True)
    assert how_of(new) == "" and not new.report.sites[0].output
    torch.testing.assert_close(new.outputs(Workspace()), site(deep_gemm, *given).outputs(), rtol=0, atol=0)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="PyTorch 2.11 has no _scaled_mm_v2 on CPUs")
@pytest.mark.parametrize("mode", ["fuse", "weave"])
def test_linear_layers_of_transformers(mode):
    """For FP8 checkpoints of compressed-tensors: all of a layer is woven, and nothing is copied."""
    from_transformers = pytest.importorskip("transformers.integrations.compressed_tensors")
    if not hasattr(from_transformers, "CompressedTensorsFP8Linear"):
        pytest.skip("this version of transformers decompresses the weights")

    def linear(x, weight):
        layer = from_transformers.CompressedTensorsFP8Linear
        q, scale = from_transformers.quantize_fp8_per_row(weight)
        of = SimpleNamespace(weight=q, weight_scale=scale.reshape(1, -1), bias=None)
        return layer.forward(of, x)

    given = inputs(BF16, *(values(H, H, dtype=BF16) for _ in range(4)))
    new = rewrite(layers(linear), *given, mode=mode, symmetric=True, by=trace_with_inputs)
    assert [site.output for site in new.report.sites] == ["FP8 per token", "FP8 per token", ""] and not new.report.joins
    expected, workspace = new.outputs(), Workspace()
    torch.testing.assert_close(new.outputs(workspace), expected)
    assert workspace.counts["in_workspace"] == workspace.counts["scaled_linear"] == 2 * (2 if mode == "weave" else 1)


def test_ranks_that_do_not_quantise_alike_do_not():
    new = site(torchao_fp8, *inputs())
    group = next(iter(fingerprint.groups_of(new.after)))
    mine = fingerprint.fingerprint(new.after, group)
    theirs = [[*mine[0][:-1], ""]]
    same = {"refused": {}, "sites": {"0": 0}, "merged": {}, "not_woven": "", "rows": None}
    outcomes = [{"fingerprint": each, **same} for each in (mine, theirs)]
    decision = fingerprint.merge(passes.Decision(), group, outcomes)
    assert decision == passes.Decision(unquantised=frozenset({0}))
    again = passes.rewrite(new.before, passes.Options(mode="fuse"), lambda *_: False, lambda _: "", decision)
    assert fingerprint.fingerprint(again.graph, group) == theirs and not again.report.sites[0].output


def on_a_rank(kind):
    """(bits of compiled ones with and without the quantisation in the sites, whether the ops compute it too, the rows of the report)"""
    torch.manual_seed(0)
    linear, hidden = (grouped_linear(deep_gemm), WIDE) if kind == "fp8 groups" else (LINEARS[kind], H)
    given = inputs(BF16, *(values(hidden, hidden, dtype=BF16) for _ in range(2)), hidden=hidden)
    results = []
    for quantise in (passes.quantise, lambda *_: None):
        torch._dynamo.reset()
        with torch.no_grad(), without_codegen(), mock.patch.object(passes, "quantise", quantise):
            results.append(torch.compile(layers(linear), backend=backend.tokenweave, fullgraph=True)(*given))
    report = tw_compile.reports()[-2]
    return torch.equal(*results), tw_compile.verify(layers(linear), *given).ok, [site.output for site in report.sites]


@pytest.mark.parametrize("kind", [*KINDS[:1], "fp8 groups"])
def test_on_ranks(ranks, kind):
    """The process group's sites are ops of the graph, and those of a graph that is not compiled are calls of the ops."""
    outputs = [f"{kind.split()[0].upper()} per {'group of 128' if 'groups' in kind else 'token'}", ""]
    assert ranks(on_a_rank, kind) == [(True, True, outputs)] * 2
