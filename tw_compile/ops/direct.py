"""What the ops do, as plain functions: a transport is found, and called.

The code that Inductor writes calls them as they are. Everything else calls the ops, which come here by way of PyTorch's
dispatcher: for so many arguments that takes longer than all that a function does.
"""

from ..site import Site
from ..transports.choose import choose, chosen

_packed = tuple.__new__  # as Site, which does the same in Python


def linear(a, b, bias, slot, group, transport):
    found, _ = chosen.get((group, a.device, transport)) or choose(transport, group, a.device)
    return found.linear(a, b, bias, slot)


def start(
    x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, fp32_residual, sharded_residual, group, transport
):  # fmt: skip
    found, _ = chosen.get((group, x.device, transport)) or choose(transport, group, x.device)
    packed = x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, fp32_residual, sharded_residual
    return found.start(_packed(Site, packed))


def wait(token, x, residual, weight, bias, shift, after, slot, fp32_residual, sharded_residual, in_workspace, group, transport):
    found, _ = chosen.get((group, x.device, transport)) or choose(transport, group, x.device)
    return found.wait(slot, in_workspace)


def fused(
    x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, fp32_residual, sharded_residual, in_workspace,
    group, transport
):  # fmt: skip
    found, _ = chosen.get((group, x.device, transport)) or choose(transport, group, x.device)
    packed = x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, fp32_residual, sharded_residual
    return found.fused(_packed(Site, packed), in_workspace)
