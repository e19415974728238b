"""Attention stays split: the halves give exactly what the whole does, by every op and with every mask."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from graphs import Rewritten, capture_with_inputs, passes, rewrite, run
from sites import H, all_reduce, hf_norm, values
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.virtualized import V

from tw_compile.options import Options

pytestmark = pytest.mark.usefixtures("world")

aten = torch.ops.aten
HEADS, D = 4, 4
CPU = aten._scaled_dot_product_flash_attention_for_cpu.default


def block(x, residual, weight, *inputs, attend):
    """An attention between two sites. attend: (query, key, value, *inputs) -> [B, heads, T, D]"""
    residual = residual + all_reduce(x)
    normed = hf_norm(residual, weight)
    batch, tokens = x.shape[:2]
    q, k, v = ((normed * f).view(batch, tokens, HEADS, D).transpose(1, 2) for f in (1.0, 1.5, 2.0))
    out = attend(q, k, v, *inputs).transpose(1, 2).reshape(batch, tokens, H)
    return hf_norm(residual + all_reduce(out), weight)


def split(attend, *inputs, batch=1, tokens=6, unsplit=(), dynamic=False, **options) -> Rewritten:
    """Weave it, and assert that the results are right and which ops are not split."""
    shape = (batch, tokens, H)
    arguments = values(*shape), values(*shape), values(H), *inputs
    new = rewrite(functools.partial(block, attend=attend), *arguments, mode="weave", dynamic=dynamic, **options)
    assert new.report.mode == "weave"
    assert [each.op for each in new.report.joins] == list(unsplit)
    new.check()
    return new


def keys_of_first_half(new) -> int:
    """How many keys the queries of the first half see."""
    first = next(n for n in new.after.nodes if n.target is CPU and n.meta["half"] == 0)
    return first.args[1].meta["val"].shape[2]


SDPA = F.scaled_dot_product_attention


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch, tokens", [(1, 6), (1, 7), (1, 2), (4, 6), (3, 3)])
def test_causal(batch, tokens, dynamic):
    split(lambda q, k, v: SDPA(q, k, v, is_causal=True), batch=batch, tokens=tokens, dynamic=dynamic)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_causal_cut_anywhere(at):
    assert keys_of_first_half(split(lambda q, k, v: SDPA(q, k, v, is_causal=True), split=at)) == at


@pytest.mark.parametrize("batch", [1, 4])
def test_causal_with_grouped_queries(batch):
    split(lambda q, k, v: SDPA(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True), batch=batch)


def test_causal_with_a_scale():
    split(lambda q, k, v: SDPA(q, k, v, is_causal=True, scale=0.7))


def test_causal_with_large_scores():
    """The merge by log-sum-exps does not overflow."""
    split(lambda q, k, v: SDPA(q * 100, k * 10, v, is_causal=True))


@pytest.mark.parametrize("batch", [1, 4])
def test_every_query_sees_every_key(batch):
    new = split(SDPA, batch=batch)
    assert keys_of_first_half(new) == 6


@pytest.mark.parametrize("batch", [1, 4])
def test_keys_from_elsewhere(batch):
    """As in cross-attention, with as many keys as tokens."""
    shape = (batch, HEADS, 6, D)
    split(lambda q, k, v, key, val: SDPA(q, key, val), values(*shape), values(*shape), batch=batch)


def test_causal_over_keys_that_are_not_cut_is_done_whole():
    shape = (1, HEADS, 6, D)
    split(lambda q, k, v, key, val: SDPA(q, key, val, is_causal=True), values(*shape), values(*shape), unsplit=[str(CPU)])


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_two_queries_for_each_token(masked):
    """Heads that share their keys, as queries of one head: the second half's keys are not those behind the first half's queries."""

    def attend(q, k, v):
        q = q.transpose(1, 2).reshape(1, 12, 2, D).transpose(1, 2)
        mask = torch.arange(6)[None, :] <= torch.arange(12)[:, None]
        out = SDPA(q, k[:, :2], v[:, :2], attn_mask=mask if masked else None, is_causal=not masked)
        return out.transpose(1, 2).reshape(1, 6, HEADS, D).transpose(1, 2)

    split(attend, unsplit=[] if masked else [str(CPU)])


# --- masks -----------------------------------------------------------------------------------------------------------


def random_mask(*shape):
    return torch.where(torch.rand(shape) > 0.3, 0.0, float("-inf")).index_fill(-1, torch.tensor([0]), 0.0)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("batch, shape", [(1, (1, 1, 6, 6)), (1, (1, HEADS, 6, 6)), (1, (6, 6)), (1, (1, 1, 1, 6)), (4, (4, 1, 6, 6)),
                                          (4, (1, 1, 6, 6)), (4, (4, 1, 1, 6)), (4, (6, 6)), (6, (6, 6)),
                                          (6, (6, HEADS, 6, 6))])  # fmt: skip
def test_a_mask_is_cut_by_its_rows_or_by_its_batch(batch, shape, kind):
    mask = random_mask(*shape)
    split(lambda q, k, v, m: SDPA(q, k, v, attn_mask=m), mask == 0 if kind == "bool" else mask, batch=batch)


def test_a_mask_computed_from_the_tokens_themselves():
    """Its columns are tokens as well as its rows."""
    split(lambda q, k, v: SDPA(q, k, v, attn_mask=q[:, :1, :, :1] + torch.zeros(6)))
    rewrite(
        functools.partial(block, attend=lambda q, k, v: SDPA(q, k, v, attn_mask=k[:, :1, :, 0].unsqueeze(2) + torch.zeros(6, 1))),
        values(1, 6, H), values(1, 6, H), values(H), mode="weave",
    ).check()  # fmt: skip


def position(tokens=6):
    index = torch.arange(tokens)
    return index[:, None], index[None, :]


CAUSAL = {
    "key <= query": lambda q, k: k <= q,
    "query >= key": lambda q, k: q >= k,
    "a window": lambda q, k: (k <= q) & (k > q - 3),
    "key < query + 1": lambda q, k: k < q + 1,
}
NOT_CAUSAL = {
    "one key ahead": lambda q, k: k <= q + 1,
    "later keys only": lambda q, k: k >= q,
    "a band on both sides": lambda q, k: (k - q).abs() <= 1,
    "causal or a prefix": lambda q, k: (k <= q) | (k < 4),
    "all": lambda q, k: k < q + 6,
    "flipped": lambda q, k: (k <= q).flip(0, 1),
    "transposed": lambda q, k: (k <= q).t(),
    "not causal": lambda q, k: ~(k <= q) | (k == 0),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("mask", CAUSAL)
def test_a_mask_that_holds_the_causal_one_spares_the_first_half_the_later_keys(mask, form):
    def attend(q, k, v):
        allowed = CAUSAL[mask](*position())[None, None].expand(1, 1, 6, 6)
        least = torch.finfo(torch.float32).min
        return SDPA(q, k, v, attn_mask=allowed if form == "bool" else torch.where(allowed, 0.0, least))

    assert keys_of_first_half(split(attend)) == 3


@pytest.mark.one_in(3)
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("mask", NOT_CAUSAL)
def test_any_other_mask_does_not(mask, form):
    def attend(q, k, v):
        allowed = NOT_CAUSAL[mask](*position())[None, None].expand(1, 1, 6, 6)
        return SDPA(q, k, v, attn_mask=allowed if form == "bool" else torch.where(allowed, 0.0, float("-inf")))

    assert keys_of_first_half(split(attend)) == 6


def test_a_mask_with_a_size_in_it():
    """Of a dynamic shape, which is a node of its own."""

    def attend(q, k, v):
        query, key = position(q.shape[2])
        return SDPA(q, k, v, attn_mask=(key + q.shape[2] <= query + q.shape[2])[None, None])

    split(attend, dynamic=True)


def test_a_mask_that_hides_softly_is_no_causal_mask():
    def attend(q, k, v):
        query, key = position()
        return SDPA(q, k, v, attn_mask=torch.where(key <= query, 0.0, -1.0)[None, None])

    assert keys_of_first_half(split(attend)) == 6


def test_a_causal_mask_whose_rows_are_shifted_is_no_causal_mask():
    def attend(q, k, v):
        query, key = position(12)
        return SDPA(q, k, v, attn_mask=(key <= query)[3:9, :6][None, None])

    assert keys_of_first_half(split(attend)) == 6


def test_a_causal_mask_of_which_every_other_row_is_taken_is_no_causal_mask():
    def attend(q, k, v):
        query, key = position(12)
        return SDPA(q, k, v, attn_mask=(key <= query)[::2, :6][None, None])

    assert keys_of_first_half(split(attend)) == 6


@pytest.mark.parametrize("at", [1, 2])
def test_a_mask_for_each_head_is_no_causal_mask(at):
    """As many heads as tokens, whose dimensions a causal mask has instead of the queries' or the keys'."""

    def attend(q, k, v):
        head, other = position(HEADS)
        return SDPA(q, k, v, attn_mask=(other <= head).unsqueeze(at)[None])

    split(attend, tokens=HEADS)


@pytest.mark.parametrize("least", [float("-inf"), torch.finfo(torch.float32).min], ids=["-inf", "finite"])
def test_a_query_from_which_all_keys_are_hidden(least):
    """As of padding on the left. Where what is added to hide a key is finite, it attends to all of them alike."""

    def attend(q, k, v, padding):
        query, key = position()
        return SDPA(q, k, v, attn_mask=torch.where((key <= query) & padding[None, :], 0.0, least)[None, None])

    new = split(attend, torch.tensor([False, False, False, True, True, True]))
    assert keys_of_first_half(new) == (3 if least == float("-inf") else 6)


# --- the ops of CUDA, by what they are documented to do ---------------------------------------------------------------


def attention(q, k, v, bias=None, causal=False, scale=None, bottom_right=False):
    """(result, log-sum-exp [B, heads, T]) in float64, by the definition."""
    dtype, tokens, keys = q.dtype, q.shape[2], k.shape[2]
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * (scale or 1 / math.sqrt(D))
    if bias is not None:
        scores = scores + bias.double()
    if causal:
        diagonal = 1 + (keys - tokens if bottom_right else 0)
        scores = scores.masked_fill(torch.ones(tokens, keys).triu(diagonal).bool(), float("-inf"))
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.repeat_interleave(groups, 1)).to(dtype), lse.float()


def flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    return (*attention(q, k, v, None, causal, scale, bottom_right=True), *[None] * 7)


def efficient(q, k, v, bias, compute_lse, dropout=0.0, causal=False, *, scale=None):
    out, lse = attention(q, k, v, bias, causal, scale)
    assert not causal or q.shape[2] == k.shape[2], "aligned to the top left: not what a second half needs"
    padded = F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf")) if compute_lse else lse.new_full((*lse.shape[:2], 0), 0)
    return out, padded, None, None


def cudnn(q, k, v, bias, compute_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    out, lse = attention(q, k, v, bias, causal, scale)
    assert not causal or q.shape[2] == k.shape[2]
    return (out, lse[..., None] if compute_lse else None, *[None] * 7)


CUDA_OPS = {
    aten._scaled_dot_product_flash_attention.default: (flash, lambda causal, mask: (0.0, causal)),
    aten._scaled_dot_product_efficient_attention.default: (efficient, lambda causal, mask: (mask, False, 0.0, causal)),
    aten._scaled_dot_product_cudnn_attention.default: (cudnn, lambda causal, mask: (mask, False, 0.0, causal)),
}


def with_op(graph, op):
    """The graph with the CPU's attention replaced by another op."""
    mode = detect_fake_mode([n.meta["val"] for n in graph.nodes if n.op == "placeholder"])
    for node in graph.find_nodes(op="call_function", target=CPU):
        mask, causal = node.kwargs.get("attn_mask"), len(node.args) > 4 and node.args[4]
        node.target, node.args = op, (*node.args[:3], *CUDA_OPS[op][1](causal, mask))
        node.kwargs = {"scale": 0.3}
        with mode:
            node.meta["val"] = op(*(a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args), **node.kwargs)
    return graph, mode


@pytest.mark.one_in(5)
@pytest.mark.parametrize("op", CUDA_OPS, ids=lambda op: op._schema.name.split("_product_")[1])
@pytest.mark.parametrize("use", ["causal", "all keys", "masked"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_an_op_of_cuda(op, use, dynamic):
    if use == "masked" and "flash" in op._schema.name:
        pytest.skip("takes no mask")
    mask = [random_mask(1, 1, 40, 40)] if use == "masked" else []
    attend = lambda q, k, v, *m: SDPA(q, k, v, attn_mask=m[0] if m else None, is_causal=use == "causal")  # noqa: E731
    inputs = values(1, 40, H), values(1, 40, H), values(H), *mask
    graph, arguments = capture_with_inputs(functools.partial(block, attend=attend), *inputs, dynamic=dynamic)
    graph, mode = with_op(graph, op)
    with V.set_fake_mode(mode):
        options = Options(mode="weave")
        new = passes.rewrite(graph, options, lambda *_: False, lambda sites: passes.choose_cut(sites, options))
    after = new.graph
    assert not new.report.joins
    emulated = {op: CUDA_OPS[op][0]}
    torch.testing.assert_close(run(after, arguments, emulated=emulated), run(graph, arguments, emulated=emulated), rtol=1e-4, atol=1e-5)
