"""The forms of a layer that models have besides the plain one, each woven in a block of two sublayers and run."""

import pytest
import torch
import torch.nn.functional as F
from graphs import rewrite
from sites import H, all_reduce, hf_norm, values
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from workspace import Workspace

from tw_compile import ops

pytestmark = pytest.mark.usefixtures("world")

aten = torch.ops.aten
HEADS = 4


def check(layer, *inputs, batch=1, tokens=8, sites=3, unsplit=(), dynamic=False):
    """layer(x, weight, *inputs) -> x, twice, then a norm; without a woven half or with one left whole the test fails."""

    def block(x, weight, *inputs):
        x = all_reduce(x)
        for _ in range(2):
            x = layer(x, weight, *inputs)
        return hf_norm(x, weight)

    new = rewrite(block, values(batch, tokens, H), values(H), *inputs, mode="weave", dynamic=dynamic, symmetric=True)
    assert len(new.report.sites) == sites and all(site.woven for site in new.report.sites)
    assert [each.op for each in new.report.joins] == list(unsplit)
    new.check(Workspace())
    return new


def test_two_consumers_of_the_norm():
    check(lambda x, w: x + all_reduce(hf_norm(x, w).relu() + hf_norm(x, w).sigmoid() * hf_norm(x, w).mean(-1, keepdim=True)))


def test_a_factor_on_the_branch():
    check(lambda x, w: x + 0.22 * all_reduce(hf_norm(x, w).relu()))


def test_a_factor_on_the_residual():
    check(lambda x, w: x * 0.7 + all_reduce(hf_norm(x, w).relu()))


def test_sandwich_norms():
    """All-reduce, norm, add; then the next norm reads a sum that no all-reduce is a part of."""
    new = check(lambda x, w: x + hf_norm(all_reduce(hf_norm(x, w).relu()), w))
    assert [site.residual for site in new.report.sites] == [False] * 3


def test_post_norm():
    check(lambda x, w: hf_norm(x + all_reduce(x.relu()), w), sites=2)


def test_dropout_in_inference():
    check(lambda x, w: x + F.dropout(all_reduce(F.dropout(hf_norm(x, w), 0.5, training=False)), 0.5, training=False))


def test_tied_embeddings():
    """The table of the tokens is the output layer too."""

    def model(ids, table, weight):
        x = all_reduce(F.embedding(ids, table))
        x = x + all_reduce(hf_norm(x, weight).relu())
        return hf_norm(x, weight) @ table.t()

    ids = torch.randint(0, 32, (1, 8))
    new = rewrite(model, ids, values(32, H), values(H), mode="weave", symmetric=True)
    assert len(new.report.sites) == 2 and not new.report.joins
    new.check(Workspace())


def quantised(normed, wide):
    """Per token, to 8-bit integers or floats, and back after the product; in a chain of its own behind the norm."""
    dtype, largest = wide
    scale = normed.abs().amax(-1, keepdim=True).clamp(min=1e-6) / largest
    codes = (normed / scale).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


@pytest.mark.parametrize("wide", [(torch.int8, 127.0), (torch.float8_e4m3fn, 448.0)], ids=["int8", "fp8"])
def test_a_norm_that_is_quantised(wide):
    """The chain behind the norm is left as it is, of halves."""

    def layer(x, weight):
        codes, scale = quantised(hf_norm(x, weight), wide)
        return x + all_reduce(codes.float() * scale)

    new = check(layer)
    casts = [n for n in new.after.nodes if n.target is torch.ops.prims.convert_element_type.default and n.args[1] == wide[0]]
    assert len(casts) == 4 and {n.meta["half"] for n in casts} == {0, 1}
    assert new.count(ops.start) == 6


# --- attention -------------------------------------------------------------------------------------------------------


def attention(attend):
    def layer(x, weight, *inputs):
        batch, tokens = x.shape[:2]
        q, k, v = ((hf_norm(x, weight) * f).view(batch, tokens, HEADS, -1).transpose(1, 2) for f in (1.0, 1.5, 2.0))
        return x + all_reduce(attend(q, k, v, *inputs).transpose(1, 2).reshape(batch, tokens, H))

    return layer


def causal(q, k):
    return torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 2])
def test_math_attention(batch, dynamic):
    """The backend that decomposes into matrix products."""

    def attend(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    check(attention(attend), batch=batch, dynamic=dynamic)


def test_capped_scores():
    """Gemma 2's, written out."""

    def attend(q, k, v):
        scores = torch.tanh(q @ k.transpose(-1, -2) / 50) * 50
        return scores.masked_fill(~causal(q, k), float("-inf")).softmax(-1) @ v

    check(attention(attend))


@pytest.mark.parametrize("batch", [1, 2])
def test_scores_with_a_bias(batch):
    """ALiBi, as BLOOM adds it."""

    def attend(q, k, v, slopes):
        bias = slopes.repeat(q.shape[0], 1, 1) * torch.arange(k.shape[2])
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=0.5).view(*q.shape[:3], -1)
        return scores.masked_fill(~causal(q, k), float("-inf")).softmax(-1) @ v

    check(attention(attend), values(HEADS, 1, 1), batch=batch)


def test_a_sliding_window():
    def attend(q, k, v):
        near = causal(q, k) & (torch.arange(k.shape[2])[None, :] > torch.arange(q.shape[2])[:, None] - 3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near)

    check(attention(attend))


@pytest.mark.parametrize("batch", [1, 2])
def test_keys_of_a_cache_in_front(batch):
    """More keys than queries: a prompt in parts, or one that continues a conversation."""

    def attend(q, k, v, old):
        k, v = torch.cat((old, k), 2), torch.cat((old, v), 2)
        seen = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None] + old.shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    check(attention(attend), values(batch, HEADS, 5, H // HEADS), batch=batch)


def test_flex_attention_is_done_whole():
    """Its mask is a program of absolute positions, and its blocks are of the whole."""

    def attend(q, k, v):
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 8, 8, device="cpu")
        return flex_attention(q, k, v, block_mask=mask)

    check(attention(attend), unsplit=["flex_attention"] * 2)
