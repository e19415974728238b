"""The ops of a rewritten graph: their schemas and the contract between graph and transport.

``linear``  a row-parallel GEMM whose output is where the other ranks read it; ``scaled_linear`` and ``scaled_linear_v2`` are the same of
            ``aten._scaled_mm`` and ``aten._scaled_mm_v2``
``placed``  a value in the same place; Inductor lets the kernel that computes the value write it there, in memory from ``partials``
``start``   begins the communication of a site: all-reduce, residual add, norm
``wait``    returns the results of ``start``: norm, residual, and what ``quantise.results`` adds; other work runs between the two
``fused``   ``start`` and ``wait`` in one op, on the compute stream
``reduced`` waits for an all-reduce of PyTorch's own, which has taken the place of a ``start``: see ``passes/expand.py``

Memory
    The transports over symmetric memory keep a workspace for each *slot*: 0 and 1 for the woven halves, 2 for values that are not split.
    Inductor does not own this memory (see ``lowering``). Three flags say how a graph uses it:

    in_workspace      The norm may be returned in the workspace, where the kernel has written it. The graph does not read it after the
                      slot's next ``linear``, ``placed``, ``start`` or ``fused``. So may the quantised norm and its scale, which the
                      graph does not read after the slot's next ``start`` or ``fused``.
    fp32_residual     The new residual is float32 and not rounded. Only the slot's next site reads it, as its residual.
    sharded_residual  Only with ``fp32_residual``: the new residual may stay in the workspace, where each rank has its own rows, in an
                      order of the transport. Otherwise it is a new tensor with all rows.

    ``in_workspace`` and ``sharded_residual`` are permissions: a transport without a workspace returns new tensors, and residuals with
    all rows.

Ordering
    ``wait`` takes all tensors that the communication may still read, so that their memory is not reused before. ``wait`` and ``reduced``
    also take ``after``, a tensor of the other half: the order of the weave is then a data dependency, which schedulers keep.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..site import NEXT_SITE, SLOT_WHOLE, Site, empty_results  # noqa: F401
from . import direct

_INPUTS = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? shift"
_NUMERICS = "float eps, float scale, float offset, bool center"
_RESIDUAL = "bool fp32_residual, bool sharded_residual"
_QUANTISE = "str quantise, Tensor? static_scale"
_SITE = f"{_INPUTS}, {_NUMERICS}, int ctas, int slot, int site, {_RESIDUAL}, {_QUANTISE}"  # site.Site
_WHERE = "str group, str transport"

_lib = torch.library.Library("tokenweave", "DEF")
# Without flexible_layout, Inductor makes a copy of an unrealised pointwise value for each op that takes it.
_tags = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_lib.define(f"linear(Tensor a, Tensor b, Tensor? bias, int slot, {_WHERE}) -> Tensor", tags=_tags)
_scaled_tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_lib.define(
    f"scaled_linear(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, Tensor? scale_result, ScalarType? out_dtype, "
    f"bool use_fast_accum, int slot, {_WHERE}) -> Tensor",
    tags=_scaled_tags,
)
_lib.define(
    f"scaled_linear_v2(Tensor a, Tensor b, Tensor[] scale_a, int[] recipe_a, int[] swizzle_a, Tensor[] scale_b, int[] recipe_b, "
    f"int[] swizzle_b, Tensor? bias, ScalarType? out_dtype, int[] contraction_dim, bool use_fast_accum, int slot, {_WHERE}) -> Tensor",
    tags=_scaled_tags,
)
_lib.define(f"partials(SymInt[] shape, ScalarType dtype, Device device, int slot, {_WHERE}) -> Tensor", tags=_tags)
_lib.define(f"placed(Tensor x, int slot, {_WHERE}) -> Tensor", tags=_tags)
_lib.define(f"start({_SITE}, {_WHERE}) -> Tensor", tags=_tags)
_lib.define(
    f"wait(Tensor token, {_INPUTS}, Tensor? after, int slot, {_RESIDUAL}, bool in_workspace, {_QUANTISE}, {_WHERE}) -> Tensor[]",
    tags=_tags,
)
_lib.define("reduced(Tensor sum, Tensor? after) -> Tensor", tags=_tags)
_lib.define(f"fused({_SITE}, bool in_workspace, {_WHERE}) -> Tensor[]", tags=_tags)

linear = torch.ops.tokenweave.linear.default
scaled_linear = torch.ops.tokenweave.scaled_linear.default
scaled_linear_v2 = torch.ops.tokenweave.scaled_linear_v2.default
partials = torch.ops.tokenweave.partials.default
placed = torch.ops.tokenweave.placed.default
start = torch.ops.tokenweave.start.default
wait = torch.ops.tokenweave.wait.default
fused = torch.ops.tokenweave.fused.default
reduced = torch.ops.tokenweave.reduced.default


def direct_arguments(op: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of the function of ``direct`` for those of the op, which are all given."""
    if op is wait:
        _, x, *_, in_workspace, _, _, group, transport = args
        return x, args[7], in_workspace, group, transport  # args[7]: the slot
    fields = len(Site._fields)
    return (tuple(args[:fields]), *args[fields:]) if op in (start, fused) else args


# A call of a function registered with Library.impl takes 4 µs; with the custom_op decorator it takes 35 µs.
for _op in (linear, scaled_linear, scaled_linear_v2, placed, start, wait, fused, reduced):
    _function = getattr(direct, _op._opname)
    for _key in ("CPU", "CUDA"):
        _lib.impl(_op, lambda *args, op=_op, function=_function: function(*direct_arguments(op, args)), _key)
_lib.impl(partials, direct.partials, "CompositeExplicitAutograd")  # it takes no tensor, which would say the device


@torch.library.register_fake("tokenweave::linear", lib=_lib)
def _(a: Tensor, b: Tensor, *others: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("tokenweave::scaled_linear", lib=_lib)
def _(*args: Any) -> Tensor:
    return torch.ops.aten._scaled_mm.default(*args[:-3])


@torch.library.register_fake("tokenweave::scaled_linear_v2", lib=_lib)
def _(*args: Any) -> Tensor:
    return torch.ops.aten._scaled_mm_v2.default(*args[:-3])


@torch.library.register_fake("tokenweave::partials", lib=_lib)
def _(shape: Sequence[Any], dtype: torch.dtype, device: torch.device, *others: Any) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@torch.library.register_fake("tokenweave::placed", lib=_lib)
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("tokenweave::start", lib=_lib)
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(0)


@torch.library.register_fake("tokenweave::wait", lib=_lib)
def _(
    token: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None,
    after: Tensor | None, slot: int, fp32_residual: bool, sharded_residual: bool, in_workspace: bool, quantise: str, *others: Any,
) -> list[Tensor]:  # fmt: skip
    return [*empty_results(x, fp32_residual, quantise)]


@torch.library.register_fake("tokenweave::reduced", lib=_lib)
def _(total: Tensor, after: Tensor | None) -> Tensor:
    return torch.empty_like(total)


@torch.library.register_fake("tokenweave::fused", lib=_lib)
def _(*args: Any) -> list[Tensor]:
    site = Site._make(args[: len(Site._fields)])
    return [*empty_results(site.x, site.fp32_residual, site.quantise)]
