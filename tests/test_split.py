"""split: everything between the first and the last site is done twice, once for each half of the tokens."""

import expecttest
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from graphs import capture, rewrite, text
from models import STYLES, VOCAB, parallel
from sites import INNER, H, all_reduce, hf_norm, torch_norm, values

from tw_compile import ops, passes
from tw_compile.options import Options, TokenWeaveError
from tw_compile.passes.graph_utils import c10d
from tw_compile.passes.rules.token_axis import Split, register_token_rule

pytestmark = pytest.mark.usefixtures("world")


def mlp(x, residual, weight, up, down):
    """Two sites and what lies between them."""
    residual = residual + all_reduce(x)
    inner = hf_norm(residual, weight) @ up
    residual = residual + all_reduce(F.relu(inner) @ down)
    return hf_norm(residual, weight)


def mlp_inputs(*shape, dtype=torch.float32):
    shapes = (*shape, H), (*shape, H), (H,), (H, INNER), (INNER, H)
    return [values(*s, dtype=dtype) for s in shapes]


def woven(function, *inputs, unsplit=(), **kwargs):
    """Weave, and assert that the results are right and which ops are not split."""
    new = rewrite(function, *inputs, **{"mode": "weave", **kwargs})
    assert new.report.mode == "weave"
    assert [each.op for each in new.report.joins] == list(unsplit)
    new.check()
    return new


class Snapshot(expecttest.TestCase):
    names = "x residual weight up down"

    def split(self, *inputs, dynamic=False):
        graph = capture(mlp, *inputs, dynamic=dynamic)
        sites = passes.fuse(graph, passes.find(graph), "auto", 0)
        graph, _, unsplit, *_ = passes.split(graph, sites, passes.choose_cut(sites, Options(mode="weave")))
        assert not unsplit
        return text(graph, self.names)

    def test_two_sites_between_tokens(self):
        self.assertExpectedInline(self.split(*mlp_inputs(8, dtype=torch.bfloat16)), """\
0 %0 = aten.slice.Tensor(x, 0, 0, 4) : bf16[4, 16]
1 %1 = aten.slice.Tensor(x, 0, 4, 8) : bf16[4, 16]
0 %2 = aten.slice.Tensor(residual, 0, 0, 4) : bf16[4, 16]
1 %3 = aten.slice.Tensor(residual, 0, 4, 8) : bf16[4, 16]
0 %4 = tokenweave.fused(%0, %2, weight, slot=0) : (bf16[4, 16], bf16[4, 16])
0 %5 = getitem(%4, 0) : bf16[4, 16]
0 %6 = getitem(%4, 1) : bf16[4, 16]
1 %7 = tokenweave.fused(%1, %3, weight, slot=1) : (bf16[4, 16], bf16[4, 16])
1 %8 = getitem(%7, 0) : bf16[4, 16]
1 %9 = getitem(%7, 1) : bf16[4, 16]
0 %10 = aten.mm(%5, up) : bf16[4, 24]
1 %11 = aten.mm(%8, up) : bf16[4, 24]
0 %12 = aten.relu(%10) : bf16[4, 24]
1 %13 = aten.relu(%11) : bf16[4, 24]
0 %14 = aten.mm(%12, down) : bf16[4, 16]
1 %15 = aten.mm(%13, down) : bf16[4, 16]
0 %16 = tokenweave.fused(%14, %6, weight, slot=0) : (bf16[4, 16], bf16[4, 16])
0 %17 = getitem(%16, 0) : bf16[4, 16]
1 %18 = tokenweave.fused(%15, %9, weight, slot=1) : (bf16[4, 16], bf16[4, 16])
1 %19 = getitem(%18, 0) : bf16[4, 16]
  %20 = aten.cat([%17, %19], 0) : bf16[8, 16]
  return %20
""")

    def test_two_sites_between_the_sequences_of_a_batch(self):
        self.assertExpectedInline(self.split(*mlp_inputs(4, 3, dtype=torch.bfloat16)), """\
0 %0 = aten.slice.Tensor(x, 0, 0, 2) : bf16[2, 3, 16]
1 %1 = aten.slice.Tensor(x, 0, 2, 4) : bf16[2, 3, 16]
0 %2 = aten.slice.Tensor(residual, 0, 0, 2) : bf16[2, 3, 16]
1 %3 = aten.slice.Tensor(residual, 0, 2, 4) : bf16[2, 3, 16]
0 %4 = tokenweave.fused(%0, %2, weight, slot=0) : (bf16[2, 3, 16], bf16[2, 3, 16])
0 %5 = getitem(%4, 0) : bf16[2, 3, 16]
0 %6 = getitem(%4, 1) : bf16[2, 3, 16]
1 %7 = tokenweave.fused(%1, %3, weight, slot=1) : (bf16[2, 3, 16], bf16[2, 3, 16])
1 %8 = getitem(%7, 0) : bf16[2, 3, 16]
1 %9 = getitem(%7, 1) : bf16[2, 3, 16]
0 %10 = aten.reshape(%5, [-1, 16]) : bf16[6, 16]
1 %11 = aten.reshape(%8, [-1, 16]) : bf16[6, 16]
0 %12 = aten.mm(%10, up) : bf16[6, 24]
1 %13 = aten.mm(%11, up) : bf16[6, 24]
0 %14 = aten.reshape(%12, [-1, 3, 24]) : bf16[2, 3, 24]
1 %15 = aten.reshape(%13, [-1, 3, 24]) : bf16[2, 3, 24]
0 %16 = aten.relu(%14) : bf16[2, 3, 24]
1 %17 = aten.relu(%15) : bf16[2, 3, 24]
0 %18 = aten.reshape(%16, [-1, 24]) : bf16[6, 24]
1 %19 = aten.reshape(%17, [-1, 24]) : bf16[6, 24]
0 %20 = aten.mm(%18, down) : bf16[6, 16]
1 %21 = aten.mm(%19, down) : bf16[6, 16]
0 %22 = aten.reshape(%20, [-1, 3, 16]) : bf16[2, 3, 16]
1 %23 = aten.reshape(%21, [-1, 3, 16]) : bf16[2, 3, 16]
0 %24 = tokenweave.fused(%22, %6, weight, slot=0) : (bf16[2, 3, 16], bf16[2, 3, 16])
0 %25 = getitem(%24, 0) : bf16[2, 3, 16]
1 %26 = tokenweave.fused(%23, %9, weight, slot=1) : (bf16[2, 3, 16], bf16[2, 3, 16])
1 %27 = getitem(%26, 0) : bf16[2, 3, 16]
  %28 = aten.cat([%25, %27], 0) : bf16[4, 3, 16]
  return %28
""")

    def test_two_sites_with_a_dynamic_number_of_tokens(self):
        self.assertExpectedInline(self.split(*mlp_inputs(8, dtype=torch.bfloat16), dynamic=True), """\
  %0 = floordiv(s0, 2) : (s0//2)
0 %1 = aten.slice.Tensor(x, 0, 0, %0) : bf16[(s0//2), 16]
1 %2 = aten.slice.Tensor(x, 0, %0, s0) : bf16[s0 - ((s0//2)), 16]
0 %3 = aten.slice.Tensor(residual, 0, 0, %0) : bf16[(s0//2), 16]
1 %4 = aten.slice.Tensor(residual, 0, %0, s0) : bf16[s0 - ((s0//2)), 16]
0 %5 = tokenweave.fused(%1, %3, weight, slot=0) : (bf16[(s0//2), 16], bf16[(s0//2), 16])
0 %6 = getitem(%5, 0) : bf16[(s0//2), 16]
0 %7 = getitem(%5, 1) : bf16[(s0//2), 16]
1 %8 = tokenweave.fused(%2, %4, weight, slot=1) : (bf16[s0 - ((s0//2)), 16], bf16[s0 - ((s0//2)), 16])
1 %9 = getitem(%8, 0) : bf16[s0 - ((s0//2)), 16]
1 %10 = getitem(%8, 1) : bf16[s0 - ((s0//2)), 16]
0 %11 = aten.mm(%6, up) : bf16[(s0//2), 24]
1 %12 = aten.mm(%9, up) : bf16[s0 - ((s0//2)), 24]
0 %13 = aten.relu(%11) : bf16[(s0//2), 24]
1 %14 = aten.relu(%12) : bf16[s0 - ((s0//2)), 24]
0 %15 = aten.mm(%13, down) : bf16[(s0//2), 16]
1 %16 = aten.mm(%14, down) : bf16[s0 - ((s0//2)), 16]
0 %17 = tokenweave.fused(%15, %7, weight, slot=0) : (bf16[(s0//2), 16], bf16[(s0//2), 16])
0 %18 = getitem(%17, 0) : bf16[(s0//2), 16]
1 %19 = tokenweave.fused(%16, %10, weight, slot=1) : (bf16[s0 - ((s0//2)), 16], bf16[s0 - ((s0//2)), 16])
1 %20 = getitem(%19, 0) : bf16[s0 - ((s0//2)), 16]
  %21 = aten.cat([%18, %20], 0) : bf16[s0, 16]
  return %21
""")


# --- where the cut is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, halves",
    [
        *[((8,), (4, 4)), ((7,), (3, 4)), ((2,), (1, 1)), ((1, 8), (4, 4))],
        *[((1, 1, 9), (4, 5)), ((4, 8), (2, 2)), ((5, 3), (2, 3)), ((8, 1), (4, 4))],
    ],
    ids=str,
)  # fmt: skip
def test_the_cut_is_in_the_middle_of_the_first_dimension_that_has_one(shape, halves):
    assert woven(mlp, *mlp_inputs(*shape)).report.split == halves


def test_the_cut_is_on_tiles_from_the_threshold_on():
    assert rewrite(mlp, *mlp_inputs(1200), mode="auto").report.split == (512, 688)
    assert rewrite(mlp, *mlp_inputs(1024), mode="auto").report.split == (512, 512)


@pytest.mark.parametrize("split", [1, 3, 7])
def test_an_explicit_split_in_tokens(split):
    assert woven(mlp, *mlp_inputs(8), split=split).report.split == (split, 8 - split)


def test_an_explicit_split_of_a_batch_is_in_tokens_too():
    assert woven(mlp, *mlp_inputs(4, 6), split=6).report.split == (1, 3)


def refusal_of(shape, **options):
    with pytest.raises(TokenWeaveError) as error:
        rewrite(mlp, *mlp_inputs(*shape), mode="weave", **options)
    return str(error.value)


@pytest.mark.parametrize("split", [8, 9, 1000])
def test_a_split_that_leaves_nothing_is_an_error(split):
    assert refusal_of((8,), split=split).endswith(f"split={split} leaves nothing for the second half")


def test_a_split_within_a_sequence_of_a_batch_is_an_error():
    assert refusal_of((4, 6), split=8).endswith("split=8 is not a multiple of the 6 tokens of a sequence")


def test_one_token_cannot_be_woven():
    assert refusal_of((1,)) == "option 'tokenweave.mode' is 'weave', but this graph cannot be woven: one token cannot be split"


def test_below_the_threshold_a_graph_is_fused_only():
    new = rewrite(mlp, *mlp_inputs(8), min_tokens=9)
    assert (new.report.mode, new.report.split) == ("fuse", None)
    assert new.report.reasons == ["not woven: fewer than 9 tokens"]
    assert (new.count(ops.fused), new.count(ops.start)) == (2, 0)
    new.check()


def test_at_the_threshold_it_is_woven():
    assert rewrite(mlp, *mlp_inputs(2, 4), min_tokens=8).report.mode == "weave"


# --- what is cut -----------------------------------------------------------------------------------------------------


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("style, norm", [("functional", "hf"), ("in_place", "torch")])
def test_all_of_a_llama_is_split(style, norm, batch, dynamic):
    """And the halves give what the whole does."""
    model = parallel(style, layers=1, norm=norm, dtype=torch.float32)
    new = woven(model, torch.randint(0, VOCAB, (batch, 16)), dynamic=dynamic)
    assert len(new.report.sites) == 2 + STYLES[style].embedding and not new.report.refusals
    assert all(site.woven for site in new.report.sites)
    assert new.count(ops.start) == new.count(ops.wait) == 2 * len(new.report.sites)


def between(middle, *inputs, unsplit=(), tokens=6, **kwargs):
    """Put an op between two sites. middle: (the norm [tokens, H], *inputs) -> [tokens, H]"""

    def block(x, residual, weight, *inputs):
        residual = residual + all_reduce(x)
        normed = hf_norm(residual, weight)
        residual = residual + all_reduce(middle(normed, *inputs))
        return hf_norm(residual, weight)

    shape = tokens if isinstance(tokens, tuple) else (tokens,)
    return woven(block, values(*shape, H), values(*shape, H), values(H), *inputs, unsplit=unsplit, **kwargs)


def test_an_op_without_a_rule_is_done_whole():
    new = between(lambda x: torch.fft.fft(x).real, unsplit=["aten._fft_r2c.default"])
    (unsplit,) = new.report.joins
    assert unsplit.reason == "no token-axis rule for this op" and "test_split.py" in unsplit.source


def test_a_use_that_a_rule_does_not_cover_is_done_whole():
    new = between(lambda x: x.cumsum(0), unsplit=["aten.cumsum.default"])
    assert new.report.joins[0].reason == "its token-axis rule does not cover this use"


def test_after_an_unsplit_op_the_tokens_are_cut_again():
    new = between(lambda x: (x.flip(0) @ torch.ones(H, H)).relu(), unsplit=["prims.rev.default"])
    assert all(site.woven for site in new.report.sites)


def test_the_result_of_an_unsplit_op_is_cut_again_for_the_next_site():
    new = between(lambda x: x + x.cumsum(0), unsplit=["aten.cumsum.default"])
    assert new.count(torch.ops.aten.cat.default) == 2, "one for the unsplit op, one at the end"


def test_an_op_over_all_tokens_is_done_whole():
    between(lambda x: x - x.mean(0, keepdim=True), unsplit=["aten.mean.dim"])


def test_an_op_over_the_hidden_dimension_is_not():
    between(lambda x: x - x.mean(1, keepdim=True).amax(-1, keepdim=True))


def test_values_without_tokens_are_shared_by_the_halves():
    between(lambda x, b: x * b.exp() + b, values(H))


def test_values_with_tokens_are_cut():
    between(lambda x, y: x * y.exp(), values(6, H))
    between(lambda x, y: x * y.exp(), values(6, 1))


def test_a_square_value_is_cut_along_its_tokens():
    """As many tokens as hidden entries: only the position tells which is which."""
    between(lambda x, y: torch.relu(x) * y, values(H, H), tokens=H)
    between(lambda x, y: torch.relu(x) @ y, values(H, H), tokens=H)
    between(lambda x, y: (y + x.t()).t(), values(H, H), tokens=H)
    between(lambda x, y: (y @ x.t()).t(), values(H, H), tokens=H)


def test_tokens_multiplied_with_tokens_need_them_all():
    between(lambda x: (x @ x.t()) @ x, unsplit=["aten.mm.default"] * 2)


def test_attention_written_out_is_cut_by_its_queries():
    def attention(x):
        q, k, v = (x.view(1, 6, 2, H // 2).transpose(1, 2) * f for f in (1.0, 2.0, 3.0))
        scores = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(6, H)

    between(attention)


def test_heads_and_tokens_in_one_dimension():
    between(lambda x: (x.view(24, 4) * 2).exp().view(6, H))


def test_reshape_that_mixes_tokens_is_done_whole():
    between(lambda x: x.reshape(3, 2 * H).softmax(-1).reshape(6, H), unsplit=["aten.reshape.default"])


def test_a_random_permutation_of_the_tokens_is_done_whole():
    between(lambda x, i: x[i], torch.randperm(6), unsplit=["aten.index.Tensor"])


def test_an_all_reduce_without_a_norm_between_sites_is_cut():
    new = between(lambda x: all_reduce(x.sin()).cos())
    assert len(new.report.refusals) == 1


def test_a_value_of_every_token_from_outside_in_a_batch():
    between(lambda x, y: x + y, values(5, H), tokens=(4, 5))
    between(lambda x, y: x + y, values(5, H), tokens=(5, 5))
    between(lambda x, y: x + y, values(5, 1, H), tokens=(5, 5))


def gathered(x, dim):
    whole = c10d.wait_tensor(c10d.all_gather_into_tensor(x.contiguous(), 2, dist.group.WORLD.group_name))
    return torch.cat(whole.chunk(2), dim)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_gather_along_another_dimension_than_the_first(batch, dynamic):
    """Of a batch too, which is cut along the first."""
    new = between(lambda x: gathered(x[..., :4], -1) @ torch.ones(8, H), tokens=(batch, 6), dynamic=dynamic)
    assert new.count(c10d.all_gather_into_tensor.default) == 2


def test_a_gather_along_the_first_dimension_is_done_whole():
    between(lambda x: gathered(x, 0)[3:], unsplit=["_c10d_functional.all_gather_into_tensor.default"], tokens=(3, 6))
    between(
        lambda x: torch.cat(gathered(x[..., :4], 0).chunk(2)[::-1], -1) @ torch.ones(8, H),
        unsplit=["_c10d_functional.all_gather_into_tensor.default"], tokens=(3, 6),
    )  # fmt: skip


def test_a_registered_rule_is_used(monkeypatch):
    from tw_compile.passes.rules import token_axis

    monkeypatch.setattr(token_axis, "_RULES", dict(token_axis._RULES))

    @register_token_rule(torch.ops.aten._fft_r2c.default, torch.ops.aten.view_as_real.default)
    def along_the_last_dimension(node, axes):
        axis = axes[node.args[0]]
        return Split(axis) if axis.dim == 0 else None

    between(lambda x: torch.view_as_real(torch.fft.fft(x))[..., 0])


def test_more_than_one_result():
    between(lambda x: torch.cat(list(reversed(x.split(4, -1))), -1) + x.topk(4, -1).values.sum(-1, keepdim=True))


def test_sites_of_other_shapes_are_fused_but_not_cut():
    def block(x, y, residual, weight):
        residual = residual + all_reduce(x)
        normed = hf_norm(residual, weight)
        last = all_reduce(normed[-1:] + y)
        return hf_norm(last, weight), hf_norm(normed + all_reduce(normed.sin()), weight)

    new = rewrite(block, values(6, H), values(1, H), values(6, H), values(H), mode="weave")
    assert [site.woven for site in new.report.sites] == [True, False, True]
    new.check()


def test_sites_beside_each_other_are_fused_but_not_cut():
    def block(x, y, r, w):
        return hf_norm(r + all_reduce(x), w), torch_norm(r + all_reduce(y), w)

    new = rewrite(block, values(6, H), values(6, H), values(6, H), values(H), mode="weave")
    assert [site.woven for site in new.report.sites] == [True, False]
    new.check()


def test_the_results_of_the_last_site_are_whole():
    def block(x, r, w):
        total = r + all_reduce(x)
        return hf_norm(total, w), total

    new = woven(block, values(6, H), values(6, H), values(H))
    assert new.count(torch.ops.aten.cat.default) == 2
