"""Blocks drawn at random from the forms that models take, rewritten and run against the graph they came from.

Each runs over the workspace that makes NaN of all that the contract leaves undefined, and is compared with the graph that it
came from, in 16 bits with float64 too. Some blocks, of one sequence and static shapes, also go to ``tw_compile.verify``. The number of
ranks is not drawn: the passes do not see it, and test_ranks.py has two and four. ``TW_FUZZ=5000 pytest tests/test_fuzz.py`` draws that
many, the same ones every time. A block that fails is printed with the
command that runs it alone; what failed once is a test of its own, of the pass that was wrong.
"""

import os
import shlex
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from graphs import capture, rewrite, run, trace_with_inputs
from quantised import LINEARS
from sites import H, all_reduce
from workspace import Workspace

from tw_compile import TokenWeaveError, verify
from tw_compile.ops import lowering
from tw_compile.passes.graph_utils import c10d

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.usefixtures("world")

HEADS = 4


@dataclass(frozen=True)
class Layer:
    """One sublayer: what computes on the norm, and how its all-reduce goes on."""

    mix: str = "mlp"
    norm: str = "hf"
    residual_first: bool = True
    halved: bool = False
    bias: bool = False
    flat: bool = False  # the all-reduce is of [B·T, H]
    post_norm: bool = False  # norm, then add
    first: str = ""  # how the first weight is quantised, and with it the norm
    weights: str = ""  # how the last weight is quantised
    second_reader: str = ""  # what else reads the norm, the residual or the sum


@dataclass(frozen=True)
class Block:
    layers: tuple[Layer, ...] = (Layer(), Layer())
    times: int = 1  # that they come one after the other, each time with other weights
    batch: int = 1
    tokens: int = 6
    dynamic: bool = False
    mode: str = "auto"
    split: int | str = "auto"
    embedding: bool = False  # the first residual is an all-reduce's
    dtype: torch.dtype = torch.float32
    ends: str = "norm"

    def __call__(self, x, *weights):
        weights, escaped = iter(weights), []
        if self.embedding:
            x = all_reduce(x)
        for layer in self.layers * self.times:
            x = _layer(layer, x, weights, escaped)
        out = _norm("torch", x, next(weights), None)
        return {"norm": (out,), "both": (out, x), "last": (out[:, -1],)}[self.ends] + tuple(escaped)

    def inputs(self):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(self.dtype)  # noqa: E731
        weights = []
        for _ in self.layers * self.times:
            weights += [draw(H), draw(H), draw(3 * H, H) / H**0.5, draw(H, H) / H**0.5, draw(H)]
        return draw(self.batch, self.tokens, H), *weights, draw(H)


def _norm(form, x, weight, shift):
    if form == "layer":
        return F.layer_norm(x, (H,), weight, shift)
    if form == "layer, bare":
        return F.layer_norm(x, (H,))
    wide = x.float()
    if form == "layer, by hand":
        wide = wide - wide.mean(-1, keepdim=True)
        return weight * (wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) + shift
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    if form == "hf":
        return weight * wide.to(x.dtype)
    if form == "gemma":
        return (wide * (1.0 + weight.float())).to(x.dtype)
    if form == "bare":
        return wide.to(x.dtype)
    return (wide * weight).to(x.dtype)


def _layer(layer, x, weights, escaped):
    norm_weight, shift, wide, out, bias = (next(weights) for _ in range(5))
    h = x if layer.post_norm else _norm(layer.norm, x, norm_weight, shift)
    y = _mix(layer.mix, h, wide, partial(_linear, layer.first, h))
    y = _linear(layer.weights, y, out)
    if layer.flat:
        y = y.reshape(-1, H)
    y = all_reduce(y)
    if layer.second_reader == "sum":
        escaped.append(y * 2)
    if layer.flat:
        y = y.reshape(x.shape)
    if layer.bias:
        y = y + bias
    y = y * 0.5 if layer.halved else y
    if layer.post_norm:
        y = _norm(layer.norm, y, norm_weight, shift)
    r = x + y if layer.residual_first else y + x
    if layer.second_reader == "norm":
        escaped.append(h.sigmoid())
    if layer.second_reader == "residual":
        escaped.append(r + 1)
    if layer.second_reader == "tokens":
        r = r + h.mean(1, keepdim=True)
    return r


def _linear(quantised, x, weight):
    return LINEARS[quantised](x, weight) if quantised else x @ weight.t()


def _mix(mix, h, wide, project):
    batch, tokens, _ = h.shape
    if mix == "mlp":
        gate, up, down = project(wide).split(H, -1)
        return F.silu(gate) * up + down
    if mix == "squeezed":
        y = torch.squeeze(project(wide[:H])).unsqueeze(0)
        return torch.where(y > 0, y, y * 0.1).squeeze(0).reshape(h.shape)
    if mix == "views":  # rows of heads, and a value beside itself
        y = project(wide[:H]).view(-1, HEADS, H // HEADS)
        y = torch.cat((y, y.sin(), y), -1)[..., 2 : 2 + H // HEADS]
        return y.permute(1, 0, 2).expand(HEADS, -1, -1).transpose(0, 1).flatten(1).unflatten(0, (batch, tokens))
    if mix == "squares":
        return torch.bmm(h @ h.transpose(1, 2), h) / H
    if mix == "multiplied by itself":
        return torch.bmm(h, h) / H if tokens == H else h * h
    if mix == "one tensor":
        q = h.view(batch, tokens, HEADS, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(h.shape)
    if mix == "cumulative":  # over the tokens: cannot be cut
        return project(wide[:H]).cumsum(1)
    q, k, v = (z.view(batch, tokens, HEADS, -1).transpose(1, 2) for z in project(wide).chunk(3, -1))
    position = torch.arange(tokens)
    causal = position[None, :] <= position[:, None]
    if mix == "causal":
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif mix == "grouped":
        out = F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], is_causal=True, enable_gqa=True)
    elif mix == "masked":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal)
    elif mix == "window":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal & (position[:, None] - position[None, :] < 3))
    elif mix == "behind a cache":
        past = torch.full((batch, HEADS, 3, H // HEADS), 0.5, dtype=q.dtype)
        mask = torch.arange(tokens + 3)[None, :] <= position[:, None] + 3
        out = F.scaled_dot_product_attention(q, torch.cat((past, k), 2), torch.cat((past * 2, v), 2), attn_mask=mask)
    elif mix in ("static cache", "static cache, ahead"):
        caches = (torch.full((batch, HEADS, 24, H // HEADS), fill, dtype=q.dtype) for fill in (4.0, 9.0))
        k, v = (cache.index_copy(2, position + 2, new) for cache, new in zip(caches, (k, v)))
        mask = torch.arange(24)[None, :] <= position[:, None] + (2 if mix == "static cache" else 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    elif mix == "gathered":
        parts = c10d.wait_tensor(c10d.all_gather_into_tensor(project(wide[: H // 2]), 2, dist.group.WORLD.group_name))
        return torch.cat(parts.chunk(2), -1)
    elif mix == "full":
        out = F.scaled_dot_product_attention(q, k, v)
    else:  # written out, with a cap on the scores
        scores = torch.tanh(q @ k.transpose(-1, -2) / 4)
        out = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2).reshape(batch, tokens, H)


def check(block: Block):
    options = {"mode": block.mode, "split": block.split}
    if block.mode == "auto":
        options["min_tokens"] = 2
    try:
        rewritten = rewrite(block, *block.inputs(), dynamic=block.dynamic, symmetric=True, by=trace_with_inputs, **options)
    except TokenWeaveError as error:
        # A forced mode that cannot be had is an error: here, when every sum has a second reader, or no norm reads what it is a
        # part of.
        assert "none of its all-reduces can be fused" in str(error)
        layers = block.layers * block.times
        normed = [layer.post_norm or not after.post_norm for layer, after in zip(layers, (*layers[1:], Layer()))]
        assert not any(n and layer.second_reader not in ("sum", "tokens") for n, layer in zip(normed, layers))
        return
    check_outputs(block, rewritten)
    if (outlined := rewritten.outlined()).count(lowering.layer):
        check_outputs(block, outlined)
    if not block.dynamic and block.times == 1 and block.batch == 1 and not _is_quantised(block):
        found = verify(block, *block.inputs(), options={f"tokenweave.{name}": value for name, value in options.items()})
        assert found.ok and len(found.differences) == len(rewritten.report.sites), str(found)


def _is_quantised(block):
    return any(layer.first or layer.weights for layer in block.layers)


def check_outputs(block, rewritten):
    if _is_quantised(block):
        # Another order of sums may quantise a value to the neighbouring number. Rows of another token would be all wrong.
        for ours, theirs in zip(rewritten.outputs(Workspace()), rewritten.expected()):
            error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
            assert error < 0.1, error
        return
    if block.dtype == torch.float32:
        rewritten.check(Workspace())
        return
    # In 16 bits, roundings differ: no further from float64 than the graph that it came from, but for an ulp or so.
    inputs = [tensor.double() for tensor in block.inputs()]
    exact = run(*trace_with_inputs(block, *inputs))
    for ours, theirs, right in zip(rewritten.outputs(Workspace()), rewritten.expected(), exact):
        error, allowed = (((out.double() - right).norm() / right.norm()).item() for out in (ours, theirs))
        assert error <= 1.5 * allowed + 4 * torch.finfo(block.dtype).eps, (error, allowed)


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_what_is_traced_is_what_is_compiled(dynamic):
    """The graphs of the two ways to one have the same calls."""
    block = Block(tuple(Layer(mix=mix, bias=True) for mix in ("mlp", "causal", "static cache", "gathered")), 2, 5)

    def calls_of(graph):
        return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")

    # With PyTorch 2.11, Dynamo makes a size of the number of layers.
    with torch._dynamo.config.patch(specialize_int=True):
        by_dynamo = capture(block, *block.inputs(), dynamic=dynamic)
    traced, _ = trace_with_inputs(block, *block.inputs(), dynamic=dynamic)
    assert calls_of(traced) == calls_of(by_dynamo)


LAYERS = st.builds(
    Layer,
    mix=st.sampled_from(("mlp", "causal", "grouped", "masked", "window", "full", "written", "cumulative",
                         "behind a cache", "static cache", "static cache, ahead", "gathered",
                         "squeezed", "views", "squares", "multiplied by itself", "one tensor")),
    norm=st.sampled_from(("hf", "torch", "gemma", "bare", "layer", "layer, bare", "layer, by hand")),
    residual_first=st.booleans(),
    halved=st.booleans(),
    bias=st.booleans(),
    flat=st.booleans(),
    post_norm=st.sampled_from((False, False, True)),
    first=st.sampled_from(("", "", *LINEARS)),
    weights=st.sampled_from(("", "", *LINEARS)),
    second_reader=st.sampled_from(("", "", "", "norm", "residual", "sum", "tokens")),
)
BLOCKS = st.builds(
    Block,
    layers=st.lists(LAYERS, min_size=1, max_size=3).map(tuple),
    times=st.sampled_from((1, 1, 1, 4)),
    batch=st.sampled_from((1, 1, 2, 3)),
    tokens=st.sampled_from((2, 3, 4, 5, 6, 7, 8, 9, H)),
    dynamic=st.booleans(),
    mode=st.sampled_from(("auto", "auto", "fuse")),
    split=st.sampled_from(("auto", "auto", 1, 2)),
    embedding=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
    ends=st.sampled_from(("norm", "both", "last")),
)


@pytest.mark.timeout(0)
@settings(
    max_examples=int(os.environ.get("TW_FUZZ", "5")), deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck), print_blob=False,
    phases=[Phase.generate],  # to shrink what failed takes many minutes; it is printed whole
)  # fmt: skip
@given(BLOCKS)
def test_drawn_blocks(block):
    try:
        check(block)
    except BaseException:
        print(f"To run this block alone:\n    TW_FUZZ_BLOCK={shlex.quote(repr(block))} pytest tests/test_fuzz.py -k one_block")
        raise


@pytest.mark.skipif("TW_FUZZ_BLOCK" not in os.environ, reason="runs the block in TW_FUZZ_BLOCK")
def test_one_block():
    check(eval(os.environ["TW_FUZZ_BLOCK"]))
