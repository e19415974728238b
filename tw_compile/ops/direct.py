"""What the ops do, as plain functions: a transport is found, and called.

The code that Inductor writes calls them as they are. Everything else calls the ops, which come here by way of PyTorch's
dispatcher: for so many arguments that takes longer than all that a function does.
"""

from ..transports import choose


def _transport(requested, group, tensor):
    known = choose.chosen.get((group, tensor.device, requested))
    return (known or choose.choose(requested, group, tensor.device))[0]


def linear(a, b, bias, group, transport, slot):
    return _transport(transport, group, a).linear(a, b, bias, slot)


def start(x, residual, weight, bias, shift, eps, scale, offset, center, group, transport, ctas, slot, site, fp32_residual, sharded_residual):
    return _transport(transport, group, x).start(
        x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, fp32_residual, sharded_residual
    )


def wait(token, x, residual, weight, bias, shift, after, group, transport, slot, fp32_residual, sharded_residual, in_workspace):
    return _transport(transport, group, x).wait(slot, in_workspace)


def fused(
    x, residual, weight, bias, shift, eps, scale, offset, center, group, transport, ctas, slot, site, fp32_residual, sharded_residual, in_workspace
):
    return _transport(transport, group, x).fused(
        x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, fp32_residual, sharded_residual, in_workspace
    )
