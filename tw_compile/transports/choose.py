"""Chooses the transport of a group's sites, once for each group and device. All ranks of the group take the same one."""

import collections
import functools
import gc
import json
import logging
import threading
from typing import Any

import torch
import torch.distributed as dist

from .. import compat
from ..compat import resolve_process_group
from ..options import TokenWeaveError
from ..quantise import Quantise
from ..site import WITHOUT_NORM, Site, add_norm
from . import agree, link
from .low_bit import threshold
from .low_bit.transport import LowBit
from .process_group import ProcessGroup
from .symmetric import tuning
from .symmetric.transport import Symmetric
from .symmetric.tuning import LEAST_ROWS, MARGIN, Tuning, by_rule
from .together import WorkspaceError, together

log = logging.getLogger("tw_compile")

Transport = ProcessGroup | Symmetric

_SYMMETRIC = {"multimem": True, "peer": False}  # name -> whether it uses multicast
_ORDER = ("multimem", "peer", "process_group")
# (group name, device, ``Options.carrier``) -> (transport, why it is not a better one)
chosen: dict[tuple[str, torch.device, str], tuple[Transport, str]] = {}
# (group name, device) -> what lies between the ranks of a CUDA group: see ``link.measured``
links: dict[tuple[str, torch.device], str] = {}
# The lock of each group, by name. A thread holds it in a call, and while the ranks of the group agree.
_locks: collections.defaultdict[str, Any] = collections.defaultdict(threading.RLock)


def unavailable(name: str, group_name: str, device: torch.device) -> str | None:
    """Why this rank cannot use a transport for a group; None if it can. It asks no other rank."""
    if name == "process_group":
        return None
    return lacking(device) or Symmetric.unavailable(group_name, device, multicast=_SYMMETRIC[name])


def lacking(device: torch.device) -> str | None:
    """Why this PyTorch cannot run the transports over symmetric memory: names that it lacks. None if it has all, or if there is no GPU."""
    names = compat.missing_on_gpus() if device.type == "cuda" and torch.version.cuda is not None else []
    return f"PyTorch {torch.__version__} lacks names that it needs ({', '.join(names)})" if names else None


def candidates(requested: str, group_name: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """(the requested transports that this rank can use, best first; name -> why it cannot use the others)"""
    requested = requested.partition(":")[0]
    names = _ORDER if requested == "auto" else (requested,)
    reasons = {name: unavailable(name, group_name, device) for name in names}
    return [n for n in names if reasons[n] is None], {n: r for n, r in reasons.items() if r is not None}


def choose(
    requested: str, group_name: str, device: torch.device, timeout_s: float | None = None
) -> tuple[Transport, str]:
    """The transport of a group, and why it is not a better one; '' if it is the best.

    requested: ``Options.carrier``: a transport, and behind a colon the bits of the wire if they are less than 16
    timeout_s: seconds that its kernels wait for another rank from now on; None leaves them as they are

    The first time for a group, it is a collective on CUDA groups: the ranks agree on the transport.
    Raises TokenWeaveError on all ranks if a forced transport is unavailable on one of them.
    """
    key = group_name, device, requested
    with _locks[group_name]:
        if key not in chosen:
            usable, reasons = candidates(requested, group_name, device)
            if device.type == "cuda":
                usable, reasons = _agree(group_name, usable, reasons)
                if (group_name, device) not in links:
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
    """A new transport of the kind that is chosen, with memory of its own, which is freed when the transport is dropped."""
    transport, _ = choose(requested, group_name, device)
    return transport.another(transport.least_bytes) if isinstance(transport, LowBit) else _make(transport.name, group_name, device)


def workspace_bytes() -> dict[torch.device, int]:
    """Device -> bytes of symmetric memory that this process holds there, for all groups. PyTorch's allocator does not count them."""
    held: collections.Counter[torch.device] = collections.Counter()
    for transport, _ in [*chosen.values()]:
        held[transport.device] += transport.workspace_bytes()
    return {device: number for device, number in held.items() if number}


def _make(name: str, group_name: str, device: torch.device, tuning: Tuning | None = None) -> Transport:
    if name in _SYMMETRIC:
        return Symmetric(group_name, device, multicast=_SYMMETRIC[name], tuning=tuning)
    _, *bits = name.split(":")
    return LowBit(group_name, device, int(bits[0])) if bits else ProcessGroup(group_name, device)


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
        if name in _SYMMETRIC:
            tested, reason = self_tested(name, group_name, device)
        else:
            tested = _make(name, group_name, device)
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
        log.warning("transports are not compared: %s", error)
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
    group_name, device = transport.group_name, transport.device
    if transport.name != "process_group":
        return transport, f"transport {transport.name} is taken, which has 16 bits; transport process_group has {bits}"
    if device.type != "cuda":
        return LowBit(group_name, device, bits), ""  # nothing can be measured: as asked, whatever the size
    packed, reason = self_tested(f"process_group:{bits}", group_name, device)
    if not isinstance(packed, LowBit) or reason:
        return transport, str(reason)
    least = threshold.least_bytes(packed, links[group_name, device])
    if least is None:
        return transport, "it is not faster than 16 bits here, as measured"
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
            chains = together(group_name, "the self-test's inputs", lambda: _chains(group, device), agree.PATIENCE_S)
            kinds = [((c.dtype, (c.rows, _TEST_HIDDEN), c.center), output) for c in chains for output in c.outputs]
            transport.prepare([(slot, *kind, output) for kind, output in kinds for slot in range(3)])
        except WorkspaceError as error:  # raised on all ranks
            gc.collect()
            return None, f"its self-test failed: {error}"
        reason = ""
        try:
            reason = _difference(transport, chains, group)
        except Exception as error:  # the other ranks must know of any error
            reason = f"{type(error).__name__}: {error}"
    said = f"its self-test failed: {reason} on rank {group.rank()}" if reason else ""
    answers = agree.exchange(group_name, f"the self-test of transport {name}", said)
    return transport, next((answer for answer in answers if answer), None)


_TOLERANCES = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 1e-4}
_COARSE = {"process_group:8": 0.05, "process_group:6": 0.5, "process_group:4": 0.5}
_FP8_OF_ROWS = Quantise("fp8", True, most=448.0, low=-448.0, high=448.0)
_TEST_HIDDEN = 512
_TEST_REPEATS = 10


def _chains(group, device: torch.device) -> list["_Chain"]:
    """The chains of the self-test: with both norms, and with sizes around each at which another kernel or workspace begins."""
    switch = by_rule(group.size()).one_shot_rows
    sizes = sorted({1, 5, switch, switch + 1, LEAST_ROWS - 1, LEAST_ROWS, LEAST_ROWS + 1, 2 * LEAST_ROWS + 1})
    two = 5, LEAST_ROWS + 1
    return [_Chain(group, device, dtype, center, rows, quantise) for dtype, center, some, quantise in (
        (torch.bfloat16, False, sizes, None), (torch.bfloat16, True, two, None), (torch.float16, False, two, None),
        (torch.float32, False, two, None), (torch.bfloat16, False, two, _FP8_OF_ROWS),
    ) for rows in some]  # fmt: skip


def _difference(transport, chains: list["_Chain"], group) -> str:
    """How a transport's results differ from the process group's on this rank; '' if they do not.

    It calls sites as the passes do: with a sharded residual and with a whole one, behind GEMMs and alone, woven and fused, with all
    arguments that a norm can have; and many in a row. All calls come before all comparisons, so that no rank waits in a kernel for a rank
    that has found a difference.
    """
    for chain in chains:
        chain.reduce(group)
    with transport.call():
        for chain in chains:
            chain.run(transport)
        for _ in range(_TEST_REPEATS):
            for chain in chains[::4]:
                chain.fuse(transport, 2)
    coarse = _COARSE.get(transport.name, 0.0)
    return next((difference for chain in chains if (difference := chain.difference(coarse))), "")


class _Chain:
    """Sites in a row, and their correct results. x of the second site is the output of a GEMM. quantise: of all norms but the last"""

    def __init__(self, group, device, dtype, center, rows, quantise):
        self.dtype, self.center, self.rows, self.quantise = dtype, center, rows, quantise
        self.outputs = ["", *([quantise.dtype] if quantise else [])]
        everybodys, own = (torch.Generator().manual_seed(seed) for seed in (0, 1 + group.rank()))
        draw = lambda generator, *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
        self.a, self.b = draw(own, rows, 64), draw(own, 64, _TEST_HIDDEN) / 8
        self.xs = [draw(own, rows, _TEST_HIDDEN), self.a @ self.b, draw(own, rows, _TEST_HIDDEN)]
        self.residual = draw(everybodys, rows, _TEST_HIDDEN)
        vector = functools.partial(draw, everybodys, _TEST_HIDDEN)
        # The arguments of the first three sites: a weight in float32 only; everything; a weight only.
        none, shift = (None, 1e-5, 1.0, 0.0, center), vector() if center else None
        self.numerics: tuple[tuple, ...] = (
            (vector().float(), None, *none), (vector(), vector(), shift, 1e-6, 0.5, 1.0, center), (vector(), None, *none)
        )  # fmt: skip
        if not center:  # a site without a norm
            self.xs.append(draw(own, rows, _TEST_HIDDEN))
            self.numerics += ((None, None, None, WITHOUT_NORM, 1.0, 0.0, False),)
        self.got: list[tuple[int, torch.Tensor]] = []
        self.right: list[torch.Tensor] = []

    def reduce(self, group):
        """Compute the correct results with the process group."""
        residual = self.residual
        for x, numerics in zip(self.xs, self.numerics):
            total = x.to(torch.float32, copy=True)
            dist.all_reduce(total, group=group)
            norm, residual = add_norm(total, residual, *numerics)
            self.right.append(norm)
        self.right.append(residual)

    def run(self, transport):
        self.fuse(transport, 2)
        chains = [self._weave(transport, slot) for slot in range(2)]
        for _ in range(1 + len(self.xs)):  # sites of both slots are in flight
            for chain in chains:
                next(chain, None)

    def fuse(self, transport, slot):
        residual = self.residual
        for number in range(len(self.xs)):
            norm, residual = _values(*transport.fused(self._site(transport, residual, slot, number), False))
            self.got.append((number, norm))
        self.got.append((len(self.xs), residual))

    def _weave(self, transport, slot):
        residual = self.residual
        for number in range(len(self.xs)):
            transport.start(self._site(transport, residual, slot, number))
            yield
            norm, residual = _values(*transport.wait(slot, True))
            self.got.append((number, norm.clone()))
        self.got.append((len(self.xs), residual))

    def _site(self, transport, residual, slot, number):
        x = transport.linear(self.a, self.b, None, slot) if number == 1 else self.xs[number]
        carries = number < len(self.xs) - 1  # a float32, sharded residual to the next site
        quantise = str(self.quantise) if self.quantise and carries else ""
        given: tuple[Any, ...] = x, residual, *self.numerics[number], 0, slot, number, carries, carries, quantise
        return Site(*given)

    def difference(self, coarse: float) -> str | None:
        """How the results differ from the correct ones; None if they do not. A single wrong value is a difference.

        coarse: by how much the wire rounds
        """
        tolerance = max(_TOLERANCES[self.dtype], coarse, 2.0**-4 if self.quantise else 0.0)
        for number, ours in self.got:
            right = self.right[number]
            error = ((ours.float() - right).abs() / (right.abs() + 4)).max().item()
            if not error < tolerance:
                what = "residual" if number == len(self.xs) else "quantised norm" if self.quantise else "norm"
                return f"the {what} of {self.rows} tokens in {self.dtype} is off by {error:.1e}"
        return None


def _values(norm: torch.Tensor, residual: torch.Tensor, *quantised: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the norm, also where a site has quantised it; the residual)"""
    return (quantised[0].float() * quantised[1] if quantised else norm), residual


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
    if reason := link.apart([host for _, host, _ in answers]):
        against |= {name: reason for name in usable if name in _SYMMETRIC}
    return [name for name in usable if name not in against], against
