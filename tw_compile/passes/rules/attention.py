"""Token-axis rules of scaled-dot-product attention (SDPA), and the halves of a causal attention.

Between sequences, each half is the same call on fewer sequences. Within a sequence, the first half of a causal attention is the same call
on the first half's queries, keys and values. The queries of the second half attend to all keys. With a materialised mask, each half takes
its rows of the mask. With ``is_causal``, the second half needs a causal mask that is aligned to the bottom right. If an op does not have
that, two calls are merged exactly: a, over the first half's keys, without a mask; and b, over the second half's keys, with ``is_causal``:

    out = (out_a · exp(lse_a) + out_b · exp(lse_b)) / (exp(lse_a) + exp(lse_b))

lse is the log-sum-exp of the scores, which the ops return beside the result.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..emit import Emit, size_of
from ..graph_utils import aten, is_one, prims, value
from .cache import Write, first_key
from .mask import hides_later_keys
from .token_axis import Axes, Split, TokenAxis, register_token_rule

_FLASH = aten._scaled_dot_product_flash_attention.default
_EFFICIENT = aten._scaled_dot_product_efficient_attention.default
_CUDNN = aten._scaled_dot_product_cudnn_attention.default
_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class _Signature:
    """The places of arguments in calls of an SDPA op: a position, a keyword, or None if there is no such argument.

    All ops take query, key and value first.

    lse:          the flag for the log-sum-exp; None if the op always returns it
    bottom_right: is_causal with fewer queries than keys is aligned to the bottom right
    """

    is_causal: int
    mask: int | str | None
    lse: int | None = None
    bottom_right: bool = False


SIGNATURES = {
    _FLASH: _Signature(is_causal=4, mask=None, bottom_right=True),
    _EFFICIENT: _Signature(is_causal=6, mask=3, lse=4),
    _CUDNN: _Signature(is_causal=6, mask=3, lse=4),
    _CPU: _Signature(is_causal=4, mask="attn_mask"),
}


# The first and the second half of a value, or what each half takes.
Pair = Sequence[Node]


def _argument(node: Node, at: int | str | None, default: Any = None) -> Any:
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
def _attention(node: Node, axes: Axes) -> Split | str | None:
    """query, key, value: [B, heads, T, D]. Only the first result may have users, not the log-sum-exp or the random state."""
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
        # ``causal_halves`` needs the halves of all three. No op allows a mask together with is_causal.
        same = len(kv) == 2 and all(axes[a] == axis for a in kv)
        return Split(outputs) if same and mask is None else None
    return Split(outputs, whole=frozenset(i for i, a in ((1, key), (2, val)) if a in axes), slices=slices)


def _axis_of_mask(mask: Node, axis: TokenAxis) -> TokenAxis | None:
    """The token axis of the queries in a mask [B, heads, T, keys], or with only the last dimensions; None if it is broadcast there."""
    dim = axis.dim - (4 - value(mask).dim())
    return TokenAxis(dim, axis.unit) if dim >= 0 and not is_one(value(mask).shape[dim]) else None


def is_cut_causally(node: Node, axes: Mapping[Node, TokenAxis], rows: Callable[[Node], Write | None]) -> bool:
    """Whether the first half does not attend to the second half's keys, so that the calls of the halves differ.

    rows: keys or values -> their Write, or None
    """
    if node.target not in SIGNATURES or axes[node.args[0]].dim != 2:
        return False
    if is_causal(node):
        return True
    mask, (keys, values) = attention_mask(node), map(rows, node.args[1:3])
    if mask is None or mask in axes or keys is None or values is None:
        return False
    if any(write.axis != axes[node.args[0]] for write in (keys, values)):
        return False
    first = first_key(keys, values)
    return first is not None and hides_later_keys(mask, first)


def why_both(reader: Node) -> str:
    """Why both halves wait for what both have written to a cache that a call reads."""
    if reader.target in SIGNATURES:
        return "no mask hides from the first half what the second half writes"
    return "both halves write to it, and what reads it may need all of it"


def causal_halves(emit: Callable[[int], Emit], node: Node, queries: Pair, keys: Pair, values: Pair) -> tuple[Node, Node]:
    """Both halves of the first result of an attention with ``is_causal``.

    emit:                  half -> its Emit
    queries, keys, values: both halves of each, [B, heads, T, D]
    """
    first, second = emit(0), emit(1)
    whole = _attend(first, node, queries[0], keys[0], values[0], True)
    return first(operator.getitem, whole, 0), _bottom_right(second, node, queries[1], keys, values)


def masked_halves(
    emit: Callable[[int], Emit], node: Node, queries: Pair, keys: Pair, values: Pair, mask_rows: Pair
) -> tuple[Node, Node]:
    """Both halves of the first result of an attention whose mask hides the second half's keys from the first half.

    keys, values: those that the first half attends to, which are the first of all, and all of them
    mask_rows:    the rows of the mask for each half
    """
    first, second = emit(0), emit(1)
    seen = first(aten.slice.Tensor, mask_rows[0], value(mask_rows[0]).dim() - 1, 0, size_of(first, keys[0], 2))
    past = _attend(first, node, queries[0], keys[0], values[0], False, seen)
    rest = _attend(second, node, queries[1], keys[1], values[1], False, mask_rows[1])
    return first(operator.getitem, past, 0), second(operator.getitem, rest, 0)


def _attend(
    emit: Emit, node: Node, query: Node, key: Node, val: Node, causal: bool, mask: Node | None = None, lse: bool = False
) -> Node:
    """The call of ``node`` on other tensors."""
    signature, kwargs = SIGNATURES[node.target], dict(node.kwargs)
    args = [query, key, val, *node.args[3:]]
    changes: list[tuple[int | str | None, Any]] = [(signature.is_causal, causal), (signature.mask, mask)]
    changes += [(signature.lse, True)] if lse else []
    for position, new in changes:
        if isinstance(position, str):
            kwargs[position] = new
        elif position is not None:
            args += [_DEFAULTS[node.target][i] for i in range(len(args), position + 1)]
            args[position] = new
    return emit(node.target, *args, **kwargs)


def _bottom_right(emit: Emit, node: Node, query: Node, keys: Pair, values: Pair) -> Node:
    """The second half: its queries over all keys, causal and aligned to the bottom right."""
    if SIGNATURES[node.target].bottom_right:
        all_keys, all_values = (emit(aten.cat.default, list(pair), 2) for pair in (keys, values))
        return emit(operator.getitem, _attend(emit, node, query, all_keys, all_values, True), 0)

    past = _attend(emit, node, query, keys[0], values[0], False, lse=True)
    own = _attend(emit, node, query, keys[1], values[1], True, lse=True)
    out = [emit(operator.getitem, part, 0) for part in (past, own)]
    lse = [_as_rows(emit, emit(operator.getitem, part, 1), query) for part in (past, own)]
    # out_a + (out_b - out_a) · sigmoid(lse_b - lse_a) is the merge above, without overflow.
    share = emit(aten.sigmoid.default, emit(aten.sub.Tensor, lse[1], lse[0]))
    fp32 = [emit(prims.convert_element_type.default, o, torch.float32) for o in out]
    step = emit(aten.mul.Tensor, emit(aten.sub.Tensor, fp32[1], fp32[0]), share)
    merged = emit(aten.add.Tensor, fp32[0], step)
    return emit(prims.convert_element_type.default, merged, value(out[0]).dtype)


# The defaults of the arguments that a call may leave out, by position.
_DEFAULTS = {
    _FLASH: (None, None, None, 0.0, False),
    _EFFICIENT: (None, None, None, None, False, 0.0, False),
    _CUDNN: (None, None, None, None, False, 0.0, False),
    _CPU: (None, None, None, 0.0, False),
}


def _as_rows(emit: Emit, lse: Node, query: Node) -> Node:
    """The log-sum-exp as [B, heads, T, 1]. Some ops return it without the last dimension, or padded along T."""
    if value(lse).dim() == 4:
        return lse
    rows = emit(aten.slice.Tensor, lse, 2, 0, size_of(emit, query, 2))
    return emit(aten.unsqueeze.default, rows, -1)
