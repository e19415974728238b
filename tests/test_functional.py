"""Ops that write to their arguments, and opaque paged attention: a stand-in for a serving engine, with ops of the same form as vLLM's."""

import contextlib

import pytest
import torch
from graphs import rewrite
from sites import H, all_reduce, torch_norm

from tw_compile.ops import fused
from tw_compile.passes.graph_utils import arguments, value
from tw_compile.passes.plain import _DECOMPOSITIONS
from tw_compile.passes.rules import token_axis
from tw_compile.passes.rules.functional import rows
from tw_compile.passes.rules.paged import Engine, register_engine
from tw_compile.passes.rules.token_axis import register_token_rule

pytestmark = pytest.mark.usefixtures("world")

HEADS, T = 2, 11
library, halves = torch.library.Library("standin", "DEF"), torch.library.Library("standin_halves", "DEF")
library.define("silu_and_mul(Tensor! out, Tensor input) -> ()")
library.define("rotate(Tensor positions, Tensor! query, Tensor! key) -> ()")
library.define("update(Tensor key, Tensor value, str layer_name) -> Tensor")
library.define("attend(Tensor query, Tensor key, Tensor value, Tensor(a!) output, str layer_name, Tensor? kv_cache_dummy_dep=None) -> ()")
ops = torch.ops.standin

cache: dict[str, tuple] = {}
state = {"half": None, "first": 0, "refused": ""}


def silu_and_mul(out, x):
    a, b = x.chunk(2, -1)
    out.copy_(torch.nn.functional.silu(a) * b)


def rotate(positions, query, key):
    for x in (query, key):
        x.mul_(positions[:, None].to(x.dtype).cos())


def update(key, value, layer_name):
    """Rows of the second half come behind those of the first, which must be there."""
    past = cache[layer_name] if state["half"] == 1 else (key[:0], value[:0])
    assert state["half"] != 1 or len(past[0]) == state["first"]
    cache[layer_name] = tuple(torch.cat(pair) for pair in zip(past, (key, value)))
    return key.new_empty(0)


def attend(query, key, value, output, layer_name, kv_cache_dummy_dep=None):
    """A token attends to those up to itself."""
    first = state["first"] if state["half"] == 1 else 0
    keys, values = (x[: first + len(query)] for x in cache[layer_name])
    assert len(keys) == first + len(query)
    scores = torch.einsum("qhd,khd->hqk", query, keys)
    later = torch.arange(len(keys)) > torch.arange(len(query))[:, None] + first
    output.copy_(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), values))


for name, function in (("silu_and_mul", silu_and_mul), ("rotate", rotate), ("update", update), ("attend", attend)):
    library.impl(name, function, "CompositeExplicitAutograd")
torch.library.register_fake("standin::update", lambda key, value, layer_name: key.new_empty(0), lib=library)
for name in ("silu_and_mul", "rotate", "attend"):
    torch.library.register_fake(f"standin::{name}", lambda *args, **kwargs: None, lib=library)


@contextlib.contextmanager
def halved(half, first):
    state.update(half=half, first=first)
    yield
    state.update(half=None)


@pytest.fixture(autouse=True, scope="module")
def rules():
    before = dict(token_axis._RULES)
    register_token_rule(ops.silu_and_mul.default)(rows("out", "input"))
    register_token_rule(ops.rotate.default)(rows("positions", "query", "key"))
    register_engine(Engine(ops.update.default, ops.attend.default, lambda layer: state["refused"], halved), halves)
    yield
    token_axis._RULES.clear()
    token_axis._RULES.update(before)


def block(x, positions, qkv, up, down, weight):
    residual = all_reduce(x)
    x = torch_norm(residual, weight)
    packed = x @ qkv
    query, key, value = packed.split(H, -1)
    ops.rotate(positions, query, key)
    output = x.new_empty(x.shape[0], H)
    query, key, value = (t.view(-1, HEADS, H // HEADS) for t in (query, key, value))
    done = ops.update(key, value, "layer")
    ops.attend(query, key, value, output.view(-1, HEADS, H // HEADS), "layer", kv_cache_dummy_dep=done)
    residual = residual + all_reduce(output)
    x = torch_norm(residual, weight) @ up
    gated = x.new_empty(x.shape[0], H)
    ops.silu_and_mul(gated, x)
    residual = residual + all_reduce(gated @ down)
    return torch_norm(residual, weight)


def inputs():
    torch.manual_seed(0)
    shapes = (H, 3 * H), (H, 2 * H), (H, H), (H,)
    return torch.randn(T, H), torch.arange(T), *(torch.randn(shape) / H**0.5 for shape in shapes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_and_ops_that_write_are_cut(dynamic):
    new = rewrite(block, *inputs(), dynamic=dynamic, mode="weave", min_tokens=1)
    assert (len(new.report.sites), new.report.joins) == (3, [])
    new.check()


def test_attention_that_cannot_be_cut_runs_on_all_tokens():
    state["refused"] = "its backend is not known"
    try:
        new = rewrite(block, *inputs(), mode="weave", min_tokens=1)
    finally:
        state["refused"] = ""
    assert [(each.op, each.reason) for each in new.report.joins] == [
        ("standin.update.default", "its backend is not known"), ("standin.attend.default", "its backend is not known")
    ]  # fmt: skip
    new.check()


@pytest.mark.parametrize("last", [False, True])
def test_norm_behind_a_sum_in_float32(monkeypatch, last):
    """vLLM's form, in bfloat16: the residual is added in float32 and rounded afterwards, unless no layer reads it."""

    def model(x, residual, weight):
        total = all_reduce(x).float() + residual.float()
        norm = (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)).to(weight.dtype) * weight
        return norm if last else (norm, total.to(x.dtype))

    def dtype_of_residual():
        (site,) = [node for node in rewrite(model, *inputs).after.nodes if node.target is fused]
        return value(arguments(site)["residual"]).dtype

    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in ((T, H), (T, H), (H,))]
    assert dtype_of_residual() == torch.float32, "elsewhere the sum in float32 may be what the model means"
    monkeypatch.setitem(_DECOMPOSITIONS, torch.ops.aten.digamma.default, lambda emit, given: None)
    assert dtype_of_residual() == torch.bfloat16
