"""What the ops do, as plain functions: an implementation is found, and called.

The code that Inductor writes calls them as they are. Everything else calls the ops, which come here by way of PyTorch's
dispatcher: for so many arguments that takes longer than all that a function does.
"""

from . import transport as transports


def _implementation(requested, group, tensor):
    known = transports.chosen.get((group, tensor.device, requested))
    return (known or transports.choose(requested, group, tensor.device))[0]


def linear(a, b, bias, group, transport, slot):
    return _implementation(transport, group, a).linear(a, b, bias, slot)


def start(x, residual, weight, bias, shift, eps, scale, offset, center, group, transport, ctas, slot, site, wide, shard):
    return _implementation(transport, group, x).start(
        x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, wide, shard
    )


def wait(token, x, residual, weight, bias, shift, after, group, transport, slot, wide, shard, borrow):
    return _implementation(transport, group, x).wait(slot, borrow)


def fused(
    x, residual, weight, bias, shift, eps, scale, offset, center, group, transport, ctas, slot, site, wide, shard, borrow
):
    return _implementation(transport, group, x).fused(
        x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, wide, shard, borrow
    )
