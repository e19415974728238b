"""The attention metadata of one half of a step, made of that of the whole step.

A step has the tokens of several requests, one after the other. It is cut after ``first`` tokens, wherever that is: a request may have
tokens in both halves. The tensors with an entry for each request keep their lengths:

    query_start_loc  clamped to the half's tokens, and counted from its first one
    seq_lens         of the first half: without the keys of the tokens in the second half. Attention is causal, aligned to the bottom right
                     for each request, so that also a sliding window is where it was
    slot_mapping     the half's rows

They are made once for a step, from the first layer on that needs them, and kept in vLLM's forward context.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...options import TokenWeaveError

# Where a forward context keeps the contexts of its halves.
KEY = "tokenweave"

# Fields of metadata that every known class has.
COMMON = {"num_actual_tokens", "max_query_len", "query_start_loc", "max_seq_len", "seq_lens", "block_table", "slot_mapping", "causal"}


@dataclasses.dataclass(frozen=True)
class Backend:
    """What is known of a backend's metadata class.

    kept:   fields that are the same for both halves
    unused: fields that must not be set: with them, the metadata cannot be cut
    finish: (metadata of a half, a layer with this metadata, all layers with it) -> the metadata
    """

    kept: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    finish: Callable[[Any, Any, list], Any] = lambda metadata, layer, layers: metadata


def _plan_on_cpu(metadata: Any, layer: Any, layers: list) -> Any:
    """The CPU's kernels need a schedule of the half, and no requests without queries."""
    from vllm import _custom_ops, envs

    has_queries = metadata.query_start_loc.diff() > 0
    start = torch.cat([metadata.query_start_loc[:1], metadata.query_start_loc[1:][has_queries]])
    seq_lens = metadata.seq_lens[has_queries]
    windows = {other.impl.sliding_window for other in layers}
    window = windows.pop() if len(windows) == 1 else -1
    schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(seq_lens), num_heads=layer.impl.num_heads, num_kv_heads=layer.impl.num_kv_heads, head_dim=layer.impl.head_size,
        seq_lens=seq_lens, dtype=layer.dtype, query_start_loc=start, causal=True, sliding_window_size=window, isa=layer.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, kv_cache_dtype=layer.impl.kv_cache_dtype,
    )  # fmt: skip
    return dataclasses.replace(
        metadata, query_start_loc=start, seq_lens=seq_lens, block_table=metadata.block_table[has_queries], scheduler_metadata=schedule
    )


def _plan_in_kernel(metadata: Any, layer: Any, layers: list) -> Any:
    """FlashAttention's kernels plan themselves without a schedule.

    The most splits stay: CUDA graphs need a bound, and batch-invariant kernels have one split.
    """
    return dataclasses.replace(metadata, scheduler_metadata=None)


# Name of an attention backend -> what is known of it, by vLLM 0.32.
BACKENDS = {
    "CPU_ATTN": Backend(
        kept=frozenset({"scheduler_metadata", "use_sdpa_prefill", "num_decode_tokens"}),
        unused=frozenset({"dynamic_causal", "sdpa_attn_masks", "sdpa_start_loc", "encoder_cache"}),
        finish=_plan_on_cpu,
    ),
    "FLASH_ATTN": Backend(
        kept=frozenset({"scheduler_metadata", "max_num_splits", "num_decode_reqs", "num_prefill_reqs", "num_decode_tokens",
                        "num_prefill_tokens", "max_dcp_context_kv_len"}),
        unused=frozenset({"dcp_context_kv_lens", "mm_prefix_query_range_tensor", "rswa_prefix_lens", "rswa_window", "rswa_window_tensor"}),
        finish=_plan_in_kernel,
    ),
    "TRITON_ATTN": Backend(
        kept=frozenset({"seq_threshold_3D", "num_par_softmax_segments", "softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum",
                        "scheduler_metadata"}),
        unused=frozenset({"mm_prefix_range", "mm_prefix_range_tensor", "rswa_prefix_lens", "rswa_window"}),
    ),
}  # fmt: skip


# Builders that give another builder other requests. Chunked attention makes each chunk of a request a causal request.
SAME = {"ChunkedLocalAttentionBuilder"}

FLASHINFER = "FlashInfer plans attention on the host for the tokens of a whole step, before the model runs"


def why_not(name: str) -> str:
    """Why the attention of a layer cannot be cut; '' if it can be. The same on all ranks."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return "vLLM has no forward context while this graph is compiled"
    layer = get_forward_context().no_compile_layers.get(name)
    backend = getattr(layer, "attn_backend", None)
    if backend is None:
        return f"the layer {name} is not one of vLLM's attention layers"
    known = BACKENDS.get(backend.get_name())
    if backend.get_name() == "FLASHINFER":
        return FLASHINFER
    if known is None:
        return f"the metadata of the attention backend {backend.get_name()} cannot be cut: only those of {', '.join(BACKENDS)} are known"
    if layer.attn_type != "decoder":
        return f"attention of type {layer.attn_type} is not causal, so the first half needs keys of the second"
    if backend.forward_includes_kv_cache_update or getattr(layer.impl, "dcp_world_size", 1) > 1 or layer.use_mm_prefix:
        return "attention that updates the cache itself, with context parallelism or with a bidirectional prefix cannot be cut"
    builder = backend.get_builder_cls()
    if builder.__name__ in SAME:
        builder = builder.__base__
    if "__orig_bases__" not in vars(builder):  # it derives from a backend's builder, and changes what that makes
        return f"how {builder.__name__} changes the metadata of {backend.get_name()} is not known"
    if strange := sorted(_fields_of(builder) - COMMON - known.kept - known.unused):
        return f"this vLLM's metadata of {backend.get_name()} has fields that are not known: {', '.join(strange)}"
    return ""


def _fields_of(builder: Any) -> set[str]:
    """The names of the fields of the metadata that a backend's builder makes."""
    (built,) = (base.__args__[0] for base in builder.__orig_bases__ if getattr(base, "__args__", ()))
    return {field.name for field in dataclasses.fields(built)}


@contextlib.contextmanager
def halved(half: int, first: int) -> Iterator[None]:
    """A context in which vLLM's ops work on one half of the step. half: 0 or 1; first: the number of tokens in the first half"""
    from vllm.forward_context import get_forward_context, override_forward_context

    whole = get_forward_context()
    halves = whole.additional_kwargs.setdefault(KEY, {})
    if (half, first) not in halves:
        halves[half, first] = _half_of(whole, half, first)
    with override_forward_context(halves[half, first]):
        yield


def _half_of(whole: Any, half: int, first: int) -> Any:
    """The forward context of a half."""
    metadata = whole.attn_metadata[0] if isinstance(whole.attn_metadata, list) else whole.attn_metadata
    rows = slice(first, None) if half else slice(first)
    slots: dict[int, Any] = {}
    slot_mapping = {name: slots.setdefault(id(given), given[rows]) for name, given in (whole.slot_mapping or {}).items()}
    new = _OfHalf(metadata, whole.no_compile_layers, half, first) if metadata is not None else None
    return dataclasses.replace(whole, attn_metadata=new, slot_mapping=slot_mapping)


class _OfHalf(dict):
    """Name of a layer -> its metadata for a half, made when its attention asks for them.

    Layers that share metadata share those of the half. Layers that run on all tokens do not ask: theirs may be of a kind that cannot be
    cut, as those of attention to an encoder.
    """

    def __init__(self, whole: dict[str, Any], layers: dict[str, Any], half: int, first: int) -> None:
        self.whole, self.layers, self.half, self.first = whole, layers, half, first

    def __missing__(self, name: str) -> Any:
        given = self.whole[name]
        names = [other for other, metadata in self.whole.items() if metadata is given and other in self.layers]
        of_half = _metadata_of(given, [self.layers[other] for other in names], self.half, self.first)
        self.update(dict.fromkeys(names, of_half))
        return of_half


def _metadata_of(metadata: Any, layers: list, half: int, first: int) -> Any:
    """The metadata of a half for layers of a backend that is known."""
    if metadata is None:
        return None
    known = BACKENDS[layers[0].attn_backend.get_name()]
    if strange := sorted(name for name in known.unused if getattr(metadata, name, None) is not None):
        raise TokenWeaveError(f"attention of this step cannot be cut: its metadata has {', '.join(strange)}. {ADVICE}")
    if metadata.causal is not True:
        raise TokenWeaveError(f"attention of this step cannot be cut: it is not causal. {ADVICE}")
    end = metadata.num_actual_tokens
    at = min(first, end)
    low, high = ((0, at), (at, end))[half]
    if low == high:  # all tokens of this half are padding. Without metadata vLLM's layers compute nothing
        return None
    start = metadata.query_start_loc.clamp(low, high) - low
    seq_lens = metadata.seq_lens
    if half == 0:
        seq_lens = (seq_lens - (metadata.query_start_loc.diff() - start.diff())).clamp(min=0)
    rows = slice(first, None) if half else slice(first)
    new = dataclasses.replace(
        metadata, num_actual_tokens=high - low, query_start_loc=start, seq_lens=seq_lens, slot_mapping=metadata.slot_mapping[rows]
    )
    return known.finish(new, layers[0], layers)


ADVICE = "Set TW_COMPILE_MODE=fuse, and report it"
