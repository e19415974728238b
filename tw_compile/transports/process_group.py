"""The sites over the process group's own all-reduce: anywhere, on any device."""

import contextlib
import threading
import weakref

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..compat import resolve_process_group
from ..site import Site, add_norm


class ProcessGroup:
    """Sites over ``dist.all_reduce``. The sum has the process group's own order and rounding.

    On CUDA the collective is issued from a stream of its own, so that the compute stream goes on; on the CPU it runs
    in the process group's thread. Add and norm follow in ``wait``. There is no memory that calls share: from whichever stream they come,
    the process group orders its collectives, and what belongs together is kept from other threads by ``call()``, as in Symmetric.
    """

    name = "process_group"

    def __init__(self, group_name: str, device: torch.device):
        self._group, self.device = weakref.ref(resolve_process_group(group_name)), device
        self.lock, self._depth = threading.RLock(), 0
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.pending = {}

    @property
    def group(self) -> dist.ProcessGroup:
        """Held weakly: what was chosen for a group is not to keep it."""
        return self._group()

    def call(self) -> "ProcessGroup":
        """``with transport.call():`` around calls that belong together: see Symmetric."""
        return self

    def __enter__(self) -> None:
        self.lock.acquire()
        self._depth += 1

    def __exit__(self, *error) -> None:
        try:
            self._depth -= 1
            if not self._depth:
                for slot in [*self.pending]:
                    self._forget(slot)
        finally:
            self.lock.release()

    def prepare(self, calls) -> None:
        """Nothing is to be made."""

    def linear(self, a: Tensor, b: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)

    def _forget(self, slot: int) -> None:
        """A start() without wait(): its run failed in between."""
        done, *_ = self.pending.pop(slot)
        if self.stream is not None:
            with contextlib.suppress(RuntimeError):  # if that run was a capture
                torch.cuda.current_stream(self.device).wait_event(done)  # what reuses its memory runs behind it

    def start(self, site: Site) -> Tensor:
        x, slot = site.x, site.slot
        if slot in self.pending:
            self._forget(slot)
        total = torch.empty_like(x, memory_format=torch.contiguous_format)  # of the compute stream, for CUDA graphs
        if self.stream is None:
            total.copy_(x)
            done = dist.all_reduce(total, group=self.group, async_op=True)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                total.copy_(x)
                dist.all_reduce(total, group=self.group)
                done = self.stream.record_event()
        self.pending[slot] = done, total, site
        return x.new_empty(0)

    def wait(self, slot: int, in_workspace: bool) -> tuple[Tensor, Tensor]:
        if slot not in self.pending:
            raise RuntimeError(f"wait for slot {slot}, in which nothing was started")
        done, total, site = self.pending.pop(slot)
        if self.stream is None:
            done.wait()
        else:
            torch.cuda.current_stream(self.device).wait_event(done)
        return _add_norm(total, site)

    def fused(self, site: Site, in_workspace: bool) -> tuple[Tensor, Tensor]:
        total = site.x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return _add_norm(total, site)

    def workspace_bytes(self) -> int:
        return 0

    def raise_if_lost(self, cause: BaseException | None = None) -> None:
        """What becomes of a rank that does not come is the process group's own error."""


def _add_norm(total: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    residual, weight, bias, shift, eps, scale, offset, center = site.addends
    dtype, of_residual = total.dtype, torch.float32 if site.fp32_residual else total.dtype
    plain = weight is not None and weight.dtype == dtype and offset == 0.0 and bias is None and scale == 1.0
    plain = plain and (shift is None or shift.dtype == dtype)
    if not (total.is_cuda and plain):
        norm, total = add_norm(total, *site.addends)
        return norm.to(dtype), total.to(of_residual)
    # Three kernels in place of the reference's dozen; the norm's input is rounded first, as eager does it.
    if residual is not None:
        total = total + residual
    rounded = total.to(dtype)
    shape = weight.shape
    norm = F.layer_norm(rounded, shape, weight, shift, eps) if center else F.rms_norm(rounded, shape, weight, eps)
    return norm, total if site.fp32_residual and residual is not None else rounded.to(of_residual)
