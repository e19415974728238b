"""The SM carveout: GEMMs that run beside a communication kernel leave it as many SMs as it has CTAs.

A GEMM that expects all SMs has a last wave with few tiles, in which most SMs are idle. cuBLASLt chooses its kernel and grid for the SMs
that the carveout leaves. cuBLAS, which PyTorch uses for most GEMMs, has no carveout.

The carveout is a setting of the process. So its uses are counted for the process: the last release restores the setting from before the
first reservation, whichever groups and threads they are of. Until then GEMMs of other threads have the same carveout, which costs them
some SMs, and may change their kernels.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ...compat import BlasBackend, get_blas_preferred_backend, get_sm_carveout, has, set_blas_preferred_backend, set_sm_carveout

# The largest useful carveout. On H200s the kernels that cuBLASLt chooses with a carveout of more than 8 SMs are slower than those for
# all SMs (benchmarks/results/schedule-*.json).
MAX_CTAS = 8

# False for a CPU build, and for a later PyTorch without these settings, which are experimental in 2.13.
_HAS_CARVEOUT = torch.version.cuda is not None and has(set_sm_carveout)

_lock = threading.Lock()
_reservations = 0
_saved: tuple[Any, Any] = None, None  # BLAS backend and SM carveout from before the first reservation


def reserve_sms(ctas: int) -> bool:
    """Let GEMMs leave ``ctas`` SMs to other kernels, also in a CUDA graph under capture. An earlier reservation keeps its number.

    Returns False, and does nothing, if a carveout is not possible or not useful. Otherwise ``release_sms`` must follow.
    """
    global _reservations, _saved
    if ctas > MAX_CTAS or not _HAS_CARVEOUT:
        return False
    with _lock:
        if _reservations == 0:
            _saved = get_blas_preferred_backend(), get_sm_carveout()
            _set(BlasBackend.Cublaslt, ctas)
        _reservations += 1
    return True


def release_sms() -> None:
    """Undo one ``reserve_sms``. The last one restores the settings."""
    global _reservations, _saved
    with _lock:
        _reservations -= 1
        if _reservations == 0:
            _set(*_saved)
            _saved = None, None


@contextlib.contextmanager
def reserved(ctas: int) -> Iterator[None]:
    """``reserve_sms`` for all GEMMs that are launched in it; nothing for 0 CTAs. It also decorates functions."""
    reserves = ctas > 0 and reserve_sms(ctas)
    try:
        yield
    finally:
        if reserves:
            release_sms()


def _set(backend: Any, carveout: int | None) -> None:
    set_blas_preferred_backend(backend)
    set_sm_carveout(carveout)
