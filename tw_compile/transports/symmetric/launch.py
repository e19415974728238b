"""The calls on inputs of one shape: their tensors in the workspace, their kernels, and the arguments of a launch."""

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.utils.dlpack
from torch import Tensor

from ...quantise import DTYPES, read
from .arguments import numbers_of
from .layout import own_rows
from .tuning import two_shot_ctas
from .workspace import Workspace


class Outputs(NamedTuple):
    """Where a kernel writes.

    norm:           [..., H]
    norm_at:        its address; only one_shot takes it, and only where the norm is read
    whole_residual: the new residual, if it is not sharded
    quantised:      (q, the scales if each row has its own); () if the kernel does not quantise
    new:            these are new tensors, which need no copy, unless they are what may stay in the workspace
    """

    norm: Tensor
    norm_at: int
    whole_residual: Tensor
    quantised: tuple[Tensor, ...]
    new: bool


class Call:
    """The common part of all calls on inputs of one shape, in one slot.

    partials, norm: [..., H], of the dtype of x. Both are the activations of the workspace
    carried():      [..., H], float32, the sharded residual
    whole_residual: [..., H], of the dtype of x
    token:          the result of the op ``start``, without elements
    one_shot:       whether the kernel is one_shot, not two_shot
    """

    def __init__(self, owner: Any, workspace: Workspace, shape: torch.Size, rows: int, fork: int, done: int) -> None:
        """owner: Symmetric; rows: the number of tokens; fork, done: the events of the slot"""
        self._stream_and_events, self.done = (owner.side, fork, done), done
        self.shape, self.rows, self.workspace, self.arguments = shape, rows, workspace, workspace.arguments
        self._set = workspace.arguments.set
        self.dtype = workspace.activations.dtype
        self.activations_at, self.carried_at = workspace.activations.data_ptr(), workspace.carried.data_ptr()
        # A result of an op must not share the storage of an input: PyTorch 2.11 warns of it, and 2.12 raises. But the input of a site and
        # its norm are in the same memory, and so are its old and its new residual. So each of them has a storage of its own.
        tensors = [_with_own_storage(t)[:rows].view(shape) for t in (workspace.activations, workspace.carried) for _ in range(2)]
        self.partials, self.norm, *carried = tensors
        # Two tensors in turns, as the one that was returned last may be the input of the site.
        self.carried = itertools.cycle(carried).__next__
        self.token = self.partials.new_empty(0)
        self.whole_residual = workspace.whole_residual[:rows].view(shape)
        self.kernel = workspace.tuning.kernel_of(rows)
        self.one_shot = self.kernel != "two_shot"
        # The rows that a kernel reads of a residual.
        self.own = (0, rows) if self.one_shot else own_rows(owner.rank, owner.world, rows)
        # The most rows of a rank: more CTAs would be idle.
        self.most_rows = rows if self.one_shot else -(-rows // owner.world)
        self.ctas = two_shot_ctas(owner.world)
        self.ctas_alone = workspace.tuning.ctas_alone(rows)
        # (center, quantise, ctas, default_ctas) -> (packed launch, number of CTAs): see grid
        self.launch = functools.cache(self._launch)
        self.in_workspace = functools.cache(self._in_workspace)  # quantise -> Outputs in the workspace
        self._nothing = self.partials.new_empty(0)  # in place of a norm that is quantised

    def _launch(self, center: bool, quantise: str, ctas: int, default_ctas: int) -> tuple[bytes, int]:
        kernel = self.workspace.kernels(center, read(quantise).output if quantise else "")[self.kernel]
        grid = self.grid(ctas, default_ctas, kernel.cluster)
        return kernel.packed(grid, self.arguments.address, *self._stream_and_events), grid

    def _in_workspace(self, quantise: str) -> "Outputs":
        if not quantise:
            return Outputs(self.norm, self.activations_at, self.whole_residual, (), False)
        how, (*tokens, hidden) = read(quantise), self.shape
        q = _with_own_storage(self.workspace.quantised)[: self.rows].view(DTYPES[how.dtype][0]).view(self.shape)
        n = how.scales(hidden)
        scales = [_with_own_storage(self.workspace.scales)[: self.rows * n].view(*tokens, n)] if n else []
        return Outputs(self.norm, self.activations_at, self.whole_residual, (q, *scales), False)

    def outputs(self, site: tuple, in_workspace: bool) -> "Outputs":
        """Where a kernel on the current stream writes: one_shot, which only has results of this rank, to new tensors.

        site:         see ``Symmetric.start``
        in_workspace: the norm may stay in the workspace
        """
        x, *_, sharded_residual, quantise, _ = site
        kept = self.in_workspace(quantise)
        if not self.one_shot:
            return kept
        residual = self.whole_residual if sharded_residual else empty_like(x)
        if in_workspace:
            return Outputs(self.norm, self.activations_at, residual, kept.quantised, True)
        norm = self.norm if quantise and not read(quantise).keeps_norm else empty_like(x)
        return Outputs(norm, norm.data_ptr(), residual, tuple(map(empty_like, kept.quantised)), True)

    def results(self, site: tuple, outputs: "Outputs", in_workspace: bool) -> tuple[Tensor, ...]:
        """The results of a site whose kernel writes to ``outputs``, as ``quantise.results`` has them."""
        norm, _, residual, quantised, new = outputs
        if site[13]:  # sharded_residual
            residual = self.carried()
        elif not new:
            residual = residual.clone()
        if not quantised:
            return norm if new or in_workspace else norm.clone(), residual
        if not read(site[14]).keeps_norm:
            norm = self._nothing
        if not (new or in_workspace):
            norm, quantised = norm.clone(), tuple(map(torch.clone, quantised))
        return norm, residual, *quantised

    def grid(self, ctas: int, default_ctas: int, cluster: int = 1) -> int:
        """The number of CTAs of a kernel, a multiple of ``cluster``, the same on all ranks.

        ctas:         the number that the caller asked for; 0 for any
        default_ctas: the number of a two_shot kernel for which the caller asked for none
        Raises RuntimeError if the signal pad has too few flags.
        """
        most = self.workspace.max_ctas // cluster * cluster
        if ctas > most:
            raise RuntimeError(
                f"{ctas} CTAs do not fit into the signal pad of symmetric memory, which has room for {most}: use fewer CTAs, or call "
                "torch.distributed._symmetric_memory.set_signal_pad_size before the first use"
            )
        grid = min(ctas or (self.most_rows if self.one_shot else default_ctas), self.most_rows)
        return min(-(-grid // cluster) * cluster, most)

    def prepare(self, site: tuple, number: int, outputs: "Outputs", default_ctas: int) -> tuple[bytes, int, tuple]:
        """Copy inputs that the kernel cannot read in place, on the current stream, and pack the argument of the launch.

        default_ctas: see grid
        Returns (the packed launch, its number of CTAs, tensors that must stay alive until it has run).
        Raises RuntimeError for inputs that the kernel does not support.
        """
        x, residual, weight, bias, shift, eps, scale, offset, center, ctas, _, _, fp32_residual, sharded_residual, text, static_scale = site
        if fp32_residual is not sharded_residual:
            raise RuntimeError("over symmetric memory fp32_residual and sharded_residual must be equal")
        if text and not sharded_residual:
            raise RuntimeError("over symmetric memory only a site with a sharded residual quantises its norm")
        if shift is not None and not center:
            raise RuntimeError("only a LayerNorm has a shift")
        x_at = residual_at = weight_at = bias_at = shift_at = 0
        weight_is_float = shift_is_float = carried = False
        if self.one_shot:
            x_at = x.data_ptr()
            if x_at % 16 or not x.is_contiguous():
                x, x_at = _copied(x)
        elif x.data_ptr() != self.activations_at or not x.is_contiguous():
            self.partials.copy_(x)  # two_shot reads x in the workspace
        if residual is not None:
            residual_at = residual.data_ptr()
            carried = residual_at == self.carried_at
            if not carried and residual.dtype is torch.float32 is not self.dtype and residual.shape == self.shape:
                _carry(residual, self.workspace.carried, *self.own)
                residual_at, carried = self.carried_at, True
            if not carried:
                if residual.dtype is not self.dtype or residual.shape != self.shape:
                    raise RuntimeError(f"residual is {residual.dtype} {[*residual.shape]}, but x is {x.dtype} {[*x.shape]}")
                if residual_at % 16 or not residual.is_contiguous():
                    residual, residual_at = _copied(residual)
        if weight is not None:
            weight_is_float = weight.dtype is not self.dtype and _is_float("weight", weight, x)
            weight_at = weight.data_ptr()
            if weight_at % 16 or not weight.is_contiguous():
                weight, weight_at = _copied(weight)
        if bias is not None:
            if bias.dtype is not self.dtype:
                raise RuntimeError(f"bias is {bias.dtype}, but x is {x.dtype}: bias must have the dtype of x")
            bias_at = bias.data_ptr()
            if bias_at % 16 or not bias.is_contiguous():
                bias, bias_at = _copied(bias)
        if shift is not None:
            shift_is_float = shift.dtype is not self.dtype and _is_float("shift", shift, x)
            shift_at = shift.data_ptr()
            if shift_at % 16 or not shift.is_contiguous():
                shift, shift_at = _copied(shift)
        if text:
            self._set_quantised(text, outputs.quantised, static_scale)
        self._set(
            self.rows, x_at, residual_at, bias_at, weight_at, outputs.norm_at,
            self.carried_at if sharded_residual else outputs.whole_residual.data_ptr(), number, weight_is_float, carried,
            not sharded_residual, eps, scale, offset, shift_is_float, shift_at,
        )  # fmt: skip
        launch, grid = self.launch(center, text, ctas, default_ctas)
        return launch, grid, (x, residual, weight, bias, shift, static_scale)

    def _set_quantised(self, quantise: str, quantised: tuple[Tensor, ...], static_scale: Tensor | None) -> None:
        q, *scales = quantised
        static_at = 0
        if not scales:
            if static_scale is None or static_scale.dtype is not torch.float32 or static_scale.numel() != 1:
                raise RuntimeError("the scale of a quantisation per tensor must be one number in float32")
            static_at = static_scale.data_ptr()
        self.arguments.set_quantised(q.data_ptr(), scales[0].data_ptr() if scales else 0, static_at, *numbers_of(quantise))


def _carry(residual: Tensor, carried: Tensor, first: int, end: int) -> None:
    """Put rows of a float32 residual in the order of a carried one: of each vector of 8 values the first 4, then the others. vector.cuh"""
    rows = residual.reshape(-1, residual.shape[-1])[first:end]
    carried[: len(rows)].view(len(rows), 2, -1, 4).copy_(rows.view(len(rows), -1, 2, 4).transpose(1, 2))


def _with_own_storage(t: Tensor) -> Tensor:
    """A tensor with the memory of t and another storage. It keeps the memory alive, and is never an inference tensor."""
    with torch.inference_mode(False):
        return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(t))


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor with the shape and dtype of x, with undefined values."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _copied(t: Tensor) -> tuple[Tensor, int]:
    """(a copy of t that is contiguous and 16-byte aligned, as the kernels need it; its address)"""
    t = t.clone(memory_format=torch.contiguous_format)
    return t, t.data_ptr()


def _is_float(name: str, vector: Tensor, x: Tensor) -> bool:
    """True for a float32 vector. Raises RuntimeError for another one, whose dtype is not that of x either."""
    if vector.dtype is not torch.float32:
        raise RuntimeError(f"{name} is {vector.dtype}, but x is {x.dtype}: {name} must have the dtype of x, or float32")

    return True
