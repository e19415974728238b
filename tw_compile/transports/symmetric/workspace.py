"""The memory that all ranks have mapped for the calls of a slot, and the kernels that work on it."""

import functools
import json
from dataclasses import asdict

import torch

from ...compat import symmetric_memory
from .. import agree
from ..together import together
from . import tuning
from .arguments import Arguments
from .tuning import LEAST_ROWS, Tuning


class Workspace:
    """Symmetric memory for calls of up to ``rows`` rows, and the kernels that work on it. A collective of the group.

    Raises WorkspaceError on all ranks where a rank cannot make it.

    activations, whole_residual: [rows, hidden] tensors of dtype
    carried:                     a [rows, hidden] tensor of float32. Of LEAST_ROWS rows or more, a rank has half of them
                                 at most, in the front of it; behind that it overlaps with whole_residual
    tuning:                      the owner's; otherwise that of the first rank that knows one, or what all now measure
    """

    def __init__(self, owner, dtype: torch.dtype, hidden: int, rows: int):
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
        self.bytes = epochs_at + 4 * self.max_ctas

        ours = f"{rows} tokens of {dtype} [{hidden}], {self.bytes} bytes"
        mine = owner.tuning or tuning.known(owner, dtype, hidden)
        message = ours + "\n" + json.dumps(mine and asdict(mine))
        said = agree.exchange(owner.group_name, f"the making of a workspace for up to {ours}", message, owner.timeout_s)
        made, _, tunings = zip(*(theirs.partition("\n") for theirs in said))
        if len(set(made)) > 1:
            raise RuntimeError(
                f"the ranks of group {owner.group_name} run different things, and so make different workspaces: "
                + "; ".join(f"rank {r}: for up to {theirs}" for r, theirs in enumerate(made))
            )
        known = next((Tuning.from_dict(theirs) for theirs in map(json.loads, tunings) if theirs), None)
        self.tuning = known or tuning.measure(owner, dtype, hidden, self.max_ctas)

        def allocate():
            memory = symmetric_memory.empty(self.bytes, dtype=torch.uint8, device=owner.device)
            memory.zero_()  # the epochs
            # No rank begins the rendezvous before all have come here: nobody's flag can be overwritten by another's zeros.
            torch.cuda.synchronize(owner.device)
            return memory

        def meet():
            handle = symmetric_memory.rendezvous(memory, owner.group_name)  # which gives up when the group's store does
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
        )
        names = {self.tuning.kernel_of(r) for r in (range(1, rows + 1) if one_shot else (rows,))}
        # center -> name -> Kernel. All names at once: a CUDA graph of another number of rows may be captured next.
        self.kernels = functools.cache(lambda center: owner.kernels(names, dtype, hidden, center))
