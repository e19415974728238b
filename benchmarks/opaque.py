"""A Llama as a serving engine has it: packed tokens [T, H], and paged attention that is opaque to the compiler.

It stands for vLLM where vLLM cannot be installed: its ops have the schemas of ``vllm.unified_kv_cache_update`` and
``vllm.unified_attention_with_output``, find their cache and their metadata by the name of the layer, and run PyTorch's attention. As in
vLLM 0.32, the name is an opaque object, which the graph takes as an input.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
from torch._opaque_base import OpaqueBase
from torch.nn.attention.bias import causal_lower_right

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import llama

from tw_compile.passes.rules.paged import Engine, register_engine


class LayerName(OpaqueBase):
    """The name of a layer, of the form of vLLM's class."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, LayerName) and self.value == other.value

    def __hash__(self):
        return hash(self.value)

    def __fx_repr__(self):
        return f"LayerName({self.value!r})", {"LayerName": LayerName}


register_opaque_type(LayerName, typ="value", hoist=True)
NAME = get_opaque_type_name(LayerName)
library, halves = torch.library.Library("opaque", "DEF"), torch.library.Library("opaque_halves", "DEF")
library.define(f"update(Tensor key, Tensor value, {NAME} layer_name) -> Tensor")
tensors = "Tensor query, Tensor key, Tensor value, Tensor(a!) output"
library.define(f"attend({tensors}, {NAME} layer_name, Tensor? kv_cache_dummy_dep=None) -> ()")


class State:
    """What an engine keeps beside the graph.

    caches:   name of a layer -> keys and values [2, slots, heads, head size]
    requests: (tokens in the cache, new tokens) of each request of this step; None for one request of as many tokens as the graph is given
    half:     (0 or 1, number of tokens in the first half) while the ops work on a half; None while they work on all tokens
    refused:  why attention is not to be cut; '' if it may be
    """

    def __init__(self):
        self.caches, self.requests, self.half, self.refused = {}, None, None, ""

    def step(self, rows):
        """(first row, end, first slot, position of the first row) of each request with rows among those of this call."""
        half, first = self.half or (0, 0)
        low, high = (first, first + rows) if half else (0, rows)
        begin, found = 0, []
        for number, (old, new) in enumerate(self.requests or [(0, high)]):
            start, end = max(begin, low), min(begin + new, high)
            if start < end:
                found.append((start - low, end - low, number * self.capacity, old + start - begin))
            begin += new
        return found

    @property
    def capacity(self):
        """Slots of a request."""
        return next(iter(self.caches.values())).shape[1] // len(self.requests or [1])

    @contextlib.contextmanager
    def halved(self, half, first):
        self.half = half, first
        yield
        self.half = None


state = State()


def _update(key, value, layer_name):
    cache = state.caches[layer_name.value]
    for start, end, slot, position in state.step(len(key)):
        for cached, new in zip(cache, (key, value)):
            cached[slot + position : slot + position + end - start] = new[start:end]
    return key.new_empty(0)


def _attend(query, key, value, output, layer_name, kv_cache_dummy_dep=None):
    for start, end, slot, position in state.step(len(query)):
        length = position + end - start
        keys, values = (cached[slot : slot + length].transpose(0, 1)[None] for cached in state.caches[layer_name.value])
        queries = query[start:end].transpose(0, 1)[None]
        bias = causal_lower_right(end - start, length)
        output[start:end] = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=True)[0].transpose(0, 1)


library.impl("update", _update, "CompositeExplicitAutograd")
library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("opaque::update", lambda key, value, layer_name: key.new_empty(0), lib=library)
torch.library.register_fake("opaque::attend", lambda *args, **kwargs: None, lib=library)
ops = torch.ops.opaque
register_engine(Engine(ops.update.default, ops.attend.default, lambda layer: state.refused, state.halved, NAME), halves)


class Attention(llama.Attention):
    """x [T, hidden] -> [T, hidden]. The layer has a name, under which the engine has its cache."""

    def forward(self, x, cos, sin):
        query, key, value = (proj(x).view(len(x), -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = (llama.rotate(t, cos[:, None], sin[:, None]) for t in (query, key))
        output = torch.empty_like(query)
        name = LayerName(self.name)
        written = ops.update(key, value, name)
        ops.attend(query, key, value, output, name, kv_cache_dummy_dep=written)
        return self.o_proj(output.view(len(x), -1))


class Llama(llama.Llama):
    """ids [1, T], positions [T] or None for one request -> what llama.Llama returns, with a batch of one."""

    def __init__(self, config, tp=None):
        super().__init__(config, tp)
        for number, layer in enumerate(self.layers):
            layer.self_attn.__class__, layer.self_attn.name = Attention, f"model.layers.{number}.self_attn.attn"

    def forward(self, ids, positions=None):
        x = self.embed_tokens(ids[0])
        positions = torch.arange(len(x), device=x.device) if positions is None else positions
        angles = positions[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        hidden = self.norm(x)
        logits = self.lm_head(hidden[-1:])
        return hidden[None], logits if self.tp is None else llama.all_gather(logits, 1, self.tp)


def allocate(model, config, slots, requests=None):
    """Give the layers of a model caches of so many slots, which the requests of a step share evenly."""
    weight, ranks = model.norm.weight, llama.ranks_of(model.tp)
    shape = 2, slots, config.kv_heads // ranks, config.head_dim
    state.caches = {layer.self_attn.name: torch.zeros(shape, dtype=weight.dtype, device=weight.device) for layer in model.layers}
    state.requests = requests
