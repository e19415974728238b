"""Experts that each get a copy of all tokens, as Llama 4's: each half has the copies of its own tokens."""

import pytest
import torch
from graphs import rewrite, run
from sites import H, all_reduce, hf_norm, values

pytestmark = pytest.mark.usefixtures("world")

E = 3


def layer(between):
    def block(x, r, w, up):
        h = hf_norm(all_reduce(x) + r, w)
        out = between(h, up, torch.softmax(h[..., :E], -1))
        return hf_norm(all_reduce(out.view(h.shape)) + h, w), out

    return block


def llama4(x, up, scores):
    x = x.reshape(-1, H)
    rows = x.repeat(E, 1) * scores.reshape(-1, E).transpose(0, 1).reshape(-1, 1)
    rows = torch.bmm(rows.view(E, -1, H), up).sin().view(-1, H)
    return rows.view(E, -1, H).sum(0) + x


WAYS = {  # name -> (how, how many of the ops need all tokens)
    "Llama 4": (llama4, 0),
    "two of each": (lambda x, up, scores: (x.repeat(E, 2).sin().view(E, *x.shape[:-1], 2, H) * 0.5).sum(0)[..., 0, :], 0),
    "in another order": (lambda x, up, scores: x + x.repeat(E, 1).view(-1, E, H)[:, 0], 1),
    "summed": (lambda x, up, scores: x + x.repeat(E, 1).sin().sum(0), 1),
    "beside tokens": (lambda x, up, scores: x + (x.repeat(E, 1) * x.repeat_interleave(E, 0))[: len(x)], 1),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_copies_of_the_tokens_of_a_half(name, dynamic):
    between, whole = WAYS[name]
    first = values(10, H), values(10, H), values(H), values(E, H, H)
    new = rewrite(layer(between), *first, mode="weave", split=4, dynamic=dynamic)
    new.check()
    assert len(new.report.joins) == whole, new.report.joins
    if dynamic:
        inputs = [11, *values(11, H)[None], values(11, H), *new.inputs[3:]]
        torch.testing.assert_close(run(new.after, inputs), run(new.before, inputs), rtol=1e-4, atol=1e-4)


def test_a_batch_is_cut_between_sequences():
    new = rewrite(layer(llama4), values(3, 5, H), values(3, 5, H), values(H), values(E, H, H), mode="weave")
    new.check()
    assert not new.report.joins


def test_tokens_that_become_sequences_are_no_copies():
    """The cut of all tokens may be inside of a sequence, so that a half has no whole number of them."""

    def block(x, r, w):
        tokens = r.view(-1, H) + all_reduce(x)
        sequences = hf_norm(tokens.view(2, 12, H), w)
        return hf_norm(tokens + all_reduce(sequences.cumsum(1).view(-1, H)), w)

    new = rewrite(block, values(24, H), values(2, 12, H), values(H), mode="weave")
    new.check()
    assert {join.reason for join in new.report.joins if "reshape" in join.op} == {"its token-axis rule does not cover this use"}
