"""What calls on inputs of one shape have in common, and what their launches are given."""

import functools
import itertools

import torch
import torch.utils.dlpack
from torch import Tensor

from ...site import Site
from . import nvrtc
from .tuning import two_shot_ctas
from .workspace import Workspace


class Call:
    """What calls on inputs of one shape, in one slot, have in common."""

    def __init__(self, owner, workspace: Workspace, shape: torch.Size, rows: int):
        self.shape, self.rows, self.workspace, self.arguments = shape, rows, workspace, workspace.arguments
        self.dtype = workspace.activations.dtype
        self.activations_at, self.carried_at = workspace.activations.data_ptr(), workspace.carried.data_ptr()
        # One memory, several tensors: the result of an op may not share the storage of what it takes (torch warns of it
        # in 2.11, and from 2.12 on refuses it), and a site's input and norm, and its residuals before and after, are in
        # one place each.
        tensors = [_with_own_storage(t)[:rows].view(shape) for t in (workspace.activations, workspace.carried) for _ in range(2)]
        self.partials, self.norm, *carried = tensors
        # The carried residual, as another tensor than the last time, which may be what the site has taken.
        self.carried = itertools.cycle(carried).__next__
        self.token = self.partials.new_empty(0)
        self.whole_residual = workspace.whole_residual[:rows].view(shape)
        self.kernel = workspace.tuning.kernel_of(rows)
        self.one_shot = self.kernel != "two_shot"
        # The rows of the rank that has most: there are never more CTAs than rows for them.
        self.most_rows = rows if self.one_shot else -(-rows // owner.world)
        self.ctas = two_shot_ctas(owner.world)
        self.ctas_alone = workspace.tuning.ctas_alone(rows)
        # (center, ctas, otherwise) -> (Kernel, number of CTAs): see grid
        self.launcher = functools.cache(self._launcher)

    def _launcher(self, center: bool, ctas: int, otherwise: int) -> tuple[nvrtc.Kernel, int]:
        kernel = self.workspace.kernels(center)[self.kernel]
        return kernel, self.grid(ctas, otherwise, kernel.cluster)

    def grid(self, ctas: int, otherwise: int, cluster: int = 1) -> int:
        """The number of CTAs, the same on all ranks, in whole clusters. ctas: the caller's wish, 0 for none."""
        most = self.workspace.max_ctas // cluster * cluster
        if ctas > most:
            raise RuntimeError(
                f"{ctas} CTAs do not fit into the signal pad of symmetric memory, which has room for {most}: ask for fewer, or call "
                "torch.distributed._symmetric_memory.set_signal_pad_size before the first use"
            )
        grid = min(ctas or (self.most_rows if self.one_shot else otherwise), self.most_rows)
        return min(-(-grid // cluster) * cluster, most)

    def prepare(
        self, site: Site, number: int, norm_out: int, whole_residual: Tensor, otherwise: int
    ) -> tuple[nvrtc.Kernel, int, tuple]:
        """Bring the inputs to where the kernel reads them, on the current stream, and pack its arguments.

        otherwise: CTAs of the kernel if the site leaves them open
        Returns (the kernel, its number of CTAs, what must stay alive until it has run).
        """
        x, residual, weight, bias, shift, eps, scale, offset, center, ctas, _, _, fp32_residual, sharded_residual = site
        if fp32_residual is not sharded_residual:
            raise RuntimeError("over symmetric memory a residual is float32 where it is sharded, and nowhere else")
        if shift is not None and not center:
            raise RuntimeError("only a LayerNorm has a shift")
        x_at = residual_at = weight_at = bias_at = shift_at = 0
        weight_is_float = shift_is_float = carried = False
        if self.one_shot:
            x, x_at = _readable(x)
        elif x.data_ptr() != self.activations_at or not x.is_contiguous():
            self.partials.copy_(x)  # two_shot reads it there
        if residual is not None:
            residual_at = residual.data_ptr()
            carried = residual_at == self.carried_at
            if not carried:
                if residual.dtype is not self.dtype or residual.shape != self.shape:
                    raise RuntimeError(f"residual is {residual.dtype} {[*residual.shape]}, but x {x.dtype} {[*x.shape]}")
                residual, residual_at = _readable(residual)
        if weight is not None:
            weight_is_float = weight.dtype is not self.dtype and _is_float("weight", weight, x)
            weight, weight_at = _readable(weight)
        if bias is not None:
            if bias.dtype is not self.dtype:
                raise RuntimeError(f"bias is {bias.dtype}; beside {x.dtype} it must be the same")
            bias, bias_at = _readable(bias)
        if shift is not None:
            shift_is_float = shift.dtype is not self.dtype and _is_float("shift", shift, x)
            shift, shift_at = _readable(shift)
        self.arguments.set(
            self.rows, x_at, residual_at, bias_at, weight_at, norm_out, self.carried_at if sharded_residual else whole_residual.data_ptr(),
            number, weight_is_float, carried, not sharded_residual, eps, scale, offset, shift_is_float, shift_at,
        )  # fmt: skip
        kernel, grid = self.launcher(center, ctas, otherwise)
        return kernel, grid, (x, residual, weight, bias, shift)


def _with_own_storage(t: Tensor) -> Tensor:
    """The same memory, kept alive by the result, under a storage of its own. Not an inference tensor, wherever it is made."""
    with torch.inference_mode(False):
        return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(t))


def like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _readable(t: Tensor) -> tuple[Tensor, int]:
    """t as the kernels can read it, contiguous and 16-byte aligned, and its address."""
    address = t.data_ptr()
    if address % 16 or not t.is_contiguous():
        t = t.clone(memory_format=torch.contiguous_format)
        address = t.data_ptr()
    return t, address


def _is_float(name: str, vector: Tensor, x: Tensor) -> bool:
    """True; raises RuntimeError for a vector that is not float32 where it is not of x's dtype."""
    if vector.dtype is not torch.float32:
        raise RuntimeError(f"{name} is {vector.dtype}; beside {x.dtype} it must be that, or float32")
    return True
