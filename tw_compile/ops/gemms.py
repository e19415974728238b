"""GEMMs that run beside a communication kernel are told how many SMs it leaves them.

A GEMM that counts on all SMs has a last wave for a few of its tiles, in which the others wait. cuBLASLt picks its kernel and its grid for
so many SMs as it is told; cuBLAS, which PyTorch would take for most GEMMs, cannot be told.
"""

import torch

# CTAs up to which it helps. On H200s the kernels that cuBLASLt picks for more than 8 SMs fewer than there are are slower than those
# for all of them (benchmarks/results/schedule-*.json).
MAX_CTAS = 8

# The library of a CPU build, and what a later PyTorch may have no more: both are experimental in 2.13.
_CAN_BE_TOLD = torch.version.cuda is not None and hasattr(torch._C, "_set_sm_carveout_experimental")


def leave_out(ctas: int) -> tuple | None:
    """From now on, and in whatever CUDA graph is being captured, GEMMs leave so many SMs to others.

    Returns what ``as_before`` takes; None if nothing was changed.
    """
    if ctas > MAX_CTAS or not _CAN_BE_TOLD:
        return None
    before = torch._C._get_blas_preferred_backend(), torch._C._get_sm_carveout_experimental()
    torch._C._set_blas_preferred_backend(torch._C._BlasBackend.Cublaslt)
    torch._C._set_sm_carveout_experimental(ctas)
    return before


def as_before(before: tuple | None) -> None:
    if before is not None:
        torch._C._set_blas_preferred_backend(before[0])
        torch._C._set_sm_carveout_experimental(before[1])
