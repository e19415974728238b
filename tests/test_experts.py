"""Experts that are cut: each half sorts its own rows, and every row is what it is in the whole."""

import pytest
import torch
from graphs import rewrite, run
from sites import INNER, H, all_reduce, hf_norm, values

from tw_compile.autotune import plan

moe = pytest.importorskip("transformers.integrations.moe", reason="these are transformers' experts")

pytestmark = pytest.mark.usefixtures("world")

E = INNER  # a size that is static
FORMS = {"grouped_mm": moe.grouped_mm_experts_forward, "batched_mm": moe.batched_mm_experts_forward}


class Experts:
    """What transformers' experts take from their layer. biases: as GPT-OSS has them"""

    num_experts, has_gate, has_post_expert_norm, is_transposed, _is_expert_parallel = E, True, False, True, False
    act_fn = staticmethod(torch.sin)

    def __init__(self, up, down, biases):
        self.gate_up_proj, self.down_proj, self.has_bias = up, down, len(biases) > 0
        self.gate_up_proj_bias, self.down_proj_bias = biases or (None, None)

    def _apply_gate(self, x):
        return moe._default_apply_gate(self, x)


def experts(form, x, choices, shares, up, down, biases):
    return FORMS[form](Experts(up, down, biases), x, choices, shares)


def given(tokens, dtype=torch.float64):
    return [
        values(tokens, H), values(tokens, H), values(H), values(tokens, E),
        *(values(*shape).to(dtype) for shape in ((E, H, 2 * H), (E, H, H), (E, 2 * H), (E, H))),
    ]  # fmt: skip


def layer(form, k, biases=True, between=experts):
    """A site, experts in float64, a site. What decides of a token's experts is given to the graph."""

    def block(x, r, w, routing, up, down, *bias):
        h = hf_norm(all_reduce(x) + r, w)
        shares, choices = (routing + h[:, :1] * 1e-30).topk(k)
        out = between(form, h.to(up.dtype), choices, shares.to(up.dtype), up, down, bias if biases else ())
        return hf_norm(all_reduce(out.float()) + h, w), out

    return block


ROUTINGS = {  # name -> [tokens, E] of which the largest are taken
    "random": lambda t: torch.rand(t, E),
    "all to one": lambda t: torch.rand(t, E) + 3 * torch.eye(E)[0],
    "ties": lambda t: torch.ones(t, E),
    "empty experts": lambda t: torch.rand(t, E) * (torch.arange(E) % 3 > 1),
    "by token": lambda t: torch.eye(E)[torch.arange(t) * E // t] + torch.rand(t, E) / 2,
}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """The rule cuts experts at any number of tokens."""
    monkeypatch.setattr(plan, "EXPERT_ROWS", 0)


def check(form, k, routings=ROUTINGS, sizes=(9, 16, 301), **how):
    torch.manual_seed(0)
    first = given(10)
    new = rewrite(layer(form, k, **how), *first, dynamic=True, mode="weave", split=7)
    order = [next((i for i, each in enumerate(first) if each is a), None) for a in new.inputs]  # None: a size
    for tokens in sizes:
        for name, routing in routings.items():
            inputs = given(tokens)
            inputs[3] = routing(tokens)
            inputs = [inputs[i] if i is not None else tokens if size == 10 else size for i, size in zip(order, new.inputs)]
            halves, whole = run(new.after, inputs), run(new.before, inputs)
            torch.testing.assert_close(halves, whole, rtol=1e-12, atol=1e-12, msg=lambda said: f"{name}: {said}")
    return new


@pytest.mark.one_in(5)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_routing(form, k):
    assert not [each.reason for each in check(form, k).report.joins]


def by_hand(put):
    """Experts as others write them, with GEMMs of all experts in place of grouped ones. put: puts rows in the order of the tokens"""

    def between(form, x, choices, shares, up, down, biases):
        k = choices.shape[1]
        keys, order = choices.view(-1).sort()
        rows = torch.einsum("sh,shi->si", x[order // k], up[keys]).sin()
        rows = torch.einsum("sh,shi->si", rows[:, :H], down[keys]) * shares.view(-1)[order].unsqueeze(-1)
        return put(rows, order, k, x)

    return between


PUT = {  # name -> (how rows are put back, why experts are not cut)
    "written": (lambda rows, order, k, x: torch.zeros_like(rows).index_put((order,), rows).view(-1, k, H).sum(1), ""),
    "by argsort": (lambda rows, order, k, x: rows[order.argsort()].view(-1, k, H).sum(1), ""),
    "by scatter": (
        lambda rows, order, k, x: rows[torch.empty_like(order).scatter(0, order, torch.arange(len(order)))].view(-1, k, H).sum(1), "",
    ),
    "index_add": (lambda rows, order, k, x: x.index_add(0, order // k, rows), ""),
    "scatter_add": (lambda rows, order, k, x: torch.zeros_like(x).scatter_add(0, (order // k)[:, None].expand(-1, H), rows), ""),
    "as they are": (lambda rows, order, k, x: rows.view(-1, k, H).sum(1), "not in the order of the tokens"),
    "after a running sum": (lambda rows, order, k, x: rows.cumsum(0)[order.argsort()].view(-1, k, H).sum(1), "does not cover"),
    "beside tokens": (lambda rows, order, k, x: (rows + x.repeat(k, 1))[order.argsort()].view(-1, k, H).sum(1), "not in the order"),
    "their places": (lambda rows, order, k, x: (rows * order[:, None])[order.argsort()].view(-1, k, H).sum(1), "not in the order of"),
    "in another order": (lambda rows, order, k, x: rows[order].view(-1, k, H).sum(1), "not in the order of"),
    "of one choice": (lambda rows, order, k, x: torch.zeros_like(x).index_put((order // k,), rows), "not in the order"),
}  # fmt: skip


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", PUT)
def test_ways_back_to_the_order_of_the_tokens(name):
    put, reason = PUT[name]
    new = check("", 2, {"random": ROUTINGS["random"], "ties": ROUTINGS["ties"]}, (13,), between=by_hand(put))
    sorts = [each for each in new.report.joins if each.op == "aten.sort.default"]
    assert [reason in each.reason for each in sorts] == [True] * bool(reason)


def test_counts_may_be_read_by_others():
    """The counts of all tokens are counted again; rows are cut."""
    counts = []

    def between(*args):
        counts.append(torch.histc(args[2].view(-1).float(), E, 0, E - 1))
        return experts(*args)

    def block(*args):
        return *layer("grouped_mm", 2, between=between)(*args), counts.pop()

    new = rewrite(block, *given(10), mode="weave", split=4)
    new.check()
    assert not [each for each in new.report.joins if each.op == "aten.sort.default"]


def test_keys_that_may_be_negative_are_not_cut():
    def between(form, x, choices, *others):
        return experts(form, x, choices - 1, *others)

    new = rewrite(layer("grouped_mm", 2, between=between), *given(10), mode="weave", split=4)
    assert any("may be negative numbers" in each.reason for each in new.report.joins), new.report.joins


def test_with_few_tokens_a_rule_keeps_experts_whole(monkeypatch):
    monkeypatch.undo()
    new = rewrite(layer("grouped_mm", 2), *given(10), mode="weave", split=4)
    new.check()
    reasons = {each.op: each.reason for each in new.report.joins}
    assert reasons.keys() == {"aten.sort.default", "aten.index.Tensor"}
    assert reasons["aten.sort.default"].startswith(f"with fewer than {206 * E} tokens: each half would wait for the weights of all experts")
