"""The base of the transports whose site is several collectives of process groups, with kernels between them."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..quantise import results
from ..site import Site
from .process_group import ProcessGroup


class Beside(ProcessGroup):
    """Sites that run beside the compute as a whole.

    On a GPU ``start`` enqueues all of a site on another stream, so that the other half computes beside it; ``wait`` waits for its
    end. On a CPU ``start`` does all of it. Calls share no memory.

    streams: the number of these streams, which slots take in turns. With one, a site begins when the site before has ended. Sites with
             collectives of several groups need that: NCCL's kernels of different groups, begun in another order on another rank, could
             wait for each other
    """

    streams = 1

    def __init__(self, group_name: str, device: torch.device) -> None:
        super().__init__(group_name, device)
        self._sides = [torch.cuda.Stream(device, priority=-1) for _ in range(self.streams)] if device.type == "cuda" else []

    def memory(self, site: Site) -> tuple[Tensor, Tensor]:
        """Memory for the norm and the residual of a site, as ``run`` takes it."""
        raise NotImplementedError

    def run(self, site: Site, norm: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Do a site up to its norm, on the current stream. Returns norm and residual, in the memory that is given."""
        raise NotImplementedError

    def is_plain(self, x: Tensor) -> bool:
        """Whether a site with these partial sums is one all-reduce, as ProcessGroup has it."""
        return False

    def fused(self, site: tuple, in_workspace: bool) -> tuple[Tensor, ...]:
        site = Site._make(site)
        if self.is_plain(site.x):
            return super().fused(site, in_workspace)
        return results(*self.run(site, *self.memory(site)), site.quantise, site.static_scale)

    def _begin(self, site: Site) -> Callable[[], tuple[Tensor, ...]]:
        if self.is_plain(site.x):
            return super()._begin(site)
        norm, residual = self.memory(site)  # on the caller's stream, as its later work may reuse the memory
        with self._beside(site.slot) as join:
            normed = self.run(site, norm, residual)

        def finish() -> tuple[Tensor, ...]:  # holds the site, whose tensors are read until then
            join()
            return results(*normed, site.quantise, site.static_scale)

        return finish

    @contextlib.contextmanager
    def _beside(self, slot: int) -> Iterator[Callable[[], None]]:
        """On the slot's side stream, behind the current one's work. Yields what lets the current stream wait for the end."""
        if not self._sides:
            yield lambda: None
            return
        side = self._sides[slot % self.streams]
        fork, done = torch.cuda.Event(), torch.cuda.Event()
        fork.record()
        with torch.cuda.stream(side):
            side.wait_event(fork)
            yield lambda: torch.cuda.current_stream(self.device).wait_event(done)
            done.record()


def rows_of(x: Tensor) -> Tensor:
    """[..., H] -> [T, H], contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()
