"""The macros and the launch argument of the kernels in csrc/, and the error record that a kernel writes before it gives up."""

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch

from ...quantise import HOWS, read
from ...wording import count
from .layout import Layout

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# As in csrc/sync.cuh: kErrorMagic, the words that give_up writes, kOtherCall, and the bits of a flag.
_ERROR_MAGIC = 0x7457F417
_ERROR_WORDS = 7
_OTHER_CALL = 2
_ROW_BITS, _SITE_BITS = 18, 10

_RESTART = (
    "All ranks of a tensor-parallel group must run the same model on the same number of tokens, in the same order. The CUDA context is "
    "lost. Restart all ranks."
)


def macros(
    dtype: torch.dtype, hidden: int, world: int, rank: int, transport: str, center: bool, layout: Layout, output: str = ""
) -> dict[str, object]:
    """The macros that a kernel is compiled with.

    transport: "peer" or "multimem"; center: True for a LayerNorm; output: what the norm is quantised to, as ``Planned`` has it
    """
    return {
        "TW_ELEMENT": ELEMENTS[dtype],
        "TW_HIDDEN": hidden,
        "TW_WORLD": world,
        "TW_RANK": rank,
        "TW_TRANSPORT": transport.capitalize(),
        "TW_NORM": "LayerNorm" if center else "RmsNorm",
        "TW_OUTPUT": output.capitalize() or "Plain",
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
    """The argument of a launch: ``Site`` in csrc/site.cuh. The part that is the same for all calls in a workspace is packed once.

    ``set(rows, x, residual, bias, weight, norm_out, residual_out, site, weight_is_float, takes_carried, whole_residual, eps, scale,
    offset, shift_is_float, shift)`` packs the part of a call, and ``set_quantised(quantised_out, scale_out, static_scale,
    *numbers_of(quantise))`` what only the kernels of quantised norms read.
    """

    _CALL, _QUANTISED = struct.Struct("<I6Q4I3fIQ"), struct.Struct("<3Q7f3I")

    def __init__(
        self,
        rank: int,
        workspaces: Sequence[int],
        pads: Sequence[int],
        multicast: int,
        epochs: int,
        error: int,
        timeout_s: float,
        whole_residual_at: int,
        staging_at: int,
        scales_at: int,
    ) -> None:
        """workspaces, pads: addresses of each rank's memory, in rank order; multicast, epochs, error: addresses, 0 for none

        timeout_s:                     seconds that a kernel waits for another rank
        whole_residual_at, staging_at, scales_at: byte offsets in a workspace
        """
        world = len(workspaces)
        rotated = [(rank + i) % world for i in range(world)]
        fixed = struct.Struct(f"<{2 * world + 7}QI")
        self._buffer = ctypes.create_string_buffer(self.size(world))
        self.set = functools.partial(self._CALL.pack_into, self._buffer, fixed.size)
        self.set_quantised = functools.partial(self._QUANTISED.pack_into, self._buffer, fixed.size + self._CALL.size)
        self._timeout_at = 8 * (2 * world + 3)
        fixed.pack_into(
            self._buffer,
            0,
            *(workspaces[r] for r in rotated),
            *(pads[r] for r in rotated),
            multicast,
            epochs,
            error,
            0,
            whole_residual_at,
            staging_at,
            scales_at,
            rank,
        )
        self.set_timeout(timeout_s)
        self.address = ctypes.addressof(self._buffer)

    def set_timeout(self, timeout_s: float) -> None:
        struct.pack_into("<Q", self._buffer, self._timeout_at, int(timeout_s * 1e9))

    @classmethod
    def size(cls, world: int) -> int:
        """Bytes of the argument for a number of ranks."""
        return struct.calcsize(f"<{2 * world + 7}QI") + cls._CALL.size + cls._QUANTISED.size


@functools.cache
def numbers_of(quantise: str) -> tuple:
    """What ``Arguments.set_quantised`` takes of a quantisation, a ``quantise.Quantise`` as text."""
    how = read(quantise)
    return *how[4:11], HOWS.index(how.how), how.narrow, how.keeps_norm


class ErrorRecord:
    """The error that a kernel writes before it gives up, in pinned host memory, which can be read after the CUDA context is lost.

    address: for the kernels
    words:   its content. The first word is 0 if there is no error
    """

    def __init__(self) -> None:
        self._memory = torch.zeros(_ERROR_WORDS, dtype=torch.int32, pin_memory=True)
        self.address: int = self._memory.data_ptr()
        self.words = memoryview((ctypes.c_uint32 * _ERROR_WORDS).from_address(self.address)).cast("B").cast("I")  # faster to read

    def raise_if_set(self, timeout_s: float, cause: BaseException | None = None) -> None:
        """Raise RuntimeError from ``cause`` if there is an error. timeout_s: seconds that the kernel has waited, for the message"""
        if self.words[0] != _ERROR_MAGIC:
            return
        _, rank, site, peer, phase, rows, call_of_peer = self.words
        if phase == _OTHER_CALL:
            site_of_peer, rows_of_peer = call_of_peer >> _ROW_BITS, call_of_peer & ((1 << _ROW_BITS) - 1)
            here = f"rank {rank} is at the all-reduce of site {site} with {count(rows, 'token')}, but rank {peer} is "
            if site_of_peer != site % (1 << _SITE_BITS):
                there = f"at that of site {site_of_peer} with {count(rows_of_peer, 'token')}"
            else:
                there = f"there with another number of tokens, {rows_of_peer}"
            raise RuntimeError(f"{here}{there}. {_RESTART}") from cause
        place = "finish" if phase else "begin"
        raise RuntimeError(
            f"rank {rank} waited {timeout_s:g} s for rank {peer} to {place} the all-reduce of site {site}, and gave up. "
            f"Rank {peer} has died, hangs, or runs another model or number of tokens: see its log. {_RESTART}"
        ) from cause
