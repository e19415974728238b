"""Halves of the metadata of vLLM's attention backends, without their kernels: ``make test-vllm``. Elsewhere the tests skip themselves."""

import dataclasses
import importlib
import importlib.util
import itertools
from types import SimpleNamespace

import pytest
import torch

from tw_compile.options import TokenWeaveError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM, which make test-vllm installs"),
]
BLOCK, HEAD = 4, 8
# Name in BACKENDS -> module and class of the backend.
PLACES = {
    "CPU_ATTN": "cpu_attn.CPUAttentionBackend",
    "FLASH_ATTN": "flash_attn.FlashAttentionBackend",
    "TRITON_ATTN": "triton_attn.TritonAttentionBackend",
}
# (tokens in the cache, new tokens) of each request of a step
STEPS = [(0, 5), (9, 1), (4, 7), (0, 1), (13, 3)], [(0, 6)], [(3, 1), (7, 1), (1, 1)]


def backend_of(name):
    module, backend = PLACES[name].split(".")
    return getattr(importlib.import_module(f"vllm.v1.attention.backends.{module}"), backend)


def metadata_of(name, requests, padding=0):
    """The metadata of a step, with as many rows of padding behind its tokens."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata
    from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

    new, lengths = [new for _, new in requests], torch.tensor([old + new for old, new in requests], dtype=torch.int32)
    most = (int(lengths.max()) + BLOCK - 1) // BLOCK
    table = torch.randperm(len(requests) * most, generator=torch.Generator().manual_seed(0)).view(len(requests), most)
    slots = [table[i, p // BLOCK] * BLOCK + p % BLOCK for i, (old, n) in enumerate(requests) for p in range(old, old + n)]
    common = dict(
        num_actual_tokens=sum(new), max_query_len=max(new), query_start_loc=torch.tensor([0, *new]).cumsum(0).to(torch.int32),
        max_seq_len=int(lengths.max()), seq_lens=lengths, block_table=table, slot_mapping=torch.tensor(slots + [-1] * padding), causal=True,
    )  # fmt: skip
    scratch = dict.fromkeys(("seq_threshold_3D", "num_par_softmax_segments"), 1)
    scratch |= dict.fromkeys(("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"), torch.empty(0))
    return {
        "CPU_ATTN": lambda: CPUAttentionMetadata(**common, scheduler_metadata=None),
        "FLASH_ATTN": lambda: FlashAttentionMetadata(**common, scheduler_metadata=torch.empty(1), max_num_splits=4),
        "TRITON_ATTN": lambda: TritonAttentionMetadata(**common, **scratch),
    }[name]()


def paged(metadata, cache, query, key, value, window):
    """What metadata mean, for one head in float64: write the keys and values, then attend up to each token, ``window`` keys at most."""
    keys, values = cache
    count = metadata.num_actual_tokens
    keys[metadata.slot_mapping[:count]], values[metadata.slot_mapping[:count]] = key[:count], value[:count]
    output = torch.zeros_like(query)
    starts = metadata.query_start_loc.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        length = int(metadata.seq_lens[i])
        for row in range(begin, end):
            last = length - end + row
            at = torch.arange(max(0, last + 1 - window), last + 1)
            slots = metadata.block_table[i, at // BLOCK] * BLOCK + at % BLOCK
            output[row] = (keys[slots] @ query[row] / HEAD**0.5).softmax(0) @ values[slots]
    return output


def layer_of(name):
    impl = SimpleNamespace(sliding_window=-1, num_heads=1, num_kv_heads=1, head_size=32, kv_cache_dtype="auto")
    return SimpleNamespace(attn_backend=backend_of(name), impl=impl, dtype=torch.float32, isa="vec", attn_type="decoder")


@pytest.mark.parametrize("name", PLACES)
def test_every_field_is_known(name):
    from tw_compile.integrations.vllm import attention

    known = attention.BACKENDS[name]
    assert attention._fields_of(backend_of(name).get_builder_cls()) - attention.COMMON - known.kept - known.unused == set()


@pytest.mark.parametrize("name", PLACES)
def test_halves_attend_as_the_whole(name):
    """Wherever a step is cut, also inside a request or in its padding."""
    from tw_compile.integrations.vllm import attention

    layer, cuts = layer_of(name), 0
    for requests in STEPS:
        for padding in (0, 3):
            whole = metadata_of(name, requests, padding)
            rows = len(whole.slot_mapping)
            torch.manual_seed(0)
            query, key, value = torch.randn(3, rows, HEAD, dtype=torch.float64)
            before = torch.randn(2, whole.block_table.numel() * BLOCK, HEAD, dtype=torch.float64)
            for window in (3, 1000):
                cache = before.clone()
                right = paged(whole, cache, query, key, value, window)
                for first in range(1, rows):
                    cut, got = before.clone(), []
                    for half, part in enumerate((slice(first), slice(first, None))):
                        metadata = attention._metadata_of(whole, [layer], half, first)
                        mine = query[part], key[part], value[part]
                        # Without metadata, vLLM's layers compute nothing.
                        got.append(paged(metadata, cut, *mine, window) if metadata is not None else torch.zeros_like(mine[0]))
                    assert torch.equal(torch.cat(got), right) and torch.equal(cut, cache), (requests, padding, window, first)
                    cuts += 1
    assert cuts == 2 * (2 * (16 + 5 + 2) + 3 * 3)


def test_only_metadata_of_layers_that_are_cut_are_made_once_for_a_step(monkeypatch):
    """Cross-attention has metadata that cannot be cut, and runs on all tokens."""
    from vllm import forward_context

    from tw_compile.integrations.vllm import attention

    layer, shared = layer_of("TRITON_ATTN"), metadata_of("TRITON_ATTN", STEPS[0])
    across = dataclasses.replace(shared, causal=False)
    metadata = {"first": shared, "across": across, "last": shared}
    slots = dict.fromkeys(metadata, shared.slot_mapping)
    step = forward_context.ForwardContext(no_compile_layers=dict.fromkeys(metadata, layer), attn_metadata=metadata, slot_mapping=slots)
    monkeypatch.setattr(forward_context, "_forward_context", step)
    found = []
    for _ in range(2):
        with attention.halved(1, 4):
            half = forward_context.get_forward_context()
            found += [half.attn_metadata[name] for name in ("first", "last")]
            assert len(half.slot_mapping["last"]) == 17 - 4
    assert found[0].num_actual_tokens == 17 - 4 and all(each is found[0] for each in found)
    with attention.halved(1, 4), pytest.raises(TokenWeaveError, match="it is not causal"):
        forward_context.get_forward_context().attn_metadata["across"]


def test_schedules_of_the_whole_are_dropped():
    from tw_compile.integrations.vllm import attention

    half = attention._metadata_of(metadata_of("FLASH_ATTN", STEPS[0]), [layer_of("FLASH_ATTN")], 0, 4)
    assert half.scheduler_metadata is None and half.max_num_splits == 4


@pytest.mark.parametrize(
    "changes, reason", [({"causal": False}, "it is not causal"), ({"rswa_window": 4}, "its metadata has rswa_window")]
)
def test_a_step_that_cannot_be_cut_is_an_error(changes, reason):
    from tw_compile.integrations.vllm import attention

    whole = dataclasses.replace(metadata_of("TRITON_ATTN", STEPS[0]), **changes)
    with pytest.raises(TokenWeaveError, match=f"attention of this step cannot be cut: {reason}"):
        attention._metadata_of(whole, [layer_of("TRITON_ATTN")], 0, 4)


def reason(monkeypatch, backend, **changes):
    """Why attention of a layer with this backend is not cut."""
    from vllm import forward_context

    from tw_compile.integrations.vllm import attention

    layer = SimpleNamespace(attn_backend=backend, attn_type="decoder", impl=None, use_mm_prefix=False)
    vars(layer).update(changes)
    monkeypatch.setattr(forward_context, "_forward_context", SimpleNamespace(no_compile_layers={"layer": layer}))
    return attention.why_not("layer")


def test_what_runs_whole(monkeypatch):
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend
    from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend

    known = backend_of("TRITON_ATTN")
    assert reason(monkeypatch, known) == ""
    assert reason(monkeypatch, create_chunked_local_attention_backend(known, 8)) == ""
    shared = create_fast_prefill_custom_backend("FastPrefill", known)
    assert reason(monkeypatch, shared) == "how FastPrefillAttentionBuilder changes the metadata of TRITON_ATTN is not known"
    assert reason(monkeypatch, known, attn_type="encoder_only").startswith("attention of type encoder_only is not causal")
    assert "bidirectional prefix cannot be cut" in reason(monkeypatch, known, use_mm_prefix=True)
    named = lambda name: SimpleNamespace(get_name=lambda: name)  # noqa: E731
    assert reason(monkeypatch, named("FLASHINFER")).startswith("FlashInfer plans attention on the host")
    assert reason(monkeypatch, named("OTHER")).startswith("the metadata of the attention backend OTHER cannot be cut: only those of CPU_")
