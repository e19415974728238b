"""What a kernel is compiled for and what a launch is given, as csrc/ has it; and what a kernel that gives up leaves behind."""

import ctypes
import functools
import struct

import torch

from .layout import Layout

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# csrc/sync.cuh, kErrorMagic
_ERROR_MAGIC = 0x7457F417
_ERROR_WORDS = 7
_OTHER_CALL = 2
_ROW_BITS, _SITE_BITS = 18, 10  # of a flag


def macros(dtype: torch.dtype, hidden: int, world: int, rank: int, transport: str, center: bool, layout: Layout) -> dict[str, object]:
    """What a kernel is compiled for. transport: "peer" or "multimem"; center: LayerNorm, not RMSNorm."""
    return {
        "TW_ELEMENT": ELEMENTS[dtype],
        "TW_HIDDEN": hidden,
        "TW_WORLD": world,
        "TW_RANK": rank,
        "TW_TRANSPORT": transport.capitalize(),
        "TW_NORM": "LayerNorm" if center else "RmsNorm",
        "TW_THREADS": layout.threads,
        "TW_UNROLL": layout.unroll,
        "TW_CHUNKS": layout.chunks,
        "TW_GROUPS": layout.groups,
        "TW_CLUSTER": layout.cluster,
        "TW_DEPTH": layout.depth,
        "TW_SHARED_BYTES": layout.shared[0],
        "TW_SITE_BYTES": Arguments.size(world),
    }


class Arguments:
    """The argument of a launch (csrc/site.cuh, Site), packed once but for what changes from call to call.

    All pointers are addresses; ``workspaces`` and ``pads`` in rank order.

    set(rows, x, residual, bias, weight, norm_out, residual_out, site, weight_is_float, takes_carried, whole_residual, eps, scale,
    offset, shift_is_float, shift) packs what changes.
    """

    _CALL = struct.Struct("<I6Q4I3fIQ")

    def __init__(self, rank, workspaces, pads, multicast, epochs, error, timeout_s, whole_residual_at, staging_at):
        world = len(workspaces)
        turned = [(rank + i) % world for i in range(world)]
        fixed = struct.Struct(f"<{2 * world + 6}QI")
        self._buffer = ctypes.create_string_buffer(self.size(world))
        self.set = functools.partial(self._CALL.pack_into, self._buffer, fixed.size)
        self._timeout_at = 8 * (2 * world + 3)
        fixed.pack_into(
            self._buffer,
            0,
            *(workspaces[r] for r in turned),
            *(pads[r] for r in turned),
            multicast,
            epochs,
            error,
            0,
            whole_residual_at,
            staging_at,
            rank,
        )
        self.set_timeout(timeout_s)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._buffer))
        self.address = ctypes.addressof(self._pointers)

    def set_timeout(self, timeout_s: float) -> None:
        struct.pack_into("<Q", self._buffer, self._timeout_at, int(timeout_s * 1e9))

    @classmethod
    def size(cls, world: int) -> int:
        return struct.calcsize(f"<{2 * world + 6}QI") + cls._CALL.size


class ErrorRecord:
    """Where a kernel that gives up waiting says so: pinned host memory, readable when the CUDA context is lost."""

    def __init__(self):
        self._memory = torch.zeros(_ERROR_WORDS, dtype=torch.int32, pin_memory=True)
        self.address = self._memory.data_ptr()
        self.words = (ctypes.c_uint32 * _ERROR_WORDS).from_address(self.address)  # the first is 0 as long as all is well

    def raise_if_set(self, timeout_s: float, cause: BaseException | None = None) -> None:
        if self.words[0] != _ERROR_MAGIC:
            return
        _, rank, site, peer, phase, rows, call_of_peer = self.words
        if phase == _OTHER_CALL:
            site_of_peer, rows_of_peer = call_of_peer >> _ROW_BITS, call_of_peer & ((1 << _ROW_BITS) - 1)
            here = f"rank {rank} is at the all-reduce of site {site} with {rows} tokens, but rank {peer} "
            if site_of_peer != site % (1 << _SITE_BITS):
                there = f"at that of site {site_of_peer} with {rows_of_peer} tokens"
            else:
                there = f"with another number of tokens, {rows_of_peer}"
            raise RuntimeError(
                f"{here}{there}: all ranks of a tensor-parallel group must run the same, in the same order. The CUDA context is "
                "lost: start all ranks again."
            ) from cause
        place = "at the end of" if phase else "to begin"
        raise RuntimeError(
            f"rank {rank} waited {timeout_s:g} s for rank {peer} {place} the all-reduce of site {site}, and gave up. "
            f"Either rank {peer} has died or hangs: see its log; or it runs another number of tokens, or another model: "
            "all ranks of a tensor-parallel group must run the same. The CUDA context is lost: start all ranks again."
        ) from cause
