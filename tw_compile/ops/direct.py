"""What the ops do, as plain functions: each finds its transport and calls it.

The code that Inductor generates calls these functions directly. All other callers use the ops, which reach them through PyTorch's
dispatcher: with this many arguments the dispatcher takes longer than the function itself. Functions of few arguments save time, too: the
fields of a Site are one tuple, which is not made a Site here, and ``wait`` takes only what it reads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..transports.choose import choose, chosen


def linear(a: Tensor, b: Tensor, bias: Tensor | None, slot: int, group: str, transport: str) -> Tensor:
    found, _ = chosen.get((group, a.device, transport)) or choose(transport, group, a.device)
    return found.linear(a, b, bias, slot)


def partials(shape: Sequence[int], dtype: torch.dtype, device: torch.device, slot: int, group: str, transport: str) -> Tensor:
    found, _ = chosen.get((group, device, transport)) or choose(transport, group, device)
    return found.partials(slot, dtype, torch.Size(shape))


def placed(x: Tensor, slot: int, group: str, transport: str) -> Tensor:
    return partials(x.shape, x.dtype, x.device, slot, group, transport).copy_(x)


def scaled_linear(*args: Any) -> Tensor:
    return _written(torch.ops.aten._scaled_mm.out, args[6], *args)


def scaled_linear_v2(*args: Any) -> Tensor:
    return _written(torch.ops.aten._scaled_mm_v2.out, args[9], *args)


def _written(gemm: Callable, dtype: torch.dtype | None, *args: Any) -> Tensor:
    a, b, *others, slot, group, transport = args
    out = partials((a.shape[0], b.shape[1]), dtype or a.dtype, a.device, slot, group, transport)
    return gemm(a, b, *others, out=out) if out.numel() else out


def start(site: tuple, group: str, transport: str) -> Tensor:
    """site: the fields of a Site"""
    device = site[0].device
    found, _ = chosen.get((group, device, transport)) or choose(transport, group, device)
    return found.start(site)


def wait(x: Tensor, slot: int, in_workspace: bool, group: str, transport: str) -> tuple[Tensor, ...]:
    found, _ = chosen.get((group, x.device, transport)) or choose(transport, group, x.device)
    return found.wait(slot, in_workspace)


def fused(site: tuple, in_workspace: bool, group: str, transport: str) -> tuple[Tensor, ...]:
    """site: the fields of a Site"""
    device = site[0].device
    found, _ = chosen.get((group, device, transport)) or choose(transport, group, device)
    return found.fused(site, in_workspace)


def reduced(total: Tensor, after: Tensor | None) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(total).clone()  # an op may not return its input; generated code has no copy
