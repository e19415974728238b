"""The SM carveout: GEMMs that run beside a communication kernel leave it as many SMs as it has CTAs.

A GEMM that counts on all SMs has a last wave for a few of its tiles, in which the others wait. cuBLASLt picks its kernel and its grid for
the SMs that the carveout leaves; cuBLAS, which PyTorch would take for most GEMMs, knows no carveout.

It is a setting of the whole process. So it is counted for the whole process, too: what was set before comes back with the last one that
has asked, whichever groups and threads they are of. Until then GEMMs of other threads have the same carveout, which costs them some
SMs, and may pick other kernels for them.
"""

import threading

import torch

from ...compat import BlasBackend, get_blas_preferred_backend, get_sm_carveout, has, set_blas_preferred_backend, set_sm_carveout

# CTAs up to which it helps. On H200s the kernels that cuBLASLt picks for more than 8 SMs fewer than there are are slower than those
# for all of them (benchmarks/results/schedule-*.json).
MAX_CTAS = 8

# The library of a CPU build, and what a later PyTorch may have no more: both are experimental in 2.13.
_HAS_CARVEOUT = torch.version.cuda is not None and has(set_sm_carveout)

_lock = threading.Lock()
_askers, _before = 0, None  # how many have asked and not yet taken it back; what was set before the first of them


def leave_out(ctas: int) -> bool:
    """From now on, and in whatever CUDA graph is being captured, GEMMs leave so many SMs to others, if nobody has asked for some before.

    Returns whether that was done: ``as_before`` must follow.
    """
    global _askers, _before
    if ctas > MAX_CTAS or not _HAS_CARVEOUT:
        return False
    with _lock:
        if _askers == 0:
            _before = get_blas_preferred_backend(), get_sm_carveout()
            _set(BlasBackend.Cublaslt, ctas)
        _askers += 1
    return True


def as_before() -> None:
    """Take back what ``leave_out`` has done. The last one brings back what was set before the first."""
    global _askers, _before
    with _lock:
        _askers -= 1
        if _askers == 0:
            _set(*_before)
            _before = None


def _set(backend, carveout) -> None:
    set_blas_preferred_backend(backend)
    set_sm_carveout(carveout)
