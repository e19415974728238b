"""Whether the transports over symmetric memory can be used on this machine."""

import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from ...compat import DeviceType, SymmetricMemory, resolve_process_group
from . import host, nvrtc


def unavailable(group_name: str, device: torch.device, multicast: bool) -> str | None:
    """Why this rank cannot use the transport; None if it can. It asks no other rank. multicast: True for multimem"""
    world = resolve_process_group(group_name).size()
    return unavailable_to(world, device, multicast, lambda index: _not_neighbours(group_name, index))


def unavailable_to(world: int, device: torch.device, multicast: bool, not_neighbours: Callable[[int], str | None]) -> str | None:
    """The same for a group of ``world`` ranks, which need not exist.

    not_neighbours: index of a GPU -> why it cannot reach the memory of the other GPUs of the group, or None
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs NVIDIA GPUs"
    if not 2 <= world <= 8:
        return f"it supports 2 to 8 ranks, and the group has {world}"
    if reason := nvrtc.missing() or host.missing():
        return reason
    index = torch.cuda.current_device() if device.index is None else device.index
    needed, capability = ((9, 0) if multicast else (8, 0)), torch.cuda.get_device_capability(index)
    if capability < needed:
        return f"it needs compute capability {needed[0]}.{needed[1]}, and this GPU has {capability[0]}.{capability[1]}"
    if reason := not_neighbours(index):
        return reason
    if multicast and not has_multicast(index):
        return "there is no NVLink multicast here, or it is switched off"
    return None


def unreachable(index: int, others: Iterable[int]) -> str | None:
    """Why a GPU cannot reach the memory of other GPUs of this machine; None if it can."""
    for other in others:
        if other != index and not torch.cuda.can_device_access_peer(index, other):
            return f"GPU {index} cannot reach the memory of GPU {other}"
    return None


def _not_neighbours(group_name: str, index: int) -> str | None:
    """Why the GPUs of a group cannot reach each other's memory; None if they can, or if this rank cannot know."""
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # set by torchrun
    if on_host == 0:
        return None
    ranks = dist.get_process_group_ranks(resolve_process_group(group_name))
    if len({rank // on_host for rank in ranks}) > 1:
        return "the ranks of the group are not all on one host"
    if torch.cuda.device_count() < on_host:
        return None  # each rank sees only its own GPU
    return unreachable(index, (rank % on_host for rank in ranks))


def has_multicast(index: int) -> bool:
    """Whether a GPU has NVLink multicast that is not disabled. Allocates nothing."""

    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0") not in ("", "0"):
        return False
    return SymmetricMemory.has_multicast_support(DeviceType.CUDA, index)
