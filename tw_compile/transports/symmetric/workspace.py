"""The workspaces: symmetric memory for the calls of a slot, and the kernels that use it."""

import functools
import json
from dataclasses import asdict
from typing import Any

import torch

from ...compat import symmetric_memory
from ...wording import count
from .. import agree
from ..together import together
from . import tuning
from .arguments import Arguments
from .tuning import LEAST_ROWS, Tuning


class Workspace:
    """Symmetric memory for calls of up to ``rows`` rows, and the kernels that use it.

    activations, whole_residual: [rows, hidden] tensors of dtype
    carried:                     [rows, hidden] tensor of float32. With more than LEAST_ROWS rows a rank uses at most the first half of
                                 it, and the second half overlaps with whole_residual
    tuning:                      that of the owner; or else of the first rank that knows one; or else the ranks measure one
    quantised, scales:           [rows, hidden] tensor of uint8, and a tensor of float32, which together have the memory of whole_residual
    kernels(center, output):     name -> Kernel, for a LayerNorm or an RMSNorm, and what the norm is quantised to, as ``Planned`` has it
    max_ctas:                    CTAs for which the signal pad has flags
    bytes:                       size of the symmetric memory
    """

    def __init__(self, owner: Any, dtype: torch.dtype, hidden: int, rows: int) -> None:
        """A collective of the group. owner: Symmetric

        Raises RuntimeError if the ranks make different workspaces, and WorkspaceError on all ranks if a rank cannot make it.
        """
        rank, world = owner.rank, owner.world
        torch.cuda.set_device(owner.device)
        self.max_ctas = symmetric_memory.get_signal_pad_size() // 4 // world
        row_bytes = hidden * dtype.itemsize
        one_shot = rows == LEAST_ROWS
        region, carried = rows * row_bytes, rows * hidden * 4
        staging = 2 * (LEAST_ROWS - 1) * row_bytes if one_shot else 0
        whole_residual_at = region + (carried if one_shot else carried // 2)
        staging_at = whole_residual_at + region
        epochs_at = staging_at + staging
        self.bytes: int = epochs_at + 4 * self.max_ctas

        ours = f"{count(rows, 'token')} of {dtype} [{hidden}], {self.bytes} bytes"
        mine = owner.tuning or tuning.known(owner, dtype, hidden)
        message = ours + "\n" + json.dumps(mine and asdict(mine))
        said = agree.exchange(owner.group_name, f"the set-up of a workspace for up to {ours}", message, owner.timeout_s)
        made, _, tunings = zip(*(theirs.partition("\n") for theirs in said))
        if len(set(made)) > 1:
            raise RuntimeError(
                f"the ranks of group {owner.group_name} make different workspaces: "
                + "; ".join(f"rank {r}: for up to {theirs}" for r, theirs in enumerate(made))
                + ". All ranks of a tensor-parallel group must run the same model on the same number of tokens"
            )
        known = next((Tuning.from_dict(theirs) for theirs in map(json.loads, tunings) if theirs), None)
        self.tuning = known or tuning.measure(owner, dtype, hidden, self.max_ctas)

        def allocate() -> Any:
            memory = symmetric_memory.empty(self.bytes, dtype=torch.uint8, device=owner.device)
            memory.zero_()  # the epochs
            # No rank begins the rendezvous before all ranks have reached this point, so that the zeros overwrite no flag.
            torch.cuda.synchronize(owner.device)
            return memory

        def meet() -> Any:
            handle = symmetric_memory.rendezvous(memory, owner.group_name)  # has the timeout of the group's store
            if handle.rank != rank or handle.world_size != world:
                raise RuntimeError(f"rendezvous of group {owner.group_name} gave rank {handle.rank} of {handle.world_size}")
            if owner.name == "multimem" and handle.multicast_ptr == 0:
                raise RuntimeError("the group's symmetric memory has no multicast address: use transport 'peer'")
            return handle

        memory = together(owner.group_name, f"the allocation of a workspace for up to {ours}", allocate, owner.timeout_s)
        handle = together(owner.group_name, f"the rendezvous of a workspace for up to {ours}", meet, owner.timeout_s)
        here = memory.data_ptr()
        offset = here - handle.buffer_ptrs[rank]
        self.memory, self.handle = memory, handle
        self.activations = memory[:region].view(dtype).view(rows, hidden)
        self.carried = memory[region : region + carried].view(torch.float32).view(rows, hidden)
        self.whole_residual = memory[whole_residual_at:staging_at].view(dtype).view(rows, hidden)
        scales_at = whole_residual_at + rows * hidden
        self.quantised = memory[whole_residual_at:scales_at].view(rows, hidden)
        self.scales = memory[scales_at:staging_at].view(torch.float32)
        self.arguments = Arguments(
            rank,
            [pointer + offset for pointer in handle.buffer_ptrs],
            handle.signal_pad_ptrs,
            handle.multicast_ptr if owner.name == "multimem" else 0,
            here + epochs_at,
            owner.error_address,
            owner.timeout_s,
            whole_residual_at,
            staging_at,
            scales_at,
        )
        names = {self.tuning.kernel_of(r) for r in (range(1, rows + 1) if one_shot else (rows,))}
        # All names are loaded at once, as a CUDA graph for another number of rows may be captured next.
        self.kernels = functools.cache(lambda center, output: owner.kernels(names, dtype, hidden, center, output))
