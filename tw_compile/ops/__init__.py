"""The ops that a rewritten graph calls: their schemas, what they promise, and the way to a transport.

``linear``  a row-parallel GEMM that writes where the other ranks read
``start``   begins the communication of a site: all-reduce, residual add, norm
``wait``    gives its results; between the two, other work runs
``fused``   start and wait in one, on the compute stream

Memory
    The transports over symmetric memory keep a workspace for each *slot* (0 and 1 for the woven halves, 2 for what
    is not split). Inductor never owns it: see ``lowering``. Three flags say how far a graph lends itself to it:

    in_workspace      the norm is returned where the kernel wrote it, in the workspace. The graph has finished with it before the
                      slot's next ``linear``, ``start`` or ``fused``.
    fp32_residual     the new residual is float32, as it was before rounding: only the slot's next site reads it, as its residual.
    sharded_residual  beside ``fp32_residual``: it stays in the workspace, each rank having its own rows, in an order of the
                      transport. Otherwise it is whole, and a tensor of its own.

    in_workspace and sharded_residual are permissions: a transport without a workspace returns tensors of its own, and whole
    residuals.

Ordering
    ``wait`` takes everything that the communication may still read, so that nobody reuses that memory before; and
    ``after``, a tensor of the other half, so that the order of the weave is data flow, which no scheduler can undo.
"""

import torch

from ..site import NEXT_SITE, SLOT_WHOLE, Site, empty_results  # noqa: F401
from . import direct

_INPUTS = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? shift"
_NUMERICS = "float eps, float scale, float offset, bool center"
_RESIDUAL = "bool fp32_residual, bool sharded_residual"
_SITE = f"{_INPUTS}, {_NUMERICS}, int ctas, int slot, int site, {_RESIDUAL}"  # site.Site
_WHERE = "str group, str transport"

_lib = torch.library.Library("tokenweave", "DEF")
# Without this tag every op that takes an unrealised pointwise value gets a copy of its own.
_tags = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_lib.define(f"linear(Tensor a, Tensor b, Tensor? bias, int slot, {_WHERE}) -> Tensor", tags=_tags)
_lib.define(f"start({_SITE}, {_WHERE}) -> Tensor", tags=_tags)
_lib.define(
    f"wait(Tensor token, {_INPUTS}, Tensor? after, int slot, {_RESIDUAL}, bool in_workspace, {_WHERE}) -> (Tensor, Tensor)",
    tags=_tags,
)
_lib.define(f"fused({_SITE}, bool in_workspace, {_WHERE}) -> (Tensor, Tensor)", tags=_tags)

linear = torch.ops.tokenweave.linear.default
start = torch.ops.tokenweave.start.default
wait = torch.ops.tokenweave.wait.default
fused = torch.ops.tokenweave.fused.default


# Plain functions under Library.impl: 4 µs a call, where the custom_op decorator takes 35.
for _op in (linear, start, wait, fused):
    for _key in ("CPU", "CUDA"):
        _lib.impl(_op, getattr(direct, _op._opname), _key)


@torch.library.register_fake("tokenweave::linear", lib=_lib)
def _(a, b, *others):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("tokenweave::start", lib=_lib)
def _(x, *others):
    return x.new_empty(0)


@torch.library.register_fake("tokenweave::wait", lib=_lib)
def _(token, x, residual, weight, bias, shift, after, slot, fp32_residual, *others):
    return empty_results(x, fp32_residual)


@torch.library.register_fake("tokenweave::fused", lib=_lib)
def _(*given):
    site = Site._make(given[: len(Site._fields)])
    return empty_results(site.x, site.fp32_residual)
