"""find: every all-reduce of a graph is a match or a refusal, with the exact reason."""

import importlib

import expecttest
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from graphs import all_reduces, capture, rewrite, text
from sites import LAYER_NORMS, NORMS, H, all_reduce, hf_norm, in_place, layer_norm, torch_norm, values

from tw_compile.passes import find
from tw_compile.passes.find import AllReduce, Match, register_all_reduce
from tw_compile.report import Refusal

module = importlib.import_module("tw_compile.passes.find")  # ``passes.find`` is the function

pytestmark = pytest.mark.usefixtures("world")


def found_in(function, *inputs, dynamic=False):
    """What ``find`` says of each all-reduce; that it names each once, in order, is part of every test."""
    graph = capture(function, *inputs, dynamic=dynamic)
    before = text(graph, " ".join(f"i{i}" for i in range(99)))
    found = find(graph)
    names = [str(f.all_reduce) for f in found]
    assert names == [str(node) for node in all_reduces(graph)]
    assert text(graph, " ".join(f"i{i}" for i in range(99))) == before, "find changes nothing"
    return found


def match_in(function, *inputs, **kwargs) -> Match:
    (match,) = found_in(function, *inputs, **kwargs)
    assert isinstance(match, Match), match
    return match


def reason_in(function, *inputs) -> str:
    (refusal,) = found_in(function, *inputs)
    assert isinstance(refusal, Refusal)
    return refusal.reason


def inputs(dtype=torch.bfloat16, shape=(8, H)):
    return values(*shape, dtype=dtype), values(*shape, dtype=dtype), values(H, dtype=dtype)


def bias(dtype=torch.bfloat16):
    return values(H, dtype=dtype)


# --- what is a site --------------------------------------------------------------------------------------------------


class Snapshot(expecttest.TestCase):
    def test_one_site_in_post_grad_aten(self):
        def block(x, residual, weight):
            residual = residual + all_reduce(x)
            return hf_norm(residual, weight), residual

        graph = capture(block, *inputs())
        self.assertExpectedInline(text(graph, "x residual weight"), """\
%0 = _c10d_functional.all_reduce(x, sum, 0) : bf16[8, 16]
%1 = _c10d_functional.wait_tensor(%0) : bf16[8, 16]
%2 = aten.add.Tensor(residual, %1) : bf16[8, 16]
%3 = prims.convert_element_type(%2, torch.float32) : f32[8, 16]
%4 = aten.pow.Tensor_Scalar(%3, 2) : f32[8, 16]
%5 = aten.mean.dim(%4, [-1], True) : f32[8, 1]
%6 = aten.add.Tensor(%5, 1e-05) : f32[8, 1]
%7 = aten.rsqrt(%6) : f32[8, 1]
%8 = aten.mul.Tensor(%3, %7) : f32[8, 16]
%9 = prims.convert_element_type(%8, torch.bfloat16) : bf16[8, 16]
%10 = aten.mul.Tensor(weight, %9) : bf16[8, 16]
return %10, %2
""")
        (match,) = find(graph)
        self.assertExpectedInline(
            "\n".join(f"{name}: {getattr(match, name)}" for name in ("all_reduce", "x", "group", "bias", "scale", "residual", "total")),
            """\
all_reduce: all_reduce
x: arg0_1
group: 0
bias: None
scale: 1.0
residual: arg1_1
total: add""",
        )


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("shape", [(8, H), (1, 8, H), (4, 8, H)], ids=["tokens", "batch 1", "batch 4"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_site_is_found_in_every_form_of_norm(norm, shape, dynamic):
    match = match_in(lambda x, r, w: NORMS[norm](r + all_reduce(x), w), *inputs(shape=shape), dynamic=dynamic)
    assert match.norm.eps == pytest.approx(1e-5)
    assert match.norm.offset == (1.0 if norm == "gemma" else 0.0)
    assert (match.norm.weight is None) == (norm == "without a weight")
    assert not match.norm.center and match.norm.shift is None
    assert match.residual is not None and match.bias is None and match.scale == 1.0


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("shape", [(8, H), (4, 8, H)], ids=["tokens", "batch 4"])
@pytest.mark.parametrize("norm", LAYER_NORMS)
def test_a_site_is_found_in_every_form_of_layer_norm(norm, shape, dynamic):
    match = match_in(lambda x, r, w, b: LAYER_NORMS[norm](r + all_reduce(x), w, b), *inputs(shape=shape), bias(), dynamic=dynamic)
    assert match.norm.center and match.norm.eps == pytest.approx(1e-5)
    assert match.norm.offset == (1.0 if norm == "nemotron" else 0.0)
    assert (match.norm.weight is None) == (norm in ("torch, no weight", "torch, neither"))
    assert (match.norm.shift is None) == (norm in ("torch, no bias", "torch, neither", "cohere"))
    assert match.residual is not None and match.bias is None and match.scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_site_is_found_in_every_dtype(norm, dtype):
    assert match_in(lambda x, r, w: NORMS[norm](r + all_reduce(x), w), *inputs(dtype)).total.meta["val"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", LAYER_NORMS)
def test_a_site_with_a_layer_norm_is_found_in_every_dtype(norm, dtype):
    match = match_in(lambda x, r, w, b: LAYER_NORMS[norm](r + all_reduce(x), w, b), *inputs(dtype), bias(dtype))
    assert match.norm.output.meta["val"].dtype == dtype


def test_a_layer_norm_that_is_a_module():
    model = torch.nn.LayerNorm(H).requires_grad_(False)
    match = match_in(lambda x, r: model(r + all_reduce(x)), values(8, H), values(8, H))
    assert match.norm.center and match.norm.weight is not None and match.norm.shift is not None


def test_a_layer_norm_in_float32_of_a_narrow_model():
    """Its weight and bias are float32, or one of them is."""

    def block(x, r, w, b):
        return layer_norm((r + all_reduce(x)).float(), w.float(), b.float()).to(x.dtype)

    x, r, w = inputs()
    for weight, shift in ((w.float(), bias(torch.float32)), (w, bias(torch.float32)), (w.float(), bias())):
        match = match_in(block, x, r, weight, shift)
        assert (match.norm.weight.meta["val"].dtype, match.norm.shift.meta["val"].dtype) == (weight.dtype, shift.dtype)


def test_a_layer_norm_without_a_residual_and_behind_a_reshape():
    match = match_in(lambda x, w, b: layer_norm(all_reduce(x).view(8, H), w, b), values(2, 4, H), values(H), values(H))
    assert match.norm.center and match.residual is None


def test_the_bias_of_a_gemm_and_that_of_a_layer_norm():
    x, r, w = inputs()
    match = match_in(lambda x, b, r, w, c: layer_norm((all_reduce(x) + b) * 0.5 + r, w, c), x, bias(), r, w, bias())
    assert match.bias is not match.norm.shift is not None and match.bias is not None and match.scale == 0.5


def test_a_vector_that_is_added_to_an_rms_norm_is_none_of_its_own():
    match = match_in(lambda x, r, w, b: hf_norm(r + all_reduce(x), w) + b, *inputs(), bias())
    assert match.norm.shift is None and not match.norm.center


def test_rows_that_are_added_to_a_layer_norm_are_no_bias():
    match = match_in(lambda x, r, w, y: layer_norm(r + all_reduce(x), w) + y, *inputs(torch.float32), values(8, H))
    assert match.norm.shift is None and match.norm.weight is not None

@pytest.mark.parametrize(
    "site",
    [
        lambda x, r: r + all_reduce(x),
        lambda x, r: all_reduce(x) + r,
        lambda x, r: in_place(x) + r,
        lambda x, r: torch.add(r, all_reduce(x), alpha=1),
    ],
    ids=["residual first", "residual last", "in place", "explicit alpha"],
)
def test_the_residual_comes_in_either_order(site):
    match = match_in(lambda x, r, w: hf_norm(site(x, r), w), *inputs())
    assert str(match.residual).startswith("arg") and match.residual is not match.x


def test_without_a_residual_as_after_an_embedding():
    match = match_in(lambda x, w: hf_norm(all_reduce(x), w), values(8, H), values(H))
    assert match.residual is None


def test_eps_is_read_from_the_graph():
    match = match_in(lambda x, r, w: F.rms_norm(r + all_reduce(x), (H,), w, 0.125), *inputs())
    assert match.norm.eps == 0.125


def test_reshapes_before_and_after_the_add():
    def block(x, r, w):
        total = r + all_reduce(x).view(2, 4, H)
        return hf_norm(total.view(8, H), w), total

    match = match_in(block, values(8, H), values(2, 4, H), values(H))
    assert list(match.residual.meta["val"].shape) == [2, 4, H]


def test_a_bias_and_a_factor_before_the_residual():
    match = match_in(lambda x, b, r, w: hf_norm(r + (all_reduce(x) + b) * 0.5, w), values(8, H), values(H), values(8, H), values(H))
    assert match.bias is not None and match.scale == 0.5 and match.residual is not None


def test_a_divisor_is_a_factor():
    assert match_in(lambda x, r, w: hf_norm(r + all_reduce(x) / 4, w), *inputs(torch.float32)).scale == 0.25


def test_the_residual_and_the_norm_may_be_used_again():
    def block(x, r, w):
        total = r + all_reduce(x)
        normed = torch_norm(total, w)
        return normed, normed.sin(), total.cos(), total

    assert match_in(block, *inputs()).residual is not None


def test_a_weight_in_float32_of_the_torch_form():
    weight = values(H)
    x, r, _ = inputs()

    def block(x, r, w):
        wide = (r + all_reduce(x)).float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * w).to(x.dtype)

    assert match_in(block, x, r, weight).norm.weight is not None


SPELLINGS = {  # of x * rsqrt(spread + eps) * w, where wide is x in float32
    "1 / sqrt": lambda x, wide, spread, w: w * (wide * (1 / torch.sqrt(spread + 1e-5))).to(x.dtype),
    "reciprocal": lambda x, wide, spread, w: w * (wide * torch.sqrt(spread + 1e-5).reciprocal()).to(x.dtype),
    "a column by a view": lambda x, wide, _, w: w * (wide * torch.rsqrt(wide.pow(2).mean(-1) + 1e-5).view(*x.shape[:-1], 1)).to(x.dtype),
    "the weight first": lambda x, wide, spread, w: (wide * w.float() * torch.rsqrt(spread + 1e-5)).to(x.dtype),
    "1 + the weight first": lambda x, wide, spread, w: (wide * (1 + w.float()) / torch.sqrt(spread + 1e-5)).to(x.dtype),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_of_a_norm(name):
    def block(x, r, w):
        total = r + all_reduce(x)
        wide = total.float()
        return SPELLINGS[name](total, wide, wide.pow(2).mean(-1, keepdim=True), w)

    norm = match_in(block, *inputs()).norm
    assert (norm.kind, str(norm.weight), norm.offset) == ("RMSNorm", "arg2_1", float("1 +" in name))


def test_a_square_written_as_a_product_and_a_root_as_a_power():
    def block(x, r, w):
        wide = (r + all_reduce(x)).float()
        return (wide * ((wide * wide).mean(-1, keepdim=True) + 1e-5) ** -0.5 * w.float()).to(x.dtype)

    assert match_in(block, *inputs()).norm.eps == pytest.approx(1e-5)


def test_sites_that_follow_each_other_share_the_residual():
    def block(x, y, r, w):
        first = r + all_reduce(x)
        second = first + all_reduce(y + hf_norm(first, w))
        return hf_norm(second, w)

    first, second = found_in(block, values(8, H), values(8, H), values(8, H), values(H))
    assert second.residual is first.total


def test_a_registered_all_reduce_is_found(monkeypatch):
    monkeypatch.setattr(module, "_ALL_REDUCES", dict(module._ALL_REDUCES))
    with torch.library._scoped_library("tests", "FRAGMENT") as library:
        library.define("my_all_reduce(Tensor x, str group) -> Tensor")
        library.impl("my_all_reduce", lambda x, group: x.clone(), "CompositeExplicitAutograd")
        op = torch.ops.tests.my_all_reduce.default
        register_all_reduce(op, lambda node: AllReduce(node.args[0], "sum", node.args[1]))
        name = dist.group.WORLD.group_name
        (match,) = find(capture(lambda x, r, w: hf_norm(r + torch.ops.tests.my_all_reduce(x, name), w), *inputs()))
        assert isinstance(match, Match) and match.group == name


# --- what is not -----------------------------------------------------------------------------------------------------


def refused(reason, function, *inputs):
    assert reason_in(function, *inputs) == reason


def before_its_norm(reason, function, *inputs):
    """The site ends at the residual, as the kernel does not have the norm."""
    match = match_in(function, *inputs)
    assert (match.norm.kind, match.norm.lacking, match.norm.output) == ("", reason, match.total)


@pytest.mark.parametrize("op", ["avg", "max"])
def test_refused_other_reduce_op(op):
    refused(f"reduce op {op!r}, not 'sum'", lambda x, r, w: hf_norm(r + all_reduce(x, op), w), *inputs())


def test_refused_group_of_one_rank():
    alone = dist.new_group([0])
    name = alone.group_name
    refused(
        f"group {name} has one rank: there is nothing to reduce",
        lambda x, r, w: hf_norm(r + all_reduce(x, group=alone), w),
        *inputs(),
    )


def test_refused_dtype_of_the_reduced_value():
    refused(
        "its dtype is torch.float64; bfloat16, float16 and float32 can be fused",
        lambda x, r, w: hf_norm(r + all_reduce(x), w),
        *inputs(torch.float64),
    )


@pytest.mark.parametrize("shape", [(8, 12), (8, 32776), (H,)], ids=str)
def test_refused_rows_that_a_kernel_cannot_take(shape):
    refused(
        f"shape {list(shape)}: the last dimension must be a multiple of 8 up to 32768",
        lambda x, r, w: hf_norm(r + all_reduce(x), w),
        values(*shape), values(*shape), values(shape[-1]),
    )  # fmt: skip


def test_refused_residual_in_16_bits_of_a_sum_in_float32():
    x, r, w = inputs()
    refused(
        "the residual is torch.bfloat16, the reduced value torch.float32",
        lambda x, r, w: hf_norm(all_reduce(x) + r, w),
        x.float(), r, w,
    )  # fmt: skip


def test_before_a_norm_whose_weight_changes_the_dtype():
    x, r, w = inputs()
    before_its_norm(
        "the norm of a torch.bfloat16 value is torch.float32 (its weight is torch.float32)",
        lambda x, r, w: hf_norm(r + all_reduce(x), w),
        x, r, w.float(),
    )  # fmt: skip


def test_before_a_norm_with_a_weight_of_another_half_precision():
    x, r, w = inputs()

    def block(x, r, w):
        wide = (r + all_reduce(x)).float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * w).to(x.dtype)

    before_its_norm("the norm's weight is torch.float16, its input torch.bfloat16", block, x, r, w.half())


def test_refused_cast_before_the_add():
    x, r, w = inputs()
    refused(
        "a cast to torch.float16 comes before the residual add",
        lambda x, r, w: torch_norm(r + all_reduce(x).half(), w),
        x, r.half(), w.half(),
    )  # fmt: skip


def test_refused_bias_that_changes_the_dtype():
    x, r, w = inputs()
    refused(
        "the bias is torch.float32, the reduced value torch.bfloat16",
        lambda x, b, r, w: torch_norm(r + (all_reduce(x) + b), w),
        x, values(H), r.float(), w.float(),
    )  # fmt: skip


def test_refused_two_users_of_the_reduced_value():
    refused(
        "the reduced value has 2 users (aten.add.Tensor, aten.sin.default)",
        lambda x, r, w: (hf_norm(r + (y := all_reduce(x)), w), y.sin()),
        *inputs(),
    )


def test_refused_reduced_value_leaves_the_graph():
    refused("the graph returns the reduced value before a norm", all_reduce, values(8, H))


def test_refused_reduced_value_leaves_beside_the_norm():
    refused(
        "the reduced value has 2 users (aten.add.Tensor, output)",
        lambda x, r, w: (hf_norm(r + (y := all_reduce(x)), w), y),
        *inputs(),
    )


def test_refused_residual_that_is_broadcast():
    x, r, w = inputs(torch.float32)
    refused(
        "the residual has shape [1, 16], the reduced value [8, 16]",
        lambda x, r, w: hf_norm(r + all_reduce(x), w),
        x, r[:1].clone(), w,
    )  # fmt: skip


def test_refused_reduced_value_that_is_broadcast():
    x, r, w = inputs(torch.float32)
    refused(
        "the residual has shape [8, 16], the reduced value [1, 16]",
        lambda x, r, w: hf_norm(r + all_reduce(x), w),
        x[:1].clone(), r, w,
    )  # fmt: skip


def test_refused_a_residual_that_is_scaled_by_the_add():
    refused(
        "no RMSNorm or LayerNorm follows; the reduced value is the input of aten.add.Tensor",
        lambda x, r, w: hf_norm(torch.add(r, all_reduce(x), alpha=2), w),
        *inputs(torch.float32),
    )


def test_refused_no_norm():
    refused("no RMSNorm or LayerNorm follows", lambda x, r: (r + all_reduce(x)).sin(), values(8, H), values(8, H))


def test_refused_a_layer_that_is_compiled_alone():
    refused(
        "the graph returns the sum with its residual before a norm: compile the whole model instead of each layer",
        lambda x, r: r + all_reduce(x), values(8, H), values(8, H),
    )  # fmt: skip


def test_a_layer_that_is_compiled_alone_ends_in_a_site_without_a_norm():
    """Its residual is that of a site of the graph, so all ranks are known to have the same."""

    def layer(x, y, r, w):
        total = r + all_reduce(x)
        return all_reduce(hf_norm(total, w) * y) + total

    given = values(8, H), values(8, H), values(8, H), values(H)
    for how in ({}, {"symmetric": True}, {"mode": "weave", "split": 4, "symmetric": True}):
        new = rewrite(layer, *given, **how)
        assert [(site.residual, site.norm) for site in new.report.sites] == [(True, "RMSNorm"), (True, "")]
        assert "1 site ends before its norm, which is in the next graph" in new.report.reasons[0]
        new.check()
    assert "all-reduce + add\n" in f"{new.report}\n"


def test_a_sum_that_another_kind_of_norm_reads_ends_in_a_site_without_one():
    """Also inside a graph, and before what is no norm where the residual is that of a site."""

    def layer(x, y, z, r, w):
        total = r + all_reduce(x)
        other = total + all_reduce(F.normalize(total, dim=-1) * y)
        return torch.tanh(other + all_reduce(hf_norm(other, w) * z)) * w

    given = *(values(8, H) for _ in range(4)), values(H)
    for how in ({"mode": "fuse"}, {"mode": "fuse", "symmetric": True}, {"mode": "weave", "split": 4, "symmetric": True}):
        new = rewrite(layer, *given, **how)
        assert [(site.residual, site.norm) for site in new.report.sites] == [(True, ""), (True, "RMSNorm"), (True, "")]
        divided = "the value is divided by its length (F.normalize), not by the root of mean of squares + eps"
        assert [f"1 site has no norm: {why}" for why in (divided, "no RMSNorm or LayerNorm follows")] == new.report.reasons[:2]
        new.check()


def test_refused_no_norm_and_no_residual():
    refused(
        "no RMSNorm or LayerNorm follows; the reduced value is the input of aten.relu.default", lambda x: all_reduce(x).relu(), values(8, H)
    )


def mean(row):
    return row.mean(-1, keepdim=True)


def variance(row):
    return row.var(-1, keepdim=True, unbiased=False)


def quotient(row, centered, variance):
    return centered * torch.rsqrt(variance + 1e-5)


def in_parts(mean=mean, variance=variance, quotient=quotient):
    """A LayerNorm without casts, by its parts."""

    def block(x, r, w):
        row = r + all_reduce(x)
        return quotient(row, row - mean(row), variance(row)) * w

    return block


def mean_of_squares(row):
    return (row * row).mean(-1, keepdim=True)


INCOMPLETE = "no x * rsqrt(variance + eps) follows"
NOT_QUITE = {  # what is not quite a LayerNorm: a block, and why it is none
    "unbiased": (in_parts(variance=lambda row: row.var(-1, keepdim=True)), "the variance is divided by H - 1, not by H (unbiased=False)"),
    "of all": (in_parts(variance=lambda row: row.var(unbiased=False)), "the variance is over dimensions [0, 1], not the last one"),
    "of columns": (in_parts(variance=lambda row: row.var(0, unbiased=False)), "the variance is over dimensions [0], not the last one"),
    "less the mean of columns": (in_parts(mean=lambda row: row.mean(0, keepdim=True)), INCOMPLETE),
    "less twice the mean": (in_parts(mean=lambda row: mean(row) * 2), INCOMPLETE),
    "of the row as it is": (in_parts(quotient=lambda row, _, v: row * torch.rsqrt(v + 1e-5)), INCOMPLETE),
    "upside down": (in_parts(quotient=lambda _, c, v: torch.sqrt(v + 1e-5) / c), INCOMPLETE),
    "eps outside": (in_parts(quotient=lambda _, c, v: c / (torch.sqrt(v) + 1e-5)), "the variance is not followed by + eps"),
    "E(x²) - E(x)²": (
        in_parts(variance=lambda row: mean_of_squares(row) - mean(row) ** 2), "the mean of squares is not followed by + eps",
    ),
    "by the mean of squares": (in_parts(variance=mean_of_squares), "no x * rsqrt(mean of squares + eps) follows"),
}  # fmt: skip


@pytest.mark.parametrize("block, reason", NOT_QUITE.values(), ids=NOT_QUITE)
def test_before_what_is_not_quite_a_layer_norm(block, reason):
    before_its_norm(reason, block, *inputs(torch.float32))


def test_a_layer_norm_in_parts():
    assert match_in(in_parts(), *inputs(torch.float32)).norm.center


def test_refused_layer_norm_over_part_of_the_row_or_more_than_it():
    x, r, w = inputs(torch.float32)
    none = "no RMSNorm or LayerNorm follows"
    refused(none, lambda x, r, w: layer_norm((r + all_reduce(x)).view(8, 2, H // 2), w), x, r, w[: H // 2].clone())
    both = "the variance is over dimensions [0, 1], not the last one"
    refused(both, lambda x, r, w: F.layer_norm(r + all_reduce(x), (8, H)) * w, x, r, w)


def test_a_layer_norm_that_is_not_in_float32():
    assert match_in(in_parts(), *inputs()).norm.center


def test_before_a_value_that_is_divided_by_its_length():
    before_its_norm(
        "the value is divided by its length (F.normalize), not by the root of mean of squares + eps",
        lambda x, r, w: F.normalize((r + all_reduce(x)).float(), dim=-1).to(x.dtype) * w, *inputs(),
    )  # fmt: skip


def test_before_a_sum_of_squares_that_another_number_divides():
    def block(x, r, w):
        total = r + all_reduce(x)
        return total * torch.rsqrt(total.pow(2).sum(-1, keepdim=True) / (H + 1) + 1e-5) * w

    before_its_norm("no RMSNorm or LayerNorm follows", block, *inputs(torch.float32))


def test_before_a_layer_norm_that_changes_the_dtype():
    x, r, w = inputs()
    before_its_norm(
        "the norm of a torch.bfloat16 value is torch.float32 (its weight is torch.float32)",
        lambda x, r, w, b: layer_norm((r + all_reduce(x)).float(), w, b),
        x, r, w.float(), bias(torch.float32),
    )  # fmt: skip


def test_before_a_layer_norm_with_a_bias_of_another_half_precision():
    before_its_norm(
        "the norm's bias is torch.float16, its input torch.bfloat16",
        lambda x, r, w, b: (layer_norm((r + all_reduce(x)).float(), w.float()) + b).to(x.dtype),
        *inputs(), bias(torch.float16),
    )  # fmt: skip


def test_a_refused_norm_is_the_reason_also_without_a_residual():
    def block(x):
        row = all_reduce(x)
        return quotient(row, row - mean(row), row.var(-1, keepdim=True))

    refused("the variance is divided by H - 1, not by H (unbiased=False)", block, values(8, H))


def test_refused_mean_over_another_dimension():
    def block(x, r, w):
        total = r + all_reduce(x)
        return total * torch.rsqrt(total.pow(2).mean(0, keepdim=True) + 1e-5) * w

    refused("the mean of squares is over dimensions [0], not the last one", block, *inputs(torch.float32))


def test_refused_norm_over_part_of_the_row():
    def block(x, r, w):
        heads = (r + all_reduce(x)).view(8, 2, H // 2)
        return hf_norm(heads, w)

    x, r, w = inputs(torch.float32)
    refused("no RMSNorm or LayerNorm follows", block, x, r, w[: H // 2].clone())


def test_before_a_norm_without_eps():
    def block(x, r, w):
        total = r + all_reduce(x)
        return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True)) * w

    before_its_norm("the mean of squares is not followed by + eps", block, *inputs(torch.float32))


def test_before_a_norm_with_eps_from_a_tensor():
    def block(x, r, w):
        total = r + all_reduce(x)
        return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + w[:1]) * w

    before_its_norm("the mean of squares is not followed by + eps", block, *inputs(torch.float32))


def test_before_a_norm_of_something_else_by_this_root():
    def block(x, r, w):
        total = r + all_reduce(x)
        return r * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5) * w

    before_its_norm("no x * rsqrt(mean of squares + eps) follows", block, *inputs(torch.float32))


def test_refused_reduced_value_added_to_itself():
    refused("the reduced value is added to itself", lambda x, w: hf_norm((y := all_reduce(x)) + y, w), values(8, H), values(H))


def test_refused_first_all_reduce_of_one_norm():
    """A site is made where its all-reduce was: that of the first would have to wait for the second."""
    def block(x, y, w):
        return hf_norm(all_reduce(x) + all_reduce(y), w)

    first, second = found_in(block, values(8, H), values(8, H), values(H))
    assert isinstance(second, Match)
    assert first.reason == f"its residual add or norm depends on {second.all_reduce}, a later collective"


def test_refused_coalesced():
    def block(x, y, w):
        out = torch.ops._c10d_functional.all_reduce_coalesced([x, y], "sum", dist.group.WORLD.group_name)
        x, y = map(torch.ops._c10d_functional.wait_tensor, out)
        return hf_norm(x + y, w)

    refused("all_reduce_coalesced reduces several tensors at once", block, values(8, H), values(8, H), values(H))


def test_refused_inside_a_branch():
    def block(x, r, w):
        def fused(x, r):
            return hf_norm(r + all_reduce(x), w)

        return torch.cond(x.sum() > 0, fused, lambda x, r: r.sin(), (x, r))

    reason = reason_in(block, *inputs(torch.float32))
    assert reason.startswith("inside ") and reason.endswith(", the graph of a higher-order op")


def test_a_site_between_refusals_keeps_its_place():
    def block(x, r, w):
        one = all_reduce(x, "max").sin()
        two = hf_norm(r + all_reduce(x), w)
        return one + two, all_reduce(two)

    kinds = [type(f).__name__ for f in found_in(block, *inputs(torch.float32))]
    assert kinds == ["Refusal", "Match", "Refusal"]


def test_a_refusal_says_where_in_the_model_it_stands():
    (refusal,) = found_in(lambda x: all_reduce(x).sin(), values(8, H))
    assert "test_find.py:" in refusal.source or "sites.py:" in refusal.source
