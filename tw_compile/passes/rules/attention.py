"""Token-axis rules of scaled-dot-product attention, and how the second half of a causal one is computed.

Cut between sequences, each half is the same call on fewer sequences. Cut within a sequence, the first half's queries of a
causal attention see only the first half's keys: the same call again. The second half's see all keys. With a materialised
mask each half takes its rows of it. With ``is_causal`` the second half needs it aligned to the bottom right; where an op
cannot say that, the result is merged exactly from two that it can: over the first half's keys, without a mask, and over its
own, causal,

    out = (out_a · exp(lse_a) + out_b · exp(lse_b)) / (exp(lse_a) + exp(lse_b))

with lse the log of the sum of exponentials of the scores that each op returns beside its result.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..emit import size_of
from ..graph_utils import aten, is_one, prims, value
from .cache import first_key
from .mask import hides_later_keys
from .token_axis import Split, TokenAxis, register_token_rule

_FLASH = aten._scaled_dot_product_flash_attention.default
_EFFICIENT = aten._scaled_dot_product_efficient_attention.default
_CUDNN = aten._scaled_dot_product_cudnn_attention.default
_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class _Signature:
    """Where an SDPA op takes what; all take query, key, value first. A name stands for a keyword, None for no such argument."""

    is_causal: int
    mask: int | str | None
    lse: int | None = None  # the flag that asks for the log-sum-exp, where it is not always returned
    bottom_right: bool = False  # is_causal with fewer queries than keys aligns to the bottom right


SIGNATURES = {
    _FLASH: _Signature(is_causal=4, mask=None, bottom_right=True),
    _EFFICIENT: _Signature(is_causal=6, mask=3, lse=4),
    _CUDNN: _Signature(is_causal=6, mask=3, lse=4),
    _CPU: _Signature(is_causal=4, mask="attn_mask"),
}


def _argument(node: Node, at, default=None):
    if at is None:
        return default
    if isinstance(at, str):
        return node.kwargs.get(at, default)
    return node.args[at] if len(node.args) > at else default


def is_causal(node: Node) -> bool:
    return bool(_argument(node, SIGNATURES[node.target].is_causal, False))


def attention_mask(node: Node) -> Node | None:
    return _argument(node, SIGNATURES[node.target].mask)


@register_token_rule(*SIGNATURES)
def _attention(node, axes):
    """query, key, value: [B, heads, T, D]. Only the result itself may be used, not the log-sum-exp or the random state."""
    query, key, val = node.args[:3]
    mask = attention_mask(node)
    if query not in axes or any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return None
    axis, outputs = axes[query], (axes[query],) * len(value(node))
    kv = [a for a in (key, val) if a in axes]
    of_mask = _axis_of_mask(mask, axis) if mask is not None else None
    if mask in axes and axes[mask] != of_mask:
        return None
    slices = {SIGNATURES[node.target].mask: of_mask} if of_mask is not None and mask not in axes else {}
    if axis.dim == 0:  # between sequences
        slices |= {i: axis for i, a in ((1, key), (2, val)) if a not in axes}
        return Split(outputs, slices=slices) if all(axes[a].dim == 0 for a in kv) else None
    if axis.dim != 2:
        return None
    if is_causal(node):
        # Both halves of all three, by ``second_half`` below; a mask on top of is_causal is not an op's choice to have.
        same = len(kv) == 2 and all(axes[a] == axis for a in kv)
        return Split(outputs) if same and mask is None else None
    return Split(outputs, whole=frozenset(i for i, a in ((1, key), (2, val)) if a in axes), slices=slices)


def _axis_of_mask(mask: Node, axis: TokenAxis) -> TokenAxis | None:
    """Where a mask [B, heads, T, keys], or only the last of these, has the queries' tokens; None where it is broadcast."""
    dim = axis.dim - (4 - value(mask).dim())
    return TokenAxis(dim, axis.unit) if dim >= 0 and not is_one(value(mask).shape[dim]) else None


def is_cut_causally(node: Node, axes, rows) -> bool:
    """Whether the first half's queries do not see the second half's keys, so that the two halves are different calls.

    rows: rows(keys or values) -> the Write that they are, or None
    """
    if node.target not in SIGNATURES or axes[node.args[0]].dim != 2:
        return False
    if is_causal(node):
        return True
    mask, writes = attention_mask(node), [rows(a) for a in node.args[1:3]]
    if mask is None or mask in axes or any(write is None or write.axis != axes[node.args[0]] for write in writes):
        return False
    first = first_key(*writes)
    return first is not None and hides_later_keys(mask, first)


def causal_halves(emit, node: Node, queries, keys, values) -> tuple[Node, Node]:
    """Both halves of the result (not the op's tuple) of an attention that ``is_causal``.

    emit: emit(half) -> a function (target, *args, **kwargs) -> Node
    queries, keys, values: the two halves of each, [B, heads, T, D]
    """
    first, second = emit(0), emit(1)
    whole = _attend(first, node, queries[0], keys[0], values[0], True)
    return first(operator.getitem, whole, 0), _bottom_right(second, node, queries[1], keys, values)


def masked_halves(emit, node: Node, queries, keys, values, mask_rows) -> tuple[Node, Node]:
    """The same of one whose mask hides the second half's keys from the first half.

    keys, values: those that the first half sees, which are the first of all keys, and all
    mask_rows: the rows of the mask of each half
    """
    first, second = emit(0), emit(1)
    seen = first(aten.slice.Tensor, mask_rows[0], value(mask_rows[0]).dim() - 1, 0, size_of(first, keys[0], 2))
    past = _attend(first, node, queries[0], keys[0], values[0], False, seen)
    rest = _attend(second, node, queries[1], keys[1], values[1], False, mask_rows[1])
    return first(operator.getitem, past, 0), second(operator.getitem, rest, 0)


def _attend(emit, node: Node, query, key, val, causal: bool, mask=None, lse: bool = False) -> Node:
    """The call of ``node`` on other tensors."""
    signature, kwargs = SIGNATURES[node.target], dict(node.kwargs)
    args = [query, key, val, *node.args[3:]]
    changes = [(signature.is_causal, causal), (signature.mask, mask)] + ([(signature.lse, True)] if lse else [])
    for position, new in changes:
        if isinstance(position, str):
            kwargs[position] = new
        elif position is not None:
            args += [_DEFAULTS[node.target][i] for i in range(len(args), position + 1)]
            args[position] = new
    return emit(node.target, *args, **kwargs)


def _bottom_right(emit, node: Node, query, keys, values) -> Node:
    """The second half's queries over the keys of both halves, causal and aligned to the bottom right."""
    if SIGNATURES[node.target].bottom_right:
        every = [emit(aten.cat.default, list(pair), 2) for pair in (keys, values)]
        return emit(operator.getitem, _attend(emit, node, query, *every, True), 0)

    past = _attend(emit, node, query, keys[0], values[0], False, lse=True)
    own = _attend(emit, node, query, keys[1], values[1], True, lse=True)
    out = [emit(operator.getitem, part, 0) for part in (past, own)]
    lse = [_as_rows(emit, emit(operator.getitem, part, 1), query) for part in (past, own)]
    # out_a + (out_b - out_a) · sigmoid(lse_b - lse_a) is the merge above, without overflow.
    share = emit(aten.sigmoid.default, emit(aten.sub.Tensor, lse[1], lse[0]))
    wide = [emit(prims.convert_element_type.default, o, torch.float32) for o in out]
    step = emit(aten.mul.Tensor, emit(aten.sub.Tensor, wide[1], wide[0]), share)
    merged = emit(aten.add.Tensor, wide[0], step)
    return emit(prims.convert_element_type.default, merged, value(out[0]).dtype)


# Arguments that a graph may leave out, by position.
_DEFAULTS = {
    _FLASH: (None, None, None, 0.0, False),
    _EFFICIENT: (None, None, None, None, False, 0.0, False),
    _CUDNN: (None, None, None, None, False, 0.0, False),
    _CPU: (None, None, None, 0.0, False),
}


def _as_rows(emit, lse: Node, query) -> Node:
    """The log-sum-exp as [B, heads, T, 1]: ops return it so, or without the last dimension, or padded along T."""
    if value(lse).dim() == 4:
        return lse
    rows = emit(aten.slice.Tensor, lse, 2, 0, size_of(emit, query, 2))
    return emit(aten.unsqueeze.default, rows, -1)
