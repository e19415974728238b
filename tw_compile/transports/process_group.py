"""Sites over the process group's own all-reduce, on any device."""

import contextlib
import threading
import weakref

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..compat import resolve_process_group
from ..site import add_norm


class ProcessGroup:
    """Sites over ``dist.all_reduce``. The sum has the process group's order and rounding.

    On CUDA the collective is issued from a separate stream, so that the compute stream goes on; on the CPU it runs in the process group's
    thread. ``wait`` computes add and norm. Calls share no memory. The process group orders collectives from all streams, and ``call()``
    keeps the ops of one call together where several threads call, as in Symmetric.
    """

    name = "process_group"

    def __init__(self, group_name: str, device: torch.device) -> None:
        self._group, self.device = weakref.ref(resolve_process_group(group_name)), device
        self.lock, self._depth = threading.RLock(), 0
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.pending: dict[int, tuple] = {}  # slot -> the started site

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group. It is held weakly, so that a transport does not keep a destroyed group alive."""
        return self._group()

    def call(self) -> "ProcessGroup":
        """``with transport.call():`` keeps the ops of one call together: see Symmetric."""
        return self

    def __enter__(self) -> None:
        self.lock.acquire()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        try:
            self._depth -= 1
            if not self._depth:
                for slot in [*self.pending]:
                    self._forget(slot)
        finally:
            self.lock.release()

    def prepare(self, calls: list[tuple]) -> None:
        """Make what these calls need: nothing."""

    def linear(self, a: Tensor, b: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)

    def _forget(self, slot: int) -> None:
        """Drop a site that was started but not waited for, as its run has failed."""
        done, *_ = self.pending.pop(slot)
        if self.stream is not None:
            with contextlib.suppress(RuntimeError):  # if that run was a capture
                torch.cuda.current_stream(self.device).wait_event(done)  # later work may reuse its memory

    def start(self, x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, fp32_residual, sharded_residual) -> Tensor:
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
        self.pending[slot] = done, total, (residual, weight, bias, shift, eps, scale, offset, center, fp32_residual)
        return x.new_empty(0)

    def wait(self, slot: int, in_workspace: bool) -> tuple[Tensor, Tensor]:
        if slot not in self.pending:
            raise RuntimeError(f"wait for slot {slot}, in which nothing was started")
        done, total, site = self.pending.pop(slot)
        if self.stream is None:
            done.wait()
        else:
            torch.cuda.current_stream(self.device).wait_event(done)
        return _add_norm(total, *site)

    def fused(self, x, residual, weight, bias, shift, eps, scale, offset, center, ctas, slot, site, fp32_residual, sharded_residual, in_workspace):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return _add_norm(total, residual, weight, bias, shift, eps, scale, offset, center, fp32_residual)

    def workspace_bytes(self) -> int:
        return 0

    def raise_if_lost(self, cause: BaseException | None = None) -> None:
        """Nothing: the process group raises its own error for a rank that does not come."""


def _add_norm(total, residual, weight, bias, shift, eps, scale, offset, center, fp32_residual):
    dtype, of_residual = total.dtype, torch.float32 if fp32_residual else total.dtype
    plain = weight is not None and weight.dtype == dtype and offset == 0.0 and bias is None and scale == 1.0
    plain = plain and (shift is None or shift.dtype == dtype)
    if not (total.is_cuda and plain):
        norm, total = add_norm(total, residual, weight, bias, shift, eps, scale, offset, center)
        return norm.to(dtype), total.to(of_residual)
    # Three kernels in place of the reference's twelve. The norm's input is rounded first, as in eager mode.
    if residual is not None:
        total = total + residual
    rounded = total.to(dtype)
    shape = weight.shape
    norm = F.layer_norm(rounded, shape, weight, shift, eps) if center else F.rms_norm(rounded, shape, weight, eps)
    return norm, total if fp32_residual and residual is not None else rounded.to(of_residual)
