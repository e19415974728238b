"""Which transport carries a group's sites: chosen once for each group and device, the same on all its ranks."""

import collections
import functools
import gc
import json
import logging
import threading

import torch
import torch.distributed as dist

from ..compat import resolve_process_group
from ..options import TokenWeaveError
from ..site import Site, add_norm
from . import agree
from .process_group import ProcessGroup
from .symmetric import tuning
from .symmetric.transport import Symmetric
from .symmetric.tuning import LEAST_ROWS, MARGIN, Tuning, by_rule
from .together import WorkspaceError, together

log = logging.getLogger("tw_compile")

_SYMMETRIC = {"multimem": True, "peer": False}  # name -> does it use multicast
_ORDER = ("multimem", "peer", "process_group")
chosen = {}  # (group name, device, requested transport) -> transport
_locks = collections.defaultdict(threading.RLock)  # of each group, for whoever makes its ranks meet


def unavailable(name: str, group_name: str, device: torch.device) -> str | None:
    """Why this rank cannot use a transport for a group, or None. Local: no rank is asked."""
    if name == "process_group":
        return None
    return Symmetric.unavailable(group_name, device, multicast=_SYMMETRIC[name])


def candidates(requested: str, group_name: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The transports this rank could use, best first, and the reasons against the others that were asked for."""
    names = _ORDER if requested == "auto" else (requested,)
    reasons = {name: unavailable(name, group_name, device) for name in names}
    return [n for n in names if reasons[n] is None], {n: r for n, r in reasons.items() if r is not None}


def choose(
    requested: str, group_name: str, device: torch.device, timeout_s: float | None = None
) -> tuple["ProcessGroup | Symmetric", str]:
    """The transport for a group, and why it is not a better one (empty where it is the best).

    timeout_s: how long its kernels wait for another rank from now on; None leaves that as it is

    A collective on CUDA groups the first time it is asked for a group: the ranks agree, so that all take the same path.
    Raises TokenWeaveError on every rank where a requested transport is missing on any of them.
    """
    key = group_name, device, requested
    with _locks[group_name]:
        if key not in chosen:
            usable, reasons = candidates(requested, group_name, device)
            if device.type == "cuda":
                usable, reasons = _agree(group_name, usable, reasons)
            name = _best(usable, reasons, group_name, device)
            why_not = "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
            if name is None:
                raise TokenWeaveError(f"option 'tokenweave.transport' is {requested!r}, which is not possible here: {why_not}")
            if device.type == "cuda" and why_not:
                log.warning("transport of group %s is %s; %s", group_name, name, why_not)
            chosen[key] = _made(name, group_name, device), why_not
            chosen[key][0].lock = _locks[group_name]
        if timeout_s is not None and chosen[key][0].name in _SYMMETRIC:
            chosen[key][0].set_timeout(timeout_s)
        return chosen[key]


def fall_back(requested: str, group_name: str, device: torch.device, reason: str) -> None:
    """Let the process group's own collectives carry a group from here on, on all of its ranks."""
    name = chosen[group_name, device, requested][0].name
    log.warning("transport of group %s is process_group from here on; %s: %s", group_name, name, reason)
    chosen[group_name, device, requested] = _make("process_group", group_name, device), f"{name}: {reason}"


def forget(group_name: str) -> None:
    """Drop what was chosen for a group, with its memory: the group is gone, and another may come by its name."""
    for key in [key for key in chosen if key[0] == group_name]:
        del chosen[key]
    gc.collect()  # its workspaces, of which some things refer to each other


def is_process_group(group_name: str) -> bool:
    """Whether the process group's own collectives carry all that was chosen for a group."""
    return all(transport.name == "process_group" for key, (transport, _) in chosen.items() if key[0] == group_name)


def another(requested: str, group_name: str, device: torch.device) -> "ProcessGroup | Symmetric":
    """A transport like the chosen one that shares nothing with it: its memory is free again when it is dropped."""
    return _make(choose(requested, group_name, device)[0].name, group_name, device)


def workspace_bytes() -> dict[torch.device, int]:
    """Bytes of symmetric memory that this process holds on each GPU, for all groups, outside of PyTorch's allocator."""
    held = collections.Counter()
    for transport, _ in [*chosen.values()]:
        held[transport.device] += transport.workspace_bytes()
    return {device: number for device, number in held.items() if number}


def _make(name: str, group_name: str, device: torch.device, tuning: Tuning | None = None) -> "ProcessGroup | Symmetric":
    if name in _SYMMETRIC:
        return Symmetric(group_name, device, multicast=_SYMMETRIC[name], tuning=tuning)
    return ProcessGroup(group_name, device)


def _made(name: str, group_name: str, device: torch.device, tuning: Tuning | None = None) -> "ProcessGroup | Symmetric":
    """The same, on all ranks or on none: a collective on CUDA groups."""
    if name not in _SYMMETRIC:
        return _make(name, group_name, device)
    what = f"the set-up of transport {name}"
    return together(group_name, what, lambda: _make(name, group_name, device, tuning), agree.PATIENCE_S)


def _best(usable: list[str], reasons: dict[str, str], group_name: str, device: torch.device) -> str | None:
    """Of what all ranks can use, the fastest that is right, and to ``reasons`` what speaks against others. A collective on CUDA groups.

    One for all calls of a group. To take the process group for some numbers of tokens, where it may be the faster, and a kernel for
    others is not possible: its sums are rounded otherwise, and the bits of a row would hang on the batch that it is in.
    """
    right = {}
    for name in usable:
        if right and device.type != "cuda":
            break  # nothing to compare by
        tested, reason = self_tested(name, group_name, device) if name in _SYMMETRIC else (_make(name, group_name, device), None)
        if reason is None:
            right[name] = tested
        else:
            reasons[name] = reason
    if len(right) < 2:
        return next(iter(right), None)
    seconds = {}
    try:
        seconds = tuning.compare(right, group_name, device)
    except WorkspaceError as error:  # which all ranks have
        log.warning("transports are not compared: %s", error)
    names = [*right]
    right.clear(), gc.collect()  # the testers' workspaces, of which some things refer to each other
    best = fastest(names, seconds)
    reasons |= {
        name: f"it takes {seconds[name] / seconds[best]:.2f} times as long as {best} here" for name in names[: names.index(best)]
    }
    return best


def fastest(names: list[str], seconds: dict[str, float]) -> str:
    """The first of the names that is as fast as the fastest, but for MARGIN; the first of all where nothing was measured."""
    least = min(seconds.values(), default=0.0)
    return next((name for name in names if seconds and seconds[name] * (1 - MARGIN) <= least), names[0])


def self_tested(name: str, group_name: str, device: torch.device) -> tuple["Symmetric | None", str | None]:
    """A transport whose small calls have the process group's answer on all ranks; or how they differ on some. A collective.

    The kernels must not be wrong in silence on a machine that this project has not: multimem has never been run. They are not tuned
    before they are known to be right.
    """
    group = resolve_process_group(group_name)
    with torch.inference_mode(False), torch.no_grad():
        try:
            transport = _made(name, group_name, device, by_rule(group.size()))
            chains = together(group_name, "the self-test's inputs", lambda: _chains(group, device), agree.PATIENCE_S)
            transport.prepare([(slot, c.dtype, (c.rows, _TEST_HIDDEN), c.center) for c in chains for slot in range(3)])
        except WorkspaceError as error:  # which all ranks have
            gc.collect()
            return None, f"its self-test failed: {error}"
        reason = ""
        try:
            reason = _difference(transport, chains, group)
        except Exception as error:  # the others must hear of it, whatever it is
            reason = f"{type(error).__name__}: {error}"
    said = f"its self-test failed: {reason} on rank {group.rank()}" if reason else ""
    answers = agree.exchange(group_name, f"the self-test of transport {name}", said)
    return transport, next((answer for answer in answers if answer), None)


_TOLERANCES = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 1e-4}
_TEST_HIDDEN = 512
_TEST_REPEATS = 10


def _chains(group, device: torch.device) -> list["_Chain"]:
    """Of both norms, and around each size where another kernel or another workspace begins."""
    switch = by_rule(group.size()).one_shot_rows
    sizes = sorted({1, 5, switch, switch + 1, LEAST_ROWS - 1, LEAST_ROWS, LEAST_ROWS + 1, 2 * LEAST_ROWS + 1})
    return [_Chain(group, device, dtype, center, rows) for dtype, center, some in (
        (torch.bfloat16, False, sizes), (torch.bfloat16, True, (5, LEAST_ROWS + 1)),
        (torch.float16, False, (5, LEAST_ROWS + 1)), (torch.float32, False, (5, LEAST_ROWS + 1)),
    ) for rows in some]  # fmt: skip


def _difference(transport, chains: list["_Chain"], group) -> str:
    """How what the passes call differs from the process group's answer on this rank; empty if it does not.

    Sites that carry their residual to the next and one that makes it whole, behind GEMMs and alone, woven and fused, with all that a
    norm can have; and many in a row. First come the calls, and then they are compared: no rank is left waiting in a kernel for one
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
    return next((difference for chain in chains if (difference := chain.difference())), "")


class _Chain:
    """Three sites, one after the other, and what is right: x of the second is that of a GEMM."""

    def __init__(self, group, device, dtype, center, rows):
        self.dtype, self.center, self.rows = dtype, center, rows
        everybodys, own = (torch.Generator().manual_seed(seed) for seed in (0, 1 + group.rank()))
        draw = lambda generator, *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
        self.a, self.b = draw(own, rows, 64), draw(own, 64, _TEST_HIDDEN) / 8
        self.xs = [draw(own, rows, _TEST_HIDDEN), self.a @ self.b, draw(own, rows, _TEST_HIDDEN)]
        self.residual = draw(everybodys, rows, _TEST_HIDDEN)
        vector = functools.partial(draw, everybodys, _TEST_HIDDEN)
        # Of the sites in turn: with a weight in float32, and nothing else; with everything; with a weight.
        none, shift = (None, 1e-5, 1.0, 0.0, center), vector() if center else None
        self.numerics = (
            (vector().float(), None, *none), (vector(), vector(), shift, 1e-6, 0.5, 1.0, center), (vector(), None, *none)
        )  # fmt: skip
        self.got, self.right = [], []

    def reduce(self, group):
        """What is right, by the process group."""
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
        for _ in range(1 + len(self.xs)):  # both slots are under way
            for chain in chains:
                next(chain, None)

    def fuse(self, transport, slot):
        residual = self.residual
        for number in range(len(self.xs)):
            x, last = self._x(transport, slot, number), number == len(self.xs) - 1
            norm, residual = transport.fused(Site(x, residual, *self.numerics[number], 0, slot, number, not last, not last), False)
            self.got.append((number, norm))
        self.got.append((len(self.xs), residual))

    def _weave(self, transport, slot):
        residual = self.residual
        for number in range(len(self.xs)):
            x, last = self._x(transport, slot, number), number == len(self.xs) - 1
            transport.start(Site(x, residual, *self.numerics[number], 0, slot, number, not last, not last))
            yield
            norm, residual = transport.wait(slot, True)
            self.got.append((number, norm.clone()))
        self.got.append((len(self.xs), residual))

    def _x(self, transport, slot, number):
        return transport.linear(self.a, self.b, None, slot) if number == 1 else self.xs[number]

    def difference(self) -> str | None:
        """Every value counts: one vector that is wrong is an error."""
        tolerance = _TOLERANCES[self.dtype]
        for number, ours in self.got:
            right = self.right[number]
            error = ((ours.float() - right).abs() / (right.abs() + 4)).max().item()
            if not error < tolerance:
                what = "residual" if number == len(self.xs) else "norm"
                return f"the {what} of {self.rows} tokens in {self.dtype} is off by {error:.1e}"
        return None


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
