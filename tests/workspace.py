"""The ops over a workspace as symmetric memory has one, as unforgiving as its contract allows.

Each slot of a group has one buffer for what goes in and the norm that comes out, and one for its residual. Whatever the
contract leaves undefined is NaN here: what stood in a slot before it was written again, and of a sharded residual the rows
of the other ranks.
"""

import functools
import math
from collections import Counter

import torch
from graphs import RANKS, Plain
from quantised import EMULATED

from tw_compile.quantise import results
from tw_compile.site import Site, add_norm

ENTRIES = 1 << 16
NAN = float("nan")


class Workspace:
    def __init__(self, device="cpu", entries=ENTRIES):
        self.slots, self.full = {}, functools.partial(torch.full, (entries,), NAN, device=device)
        self.counts = Counter(linear=0, in_workspace=0, sharded_residual=0)

    def _slot(self, group, slot, dtype):
        key = group, slot, dtype
        if key not in self.slots:
            self.slots[key] = _Slot(self.full(dtype=dtype), self.full())
        return self.slots[key]

    def linear(self, a, b, bias, slot, group, transport):
        self.counts["linear"] += 1
        return self._slot(group, slot, a.dtype).write(a @ b if bias is None else a @ b + bias)

    def scaled_linear(self, *given):
        return self._scaled(torch.ops.aten._scaled_mm.default, given)

    def scaled_linear_v2(self, *given):
        return self._scaled(torch.ops.aten._scaled_mm_v2.default, given)

    def _scaled(self, gemm, given):
        self.counts["scaled_linear"] += 1
        *given, slot, group, _ = given
        product = EMULATED.get(gemm, gemm)(*given)
        return self._slot(group, slot, product.dtype).write(product)

    def partials(self, shape, dtype, device, slot, group, transport):
        self.counts["placed"] += 1
        return self._slot(group, slot, dtype).buffer[: math.prod(shape)].view(shape)

    def placed(self, x, slot, group, transport):
        self.counts["placed"] += 1
        return self._slot(group, slot, x.dtype).write(x)

    def start(self, site, group, transport):
        site = Site._make(site)
        assert site.fp32_residual == site.sharded_residual
        self.counts["sharded_residual"] += site.sharded_residual
        self._slot(group, site.slot, site.x.dtype).start(site)
        return site.x.new_empty(0)

    def wait(self, x, slot, in_workspace, group, transport):
        self.counts["in_workspace"] += in_workspace
        return self._slot(group, slot, x.dtype).finish(in_workspace)

    fused = Plain.fused


class _Slot:
    def __init__(self, buffer, own_rows):
        self.buffer, self.own_rows = buffer, own_rows
        self.every_row, self.pending = None, None  # every_row: of the sharded residual, as all ranks together have it
        self.quantised = []  # what stands in the workspace of the last quantised norm

    def write(self, value):
        """Into the buffer: what was there is gone."""
        value = value.clone()
        self.buffer.fill_(NAN)
        return self.buffer[: value.numel()].view(value.shape).copy_(value)

    def start(self, site):
        assert self.pending is None, "two sites of a slot under way"
        self.pending = site._replace(x=site.x.clone())
        self.buffer.fill_(NAN)  # the kernel may write from here on
        for tensor in self.quantised:
            tensor.copy_(torch.full_like(tensor, NAN, dtype=torch.float32) if tensor.is_floating_point() else torch.full_like(tensor, 99))

    def finish(self, in_workspace):
        x, (residual, *others) = self.pending.x, self.pending.addends  # read as late as possible: it must still be there
        if residual is not None and residual.data_ptr() == self.own_rows.data_ptr():
            residual = self.every_row
        norm, total = add_norm(x * RANKS, residual, *others)
        norm, _, *quantised = results(norm.to(x.dtype), total, self.pending.quantise, self.pending.static_scale)
        sharded_residual, self.pending = self.pending.sharded_residual, None
        norm = self.write(norm) if in_workspace else norm
        self.quantised = quantised if in_workspace else []
        if sharded_residual:
            self.every_row = total
            return norm, self._poisoned(total), *quantised
        return norm, total.to(x.dtype), *quantised

    def _poisoned(self, total):
        """The residual with this rank's rows alone."""
        rows = math.prod(total.shape[:-1])
        self.own_rows.fill_(NAN)
        view = self.own_rows[: total.numel()].view(rows, -1)
        view[: rows // RANKS] = total.reshape(rows, -1)[: rows // RANKS]
        return view.view(total.shape)
