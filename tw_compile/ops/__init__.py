"""The ops that a rewritten graph calls: their schemas, what they promise, and the way to an implementation.

``linear``  a row-parallel GEMM that writes where the other ranks read
``start``   begins the communication of a site: all-reduce, residual add, norm
``wait``    gives its results; between the two, other work runs
``fused``   start and wait in one, on the compute stream

Memory
    The implementations over symmetric memory keep a workspace for each *slot* (0 and 1 for the woven halves, 2 for what
    is not split). Inductor never owns it: see ``keep_out_of_reuse``. Three flags say how far a graph lends itself to it:

    borrow  the norm is returned where the kernel wrote it, in the workspace. The graph has finished with it before the
            slot's next ``linear``, ``start`` or ``fused``.
    wide    the new residual is float32, as it was before rounding: only the slot's next site reads it, as its residual.
    shard   beside ``wide``: it stays in the workspace, each rank having its own rows, in an order of the implementation.
            Otherwise it is whole, and a tensor of its own.

    borrow and shard are permissions: an implementation without a workspace returns tensors of its own, and whole residuals.

Ordering
    ``wait`` takes everything that the communication may still read, so that nobody reuses that memory before; and
    ``after``, a tensor of the other half, so that the order of the weave is data flow, which no scheduler can undo.
"""

import torch
from torch import Tensor

from . import transport
from .reference import empty_results

SLOT_WHOLE = 2

_INPUTS = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? shift"
_NUMERICS = "float eps, float scale, float offset, bool center"
_SITE = f"{_INPUTS}, {_NUMERICS}, str group, str transport, int ctas, int slot, int site, bool wide, bool shard"

_lib = torch.library.Library("tokenweave", "DEF")
# Without this tag every op that takes an unrealised pointwise value gets a copy of its own.
_tags = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
_lib.define("linear(Tensor a, Tensor b, Tensor? bias, str group, str transport, int slot) -> Tensor", tags=_tags)
_lib.define(f"start({_SITE}) -> Tensor", tags=_tags)
_lib.define(
    f"wait(Tensor token, {_INPUTS}, Tensor? after, str group, str transport, int slot, bool wide, bool shard, bool borrow)"
    " -> (Tensor, Tensor)",
    tags=_tags,
)
_lib.define(f"fused({_SITE}, bool borrow) -> (Tensor, Tensor)", tags=_tags)

linear = torch.ops.tokenweave.linear.default
start = torch.ops.tokenweave.start.default
wait = torch.ops.tokenweave.wait.default
fused = torch.ops.tokenweave.fused.default


def _implementation(requested: str, group: str, tensor: Tensor):
    return transport.choose(requested, group, tensor.device)[0]


def _linear(a, b, bias, group, transport, slot):
    return _implementation(transport, group, a).linear(a, b, bias, slot)


def _start(x, residual, weight, bias, shift, eps, scale, offset, center, group, transport, ctas, slot, site, wide, shard):
    _implementation(transport, group, x).start(
        x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, wide, shard
    )
    return x.new_empty(0)


def _wait(token, x, residual, weight, bias, shift, after, group, transport, slot, wide, shard, borrow):
    return _implementation(transport, group, x).wait(slot, borrow)


def _fused(
    x, residual, weight, bias, shift, eps, scale, offset, center, group, transport, ctas, slot, site, wide, shard, borrow
):
    return _implementation(transport, group, x).fused(
        x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, wide, shard, borrow
    )


# Plain functions under Library.impl: 3 µs a call, where the custom_op decorator takes 35.
for _name, _function in (("linear", _linear), ("start", _start), ("wait", _wait), ("fused", _fused)):
    for _key in ("CPU", "CUDA"):
        _lib.impl(_name, _function, _key)


@torch.library.register_fake("tokenweave::linear", lib=_lib)
def _(a, b, bias, *site):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("tokenweave::start", lib=_lib)
def _(x, *site):
    return x.new_empty(0)


@torch.library.register_fake("tokenweave::wait", lib=_lib)
def _(token, x, *site):
    return empty_results(x, wide=site[-3])


@torch.library.register_fake("tokenweave::fused", lib=_lib)
def _(x, *site):
    return empty_results(x, wide=site[-3])


def keep_out_of_reuse() -> None:
    """Tell Inductor, once, that results in a workspace are not its own to reuse, write in place or free.

    It owns the outputs of an op it does not know: it would hand their memory to a later buffer of the same size.
    """
    from torch._inductor import lowering
    from torch._inductor.virtualized import V

    def register(op, lent):
        call = lowering.fallback_handler(op)

        def lower(*args):
            outputs = call(*args)
            for output, is_lent in zip(outputs if isinstance(outputs, (tuple, list)) else (outputs,), lent(args)):
                if is_lent:
                    V.graph.never_reuse_buffers.add(output.get_name())
            return outputs

        lowering.register_lowering(op, type_promotion_kind=None)(lower)

    if linear not in lowering.lowerings:
        register(linear, lambda args: (True,))
        register(wait, lambda args: (args[-1], args[-2]))  # borrow: the norm, shard: the residual
        register(fused, lambda args: (args[-1], args[-2]))
