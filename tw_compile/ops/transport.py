"""Which implementation carries a group's sites: chosen once for each group and device, the same on all its ranks."""

import logging

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from ..options import TokenWeaveError
from .process_group import ProcessGroup
from .symmetric import Symmetric

log = logging.getLogger("tw_compile")

_SYMMETRIC = {"multimem": True, "peer": False}  # name -> does it use multicast
_ORDER = ("multimem", "peer", "process_group")
_chosen = {}  # (group name, device, requested transport) -> implementation


def unavailable(transport: str, group_name: str, device: torch.device) -> str | None:
    """Why this rank cannot use a transport for a group, or None. Local: no rank is asked."""
    if transport == "process_group":
        return None
    return Symmetric.unavailable(group_name, device, multicast=_SYMMETRIC[transport])


def candidates(requested: str, group_name: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The transports this rank could use, best first, and the reasons against the others that were asked for."""
    names = _ORDER if requested == "auto" else (requested,)
    reasons = {name: unavailable(name, group_name, device) for name in names}
    return [n for n in names if reasons[n] is None], {n: r for n, r in reasons.items() if r is not None}


def choose(requested: str, group_name: str, device: torch.device) -> tuple["ProcessGroup | Symmetric", str]:
    """The implementation for a group, and why it is not a better one (empty where it is the best).

    A collective on CUDA groups the first time it is asked for a group: the ranks agree, so that all take the same path.
    Raises TokenWeaveError on every rank where a requested transport is missing on any of them.
    """
    key = group_name, device, requested
    if key not in _chosen:
        usable, reasons = candidates(requested, group_name, device)
        if device.type == "cuda":
            usable, reasons = _agree(group_name, usable, reasons)
        why_not = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        if not usable:
            raise TokenWeaveError(f"option 'tokenweave.transport' is {requested!r}, which is not possible here: {why_not}")
        name = usable[0]
        if name in _SYMMETRIC:
            implementation = Symmetric(group_name, device, multicast=_SYMMETRIC[name])
        else:
            implementation = ProcessGroup(group_name, device)
        if device.type == "cuda" and why_not:
            log.warning("transport of group %s is %s; %s", group_name, name, why_not)
        _chosen[key] = implementation, why_not
    return _chosen[key]


def _agree(group_name, usable, reasons):
    """What every rank of the group can use, and the first reason against each of the rest."""
    group = _resolve_process_group(group_name)
    answers = [None] * group.size()
    dist.all_gather_object(answers, (torch.__version__, usable, reasons), group=group)
    versions = {version for version, _, _ in answers}
    if len(versions) > 1:
        raise TokenWeaveError(f"the ranks of group {group_name} run different versions of torch: {sorted(versions)}")
    common = [name for name in usable if all(name in theirs for _, theirs, _ in answers)]
    for rank, (_, _, theirs) in enumerate(answers):
        for name, reason in theirs.items():
            reasons.setdefault(name, f"{reason} (rank {rank})")
    return common, reasons
