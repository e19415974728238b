"""fuse: a site becomes one call, and the graph computes what it did."""

import expecttest
import pytest
import torch
from graphs import all_reduces, rewrite, text
from sites import LAYER_NORMS, NORMS, H, all_reduce, hf_norm, in_place, layer_norm, torch_norm, values

from tw_compile import ops

pytestmark = pytest.mark.usefixtures("world")


class Snapshot(expecttest.TestCase):
    def test_one_site_becomes_one_call(self):
        def block(x, residual, weight):
            residual = residual + all_reduce(x)
            return hf_norm(residual, weight), residual

        x, residual, weight = (values(*shape, dtype=torch.bfloat16) for shape in ((8, H), (8, H), (H,)))
        fused = rewrite(block, x, residual, weight, mode="fuse")
        self.assertExpectedInline(text(fused.after, "x residual weight"), """\
%0 = tokenweave.fused(x, residual, weight, slot=2) : (bf16[8, 16], bf16[8, 16])
%1 = getitem(%0, 0) : bf16[8, 16]
%2 = getitem(%0, 1) : bf16[8, 16]
return %1, %2
""")

    def test_a_layer_norm_brings_its_own_bias(self):
        def block(x, residual, weight, bias):
            residual = residual + all_reduce(x)
            return layer_norm(residual, weight, bias), residual

        given = [values(*shape, dtype=torch.bfloat16) for shape in ((8, H), (8, H), (H,), (H,))]
        fused = rewrite(block, *given, mode="fuse")
        self.assertExpectedInline(text(fused.after, "x residual weight bias"), """\
%0 = tokenweave.fused(x, residual, weight, shift=bias, center=True, slot=2) : (bf16[8, 16], bf16[8, 16])
%1 = getitem(%0, 0) : bf16[8, 16]
%2 = getitem(%0, 1) : bf16[8, 16]
return %1, %2
""")


def check(function, *inputs, sites=1, **kwargs):
    fused = rewrite(function, *inputs, mode="fuse", **kwargs)
    assert fused.report.mode == "fuse" and fused.count(ops.fused) == len(fused.report.sites) == sites
    assert len(all_reduces(fused.after)) == len(fused.report.refusals)
    fused.check()
    return fused


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_form_of_norm_computes_the_same(norm, dynamic):
    check(lambda x, r, w: NORMS[norm](r + all_reduce(x), w), values(2, 4, H), values(2, 4, H), values(H), dynamic=dynamic)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("norm", LAYER_NORMS)
def test_every_form_of_layer_norm_computes_the_same(norm, dynamic):
    site = lambda x, r, w, b: LAYER_NORMS[norm](r + all_reduce(x), w, b)  # noqa: E731
    check(site, values(2, 4, H), values(2, 4, H), values(H), values(H), dynamic=dynamic)


def test_a_layer_norm_with_all_that_a_site_can_have():
    def block(x, b, r, w, c):
        total = (all_reduce(x).view(2, 4, H) + b) * 0.5 + r
        return layer_norm(total.view(8, H), w, c), total

    check(block, values(8, H), values(H), values(2, 4, H), values(H), values(H))


def test_a_weight_and_a_bias_made_of_the_residual_are_left_to_the_graph():
    def block(x, r, w):
        total = r + all_reduce(x)
        return layer_norm(total, total.mean(0), w), hf_norm(total, total.mean(0)), layer_norm(total, w, total.mean(0))

    check(block, values(8, H), values(8, H), values(H))


def test_a_vector_behind_an_rms_norm_is_added_by_the_graph():
    check(lambda x, r, w, b: hf_norm(r + all_reduce(x), w) + b, values(8, H), values(8, H), values(H), values(H))


def test_without_a_residual():
    check(lambda x, w: hf_norm(all_reduce(x), w), values(8, H), values(H))


def test_in_place_all_reduce():
    check(lambda x, r, w: hf_norm(in_place(x) + r, w), values(8, H), values(8, H), values(H))


def test_reshapes_on_both_sides_of_the_add():
    def block(x, r, w):
        total = r + all_reduce(x).view(2, 4, H)
        return hf_norm(total.view(8, H), w), total

    check(block, values(8, H), values(2, 4, H), values(H))


def test_bias_and_factor():
    check(
        lambda x, b, r, w: hf_norm((all_reduce(x) + b) * 0.5 + r, w),
        values(8, H), values(H), values(8, H), values(H),
    )  # fmt: skip


def test_factor_then_divisor():
    check(lambda x, r, w: hf_norm(all_reduce(x) * 3 / 4 + r, w), values(8, H), values(8, H), values(H))


def test_factor_of_one_number_in_a_tensor():
    check(lambda x, s, r, w: hf_norm(all_reduce(x) * s + r, w), values(8, H), torch.tensor(0.5), values(8, H), values(H))


def test_a_wide_weight():
    def block(x, r, w):
        wide = (r + all_reduce(x)).float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * w).to(x.dtype)

    fused = rewrite(block, values(8, H, dtype=torch.bfloat16), values(8, H, dtype=torch.bfloat16), values(H), mode="fuse")
    assert len(fused.report.sites) == 1
    torch.testing.assert_close(fused.outputs(), fused.expected())


def test_the_residual_and_the_norm_escape():
    def block(x, r, w):
        total = r + all_reduce(x)
        normed = torch_norm(total, w)
        return normed, normed.sin(), total.cos(), total

    check(block, values(8, H), values(8, H), values(H))


def test_the_norm_is_read_in_its_two_shapes():
    def block(x, r, w):
        total = r + all_reduce(x)
        return hf_norm(total.view(8, H), w).sin(), total.view(8, H).cos()

    check(block, values(2, 4, H), values(2, 4, H), values(H))


def test_a_second_norm_of_the_same_residual_is_left_alone():
    def block(x, r, w, v):
        total = r + all_reduce(x)
        return hf_norm(total, w), hf_norm(total, v)

    check(block, values(8, H), values(8, H), values(H), values(H))


def test_a_residual_that_comes_after_the_all_reduce():
    def block(x, r, w):
        reduced = all_reduce(x)
        return hf_norm(r.sin().cos() + reduced, w)

    check(block, values(8, H), values(8, H), values(H))


def test_a_residual_made_of_what_is_reduced():
    check(lambda x, w: hf_norm(all_reduce(x) + x, w), values(8, H), values(H))


def test_two_all_reduces_of_one_norm():
    check(lambda x, y, w: hf_norm(all_reduce(x) + all_reduce(y), w), values(8, H), values(8, H), values(H))


def test_chained_sites_and_a_refusal_between_them():
    def block(x, r, w):
        first = r + all_reduce(x)
        normed = hf_norm(first, w)
        other = all_reduce(normed.sin()).cos()
        second = first + all_reduce(normed + other)
        return torch_norm(second, w), second

    fused = check(block, values(8, H), values(8, H), values(H), sites=2)
    assert len(fused.report.refusals) == 1


def test_one_token():
    check(lambda x, r, w: hf_norm(r + all_reduce(x), w), values(1, 1, H), values(1, 1, H), values(H))


def test_an_eps_and_an_offset_with_a_factor_of_their_own():
    def block(x, r, w):
        wide = r + all_reduce(x)
        root = torch.rsqrt(torch.add(wide.pow(2).mean(-1, keepdim=True), 0.5, alpha=2))
        return wide * root * torch.add(w, 1, alpha=3)

    rewrite(block, values(8, H), values(8, H), values(H)).check()
