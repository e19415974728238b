"""GEMMs that run beside a communication kernel are told how many SMs it leaves them.

A GEMM that counts on all SMs has a last wave for a few of its tiles, in which the others wait. cuBLASLt picks its kernel and its grid for
so many SMs as it is told; cuBLAS, which PyTorch would take for most GEMMs, cannot be told.
"""

import torch

from ..compat import BlasBackend, get_blas_preferred_backend, get_sm_carveout, has, set_blas_preferred_backend, set_sm_carveout

# CTAs up to which it helps. On H200s the kernels that cuBLASLt picks for more than 8 SMs fewer than there are are slower than those
# for all of them (benchmarks/results/schedule-*.json).
MAX_CTAS = 8

# The library of a CPU build, and what a later PyTorch may have no more: both are experimental in 2.13.
_CAN_BE_TOLD = torch.version.cuda is not None and has(set_sm_carveout)


def leave_out(ctas: int) -> tuple | None:
    """From now on, and in whatever CUDA graph is being captured, GEMMs leave so many SMs to others.

    Returns what ``as_before`` takes; None if nothing was changed.
    """
    if ctas > MAX_CTAS or not _CAN_BE_TOLD:
        return None
    before = get_blas_preferred_backend(), get_sm_carveout()
    set_blas_preferred_backend(BlasBackend.Cublaslt)
    set_sm_carveout(ctas)
    return before


def as_before(before: tuple | None) -> None:
    if before is not None:
        set_blas_preferred_backend(before[0])
        set_sm_carveout(before[1])
