"""Chooses the transport of a group's sites, once for each group and device. All ranks of the group take the same one."""

import collections
import gc
import json
import logging
import threading
from typing import Any

import torch

from .. import compat
from ..compat import resolve_process_group
from ..options import TokenWeaveError
from ..site import Planned
from . import agree, link
from .chains import chains, difference
from .hierarchical import Hierarchical
from .low_bit import threshold
from .low_bit.transport import LowBit
from .process_group import ProcessGroup
from .symmetric import tuning
from .symmetric.transport import Symmetric
from .symmetric.tuning import MARGIN, Tuning, by_rule
from .together import WorkspaceError, together

log = logging.getLogger("tw_compile")

Transport = ProcessGroup | Symmetric

_SYMMETRIC = {"multimem": True, "peer": False}  # name -> whether it uses multicast
_HIERARCHICAL = "hierarchical"
_ORDER = ("multimem", "peer", _HIERARCHICAL, "process_group")
# (group name, device, ``Options.transport_and_wire``) -> (transport, why it is not a better one)
chosen: dict[tuple[str, torch.device, str], tuple[Transport, str]] = {}
# (group name, device) -> what lies between the ranks of a CUDA group: see ``link.measured``
links: dict[tuple[str, torch.device], str] = {}
# The lock of each group, by name. A thread holds it in a call, and while the ranks of the group agree.
_locks: collections.defaultdict[str, Any] = collections.defaultdict(threading.RLock)


def unavailable(name: str, group_name: str, device: torch.device) -> str | None:
    """Why this rank cannot use a transport for a group; None if it can. It asks no other rank."""
    if name == "process_group":
        return None
    if name == _HIERARCHICAL:
        ranks = resolve_process_group(group_name).size()
        return f"it needs two hosts with two ranks each, and the group has {ranks} ranks" if ranks < 4 else None
    return lacking(device) or Symmetric.unavailable(group_name, device, multicast=_SYMMETRIC[name])


def lacking(device: torch.device) -> str | None:
    """Why this PyTorch cannot run the transports over symmetric memory: names that it lacks. None if it has all, or if there is no GPU."""
    names = compat.missing_on_gpus() if device.type == "cuda" and torch.version.cuda is not None else []
    return f"PyTorch {torch.__version__} lacks names that it needs ({', '.join(names)})" if names else None


def candidates(requested: str, group_name: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """(the requested transports that this rank can use, best first; name -> why it cannot use the others)

    A small group has no hierarchy, and on a CPU nothing is measured: ``auto`` then does not ask for one.
    """
    requested = requested.partition(":")[0]
    names = _ORDER if requested == "auto" else (requested,)
    reasons = {name: unavailable(name, group_name, device) for name in names}
    if requested == "auto" and (device.type != "cuda" or reasons[_HIERARCHICAL]):
        del reasons[_HIERARCHICAL]
    return [n for n, r in reasons.items() if r is None], {n: r for n, r in reasons.items() if r is not None}


def may_be_symmetric(requested: str, group_name: str, device: torch.device) -> bool:
    """Whether, as far as this rank knows, sites of a group may use symmetric memory."""
    return any(name in _SYMMETRIC for name in candidates(requested, group_name, device)[0])


def may_be_hierarchical(requested: str, group_name: str, device: torch.device) -> bool:
    """The same of the transport across hosts."""
    return _HIERARCHICAL in candidates(requested, group_name, device)[0]


def choose(
    requested: str, group_name: str, device: torch.device, timeout_s: float | None = None
) -> tuple[Transport, str]:
    """The transport of a group, and why it is not a better one; '' if it is the best.

    requested: ``Options.transport_and_wire``: a transport, and behind a colon the bits of the wire if they are less than 16
    timeout_s: seconds that its kernels wait for another rank from now on; None leaves them as they are

    The first time for a group, it is a collective on CUDA groups, and on a CPU for hierarchical: the ranks agree on the transport.
    Raises TokenWeaveError on all ranks if a forced transport is unavailable on one of them.
    """
    key = group_name, device, requested
    with _locks[group_name]:
        if key not in chosen:
            usable, reasons = candidates(requested, group_name, device)
            if device.type == "cuda" or _HIERARCHICAL in usable:
                usable, reasons = _agree(group_name, usable, reasons)
            if device.type == "cuda" and (group_name, device) not in links:
                links[group_name, device] = link.measured(group_name, device)
            name = _best(usable, reasons, group_name, device)
            asked, *bits = requested.split(":")
            if name is None:
                raise TokenWeaveError(f"option 'tokenweave.transport' is {asked!r}, which is not possible here: {_listed(reasons)}")
            made, reason = _made(name, group_name, device), ""
            if bits:
                made, reason = _with_wire(made, int(bits[0]))
            why_not = _listed(reasons | ({f"wire of {bits[0]} bits": reason} if reason else {}))
            if device.type == "cuda" and why_not:
                log.warning("transport of group %s is %s; %s", group_name, made.name, why_not)
            made.lock = _locks[group_name]
            chosen[key] = made, why_not
        transport, why_not = chosen[key]
        if timeout_s is not None and isinstance(transport, Symmetric):
            transport.set_timeout(timeout_s)
        return transport, why_not


def fall_back(requested: str, group_name: str, device: torch.device, reason: str) -> None:
    """Use the process group's own collectives for a group from now on. All ranks of the group must call this."""
    name, (_, *bits) = chosen[group_name, device, requested][0].name, requested.split(":")
    log.warning("transport of group %s is process_group from here on; %s: %s", group_name, name, reason)
    made: Transport = _make("process_group", group_name, device)
    if bits:
        made, _ = _with_wire(made, int(bits[0]))
    made.lock = _locks[group_name]
    chosen[group_name, device, requested] = made, f"{name}: {reason}"


def forget(group_name: str) -> None:
    """Drop the transports of a destroyed group, and their memory. Another group may take its name."""
    for key in [key for key in chosen if key[0] == group_name]:
        del chosen[key]
    for where in [where for where in links if where[0] == group_name]:
        del links[where]
    gc.collect()  # frees its workspaces, which contain reference cycles


def is_process_group(group_name: str) -> bool:
    """Whether all chosen transports of a group are the process group's own collectives."""
    return all(transport.name == "process_group" for key, (transport, _) in chosen.items() if key[0] == group_name)


def is_over_process_group(requested: str, group_name: str, x: torch.Tensor) -> bool:
    """Whether the process group's own all-reduce carries a site. x: its partial sums; a comparison of a symbolic size is a guard"""
    transport, _ = chosen.get((group_name, x.device, requested), (None, ""))
    if isinstance(transport, LowBit):
        return bool(transport.in_16_bits(x))
    return transport is not None and transport.name == "process_group"


def another(requested: str, group_name: str, device: torch.device) -> Transport:
    """A new transport of the kind that is chosen, with memory of its own, which is freed when the transport is dropped.

    It is for measurements: see ``ProcessGroup.in_place``.
    """
    transport, _ = choose(requested, group_name, device)
    if isinstance(transport, LowBit | Hierarchical):
        made: Transport = transport.another(transport.least_bytes)
    else:
        made = _make(transport.name, group_name, device)
    return measured(made)


def measured(transport: Transport) -> Transport:
    """The same transport, for measurements."""
    if isinstance(transport, ProcessGroup):
        transport.in_place = True
    return transport


def workspace_bytes() -> dict[torch.device, int]:
    """Device -> bytes of symmetric memory that this process holds there, for all groups. PyTorch's allocator does not count them."""
    held: collections.Counter[torch.device] = collections.Counter()
    for transport, _ in [*chosen.values()]:
        held[transport.device] += transport.workspace_bytes()
    return {device: number for device, number in held.items() if number}


def _make(name: str, group_name: str, device: torch.device, tuning: Tuning | None = None) -> Transport:
    if name in _SYMMETRIC:
        return Symmetric(group_name, device, multicast=_SYMMETRIC[name], tuning=tuning)
    kind, *bits = name.split(":")
    if kind == _HIERARCHICAL:
        return Hierarchical(group_name, device, *map(int, bits))
    return LowBit(group_name, device, *map(int, bits)) if bits else ProcessGroup(group_name, device)


def _made(name: str, group_name: str, device: torch.device, tuning: Tuning | None = None) -> Transport:
    """Make a transport on all ranks or on none. A collective on CUDA groups."""
    if name == "process_group":
        return _make(name, group_name, device)
    what = f"the set-up of transport {name}"
    return together(group_name, what, lambda: _make(name, group_name, device, tuning), agree.PATIENCE_S)


def _best(usable: list[str], reasons: dict[str, str], group_name: str, device: torch.device) -> str | None:
    """The fastest of the usable transports that passes its self-test; None if none does. A collective on CUDA groups.

    Adds to ``reasons`` why others are not taken. All calls of a group have the same transport, even if the process group is faster for some
    numbers of tokens: its sums are rounded differently, and the bits of a row would then depend on the batch that it is in.
    """
    right: dict[str, Transport | None] = {}
    for name in usable:
        if right and device.type != "cuda":
            break  # nothing can be measured
        tested: Transport | None = None
        reason = None
        if name == "process_group":
            tested = measured(_make(name, group_name, device))
        else:
            tested, reason = self_tested(name, group_name, device)
        if reason is None:
            right[name] = tested
        else:
            reasons[name] = reason
    if len(right) < 2:
        return next(iter(right), None)
    seconds = {}
    try:
        seconds = tuning.compare(right, group_name, device, links.get((group_name, device), ""))
    except WorkspaceError as error:  # raised on all ranks
        log.warning("transports are not compared: %s. The first usable one is taken, %s", error, next(iter(right)))
    names = [*right]
    right.clear()
    gc.collect()  # frees the workspaces of the tested transports, which contain reference cycles
    best = fastest(names, seconds)
    reasons |= {
        name: f"it takes {seconds[name] / seconds[best]:.2f} times as long as {best} here" for name in names[: names.index(best)]
    }
    return best


def _with_wire(transport: Transport, bits: int) -> tuple[Transport, str]:
    """(a transport whose values have so many bits, ''); or (the same transport, why not). A collective on CUDA groups."""
    group_name, device, name = transport.group_name, transport.device, f"{transport.name}:{bits}"
    if transport.name in _SYMMETRIC:
        return transport, f"transport {transport.name} is taken, which sends values in the model's dtype; process_group has {bits} bits"
    if device.type != "cuda":
        return _make(name, group_name, device), ""  # nothing can be measured: as asked, whatever the size
    packed, reason = self_tested(name, group_name, device)
    if not isinstance(packed, LowBit | Hierarchical) or reason:
        return transport, str(reason)
    least = threshold.least_bytes(packed, links[group_name, device])
    if least is None:
        return transport, "it is not faster than bfloat16 here, as measured"
    return packed.another(least), ""


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def fastest(names: list[str], seconds: dict[str, float]) -> str:
    """The first of the names that is as fast as the fastest, within MARGIN; the first of all if there are no measurements.

    seconds: name -> seconds of a call
    """
    least = min(seconds.values(), default=0.0)
    return next((name for name in names if seconds and seconds[name] * (1 - MARGIN) <= least), names[0])


def self_tested(name: str, group_name: str, device: torch.device) -> tuple[Transport | None, str | None]:
    """Make a transport, and compare its results with the process group's. A collective.

    Returns (the transport, None if the results agree on all ranks, else the reason); (None, the reason) if it could not be made.
    The test keeps wrong results from staying unnoticed on machines that the project does not have; multimem has never been run. Kernels are
    tuned only after the test.
    """
    group = resolve_process_group(group_name)
    with torch.inference_mode(False), torch.no_grad():
        try:
            transport = _made(name, group_name, device, by_rule(group.size()))
            tests = together(group_name, "the self-test's inputs", lambda: chains(group, device), agree.PATIENCE_S)
            kinds = [(test.dtype, test.residual.shape, test.center, output) for test in tests for output in test.outputs]
            transport.prepare([Planned(slot, *kind) for kind in kinds for slot in range(3)])
        except WorkspaceError as error:  # raised on all ranks
            gc.collect()
            return None, f"its self-test failed: {error}"
        reason = ""
        try:
            reason = difference(transport, tests, group)
        except Exception as error:  # the other ranks must know of any error
            reason = f"{type(error).__name__}: {error}"
    said = f"its self-test failed: {reason} on rank {group.rank()}" if reason else ""
    answers = agree.exchange(group_name, f"the self-test of transport {name}", said)
    return transport, next((answer for answer in answers if answer), None)


def _agree(group_name: str, usable: list[str], reasons: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """(the transports that all ranks can use, name -> the first reason of a rank that cannot use it), the same on all ranks."""
    said = agree.exchange(group_name, "the choice of a transport", json.dumps((agree.version(), link.host(), reasons)))
    answers = [json.loads(answer) for answer in said]
    versions = {version for version, _, _ in answers}
    if len(versions) > 1:
        raise TokenWeaveError(f"the ranks of group {group_name} run different versions: {sorted(versions)}")
    against: dict[str, str] = {}
    for rank, (_, _, theirs) in enumerate(answers):
        for name, reason in theirs.items():
            against.setdefault(name, f"{reason} (rank {rank})")
    hosts = [host for _, host, _ in answers]
    if reason := link.apart(hosts):
        against |= {name: reason for name in usable if name in _SYMMETRIC}
    if _HIERARCHICAL in usable and isinstance(nested := link.nested(hosts), str):
        if "process_group" in usable and len(set(hosts)) == 1:
            usable = [name for name in usable if name != _HIERARCHICAL]  # nothing that ``auto`` could want
        else:
            against[_HIERARCHICAL] = nested
    return [name for name in usable if name not in against], against
