"""The transport over the process group's own all-reduce. It works on all devices."""

import contextlib
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..quantise import results
from ..site import Planned, Site, add_norm, empty_results

c10d = torch.ops._c10d_functional


class ProcessGroup:
    """Sites over the functional all-reduce that Inductor's code calls. The order and rounding of the sum are the process group's.

    The process group runs a collective on its own stream or in its own thread, beside the compute. Add and norm run in ``wait``. Calls
    share no memory. The process group orders its collectives, whichever streams they are enqueued on. ``call()`` keeps other threads out
    between a start and its wait, as in Symmetric.

    in_place: contiguous partial sums are reduced where they are, as in Inductor's code. For measurements, which read none of them again
    """

    name = "process_group"
    in_place = False

    def __init__(self, group_name: str, device: torch.device) -> None:
        self.group_name, self.device = group_name, device
        self.lock, self._depth = threading.RLock(), 0
        self.pending: dict[int, Callable[[], tuple[Tensor, ...]]] = {}  # slot -> what waits for a site that was started

    def call(self) -> "ProcessGroup":
        """``with transport.call():`` keeps other threads out between the ops of one call: see Symmetric."""
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

    def prepare(self, calls: Iterable[Planned]) -> None:
        """Does nothing: there are no workspaces and kernels to make."""

    def partials(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def linear(self, a: Tensor, b: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)

    def _forget(self, slot: int) -> None:
        """Drop a site that was started but not waited for, because its call has failed."""
        finish = self.pending.pop(slot)
        with contextlib.suppress(RuntimeError):  # raised if that call was captured in a CUDA graph
            finish()  # later work may reuse its memory

    def start(self, site: tuple) -> Tensor:
        site = Site._make(site)
        if site.slot in self.pending:
            self._forget(site.slot)
        self.pending[site.slot] = self._begin(site)
        return site.x.new_empty(0)

    def wait(self, slot: int, in_workspace: bool) -> tuple[Tensor, ...]:
        if slot not in self.pending:
            raise RuntimeError(f"wait for slot {slot} without a start")
        return self.pending.pop(slot)()

    def fused(self, site: tuple, in_workspace: bool) -> tuple[Tensor, ...]:
        return self._begin(Site._make(site))()

    def _begin(self, site: Site) -> Callable[[], tuple[Tensor, ...]]:
        """Begin a site. Returns what waits for its results."""
        own = self.in_place and site.x.is_contiguous()
        x = site.x if own else site.x.clone(memory_format=torch.contiguous_format)
        total = c10d.all_reduce_(x, "sum", self.group_name)
        return lambda: results(*add_norm_of(c10d.wait_tensor(total), site), site.quantise, site.static_scale)

    def workspace_bytes(self) -> int:
        return 0

    def raise_if_lost(self, cause: BaseException | None = None) -> None:
        """Does nothing: the process group raises its own error for a rank that does not come."""


def add_norm_of(total: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """(norm, residual) of a site, from the sum over the ranks."""
    if not total.is_cuda:
        norm, residual = add_norm(total, *site.addends)
        return norm.to(total.dtype), residual.to(torch.float32 if site.fp32_residual else total.dtype)
    from . import norm_kernel  # imports Triton, which CUDA builds of PyTorch bring

    norm, residual, *_ = empty_results(total, site.fp32_residual)
    norm_kernel.add_norm(total, site.addends, norm, residual)
    return norm, residual
