"""Which implementation carries a group's sites: chosen once for each group and device, the same on all its ranks."""

import gc
import json
import logging

import torch
import torch.distributed as dist

from ..options import TokenWeaveError
from ..compat import resolve_process_group
from . import agree
from .process_group import ProcessGroup
from .reference import add_norm
from .symmetric import Symmetric
from .tuning import Tuning, by_rule

log = logging.getLogger("tw_compile")

_SYMMETRIC = {"multimem": True, "peer": False}  # name -> does it use multicast
_ORDER = ("multimem", "peer", "process_group")
chosen = {}  # (group name, device, requested transport) -> implementation


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


def choose(
    requested: str, group_name: str, device: torch.device, timeout_s: float | None = None
) -> tuple["ProcessGroup | Symmetric", str]:
    """The implementation for a group, and why it is not a better one (empty where it is the best).

    timeout_s: how long its kernels wait for another rank from now on; None leaves that as it is

    A collective on CUDA groups the first time it is asked for a group: the ranks agree, so that all take the same path.
    Raises TokenWeaveError on every rank where a requested transport is missing on any of them.
    """
    key = group_name, device, requested
    if key not in chosen:
        usable, reasons = candidates(requested, group_name, device)
        if device.type == "cuda":
            usable, reasons = _agree(group_name, usable, reasons)
        implementation = None
        while usable and implementation is None:
            if usable[0] in _SYMMETRIC and (reason := _failed_self_test(usable[0], group_name, device)):
                reasons[usable.pop(0)] = reason
            else:
                implementation = _make(usable[0], group_name, device)
        why_not = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        if implementation is None:
            raise TokenWeaveError(f"option 'tokenweave.transport' is {requested!r}, which is not possible here: {why_not}")
        if device.type == "cuda" and why_not:
            log.warning("transport of group %s is %s; %s", group_name, implementation.name, why_not)
        chosen[key] = implementation, why_not
    if timeout_s is not None and chosen[key][0].name in _SYMMETRIC:
        chosen[key][0].set_timeout(timeout_s)
    return chosen[key]


def another(requested: str, group_name: str, device: torch.device) -> "ProcessGroup | Symmetric":
    """An implementation like the chosen one that shares nothing with it: its memory is free again when it is dropped."""
    return _make(choose(requested, group_name, device)[0].name, group_name, device)


def _make(name: str, group_name: str, device: torch.device, tuning: Tuning | None = None) -> "ProcessGroup | Symmetric":
    if name in _SYMMETRIC:
        return Symmetric(group_name, device, multicast=_SYMMETRIC[name], tuning=tuning)
    return ProcessGroup(group_name, device)


def _failed_self_test(name: str, group_name: str, device: torch.device) -> str | None:
    """How small calls of a transport differ from the process group's answer, on any rank; None if they do not. A collective.

    The kernels must not be wrong in silence on a machine that this project has not: multimem has never been run. They are not tuned
    before they are known to be right.
    """
    group = resolve_process_group(group_name)
    implementation = _make(name, group_name, device, by_rule(group.size()))
    generator = torch.Generator().manual_seed(group.rank())
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, torch.bfloat16)  # noqa: E731
    site = None, None, None, None, 1e-5, 1.0, 0.0, False  # an RMSNorm of the sum alone
    reason = None
    with torch.inference_mode(False), torch.no_grad():
        for rows in (5, 31, 64):  # all kernels
            x = draw(rows, 512)
            total = x.float()
            dist.all_reduce(total, group=group)
            wanted = add_norm(total, *site)
            got = implementation.fused(x, *site, 0, 0, 0, False, False, False)
            for what, ours, right in zip(("norm", "residual"), got, wanted):
                error = ((ours.float() - right).norm() / right.norm()).item()
                if not error < 0.02:  # bfloat16 rounds by 0.004 at most
                    reason = f"its self-test failed: the {what} of {rows} tokens is off by {error:.1e} on rank {group.rank()}"
    answers = agree.exchange(group_name, f"the self-test of transport {name}", reason or "")
    del implementation
    gc.collect()  # its workspaces, of which some things refer to each other
    return next((answer for answer in answers if answer), None)


def _agree(group_name, usable, reasons):
    """What every rank of the group can use, and the first reason against each of the rest: the same on all of them."""
    said = agree.exchange(group_name, "the choice of a transport", json.dumps((agree.version(), usable, reasons)))
    answers = [json.loads(answer) for answer in said]
    versions = {version for version, _, _ in answers}
    if len(versions) > 1:
        raise TokenWeaveError(f"the ranks of group {group_name} run different versions: {sorted(versions)}")
    against = {}
    for rank, (_, _, theirs) in enumerate(answers):
        for name, reason in theirs.items():
            against.setdefault(name, f"{reason} (rank {rank})")
    return [name for name in usable if name not in against], against
