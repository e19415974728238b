"""What all ranks have agreed on: one Context for each process group, with the group's lifetime.

Each rank compiles for itself. The ranks' graphs may differ, but not their collectives: for example, only rank 0 returns hidden states.
So all ranks of a group decide together what to do with the collectives of a graph, when a graph with these collectives is compiled for the
first time (``agreed``). A rank that later compiles a graph with the same collectives alone takes the known decision. No rank waits for
a rank that has no reason to come.
"""

import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.fx import Graph

from . import passes
from .autotune import schedule
from .autotune.plan import Place, Plan
from .compat import resolve_process_group
from .options import Options, TokenWeaveError
from .passes import fingerprint
from .passes.conform import halve
from .passes.find import collective_group, collectives, registered_all_reduces
from .passes.plain import decompositions
from .passes.rules.token_axis import registered_rules
from .transports import agree, choose

log = logging.getLogger("tw_compile")

# Most rounds until ranks with different abilities agree. Each round takes away at least one thing that some rank cannot do.
ROUNDS = 64


@dataclass
class Context:
    """What the ranks of one group have agreed on.

    group:     the process group, held weakly
    left:      why its graphs are left to Inductor from here on; '' if they are not
    decisions: (options, form, signatures of the graph's groups) -> what was agreed
    plans:     (options, signatures of the graph's groups) -> Plan or None
    progress:  the number of calls that each rank has begun; None if it is not known
    calls:     the number of calls that this rank has begun
    """

    group: "weakref.ref[dist.ProcessGroup]"
    left: str = ""
    decisions: "dict[tuple, _Known]" = field(default_factory=dict)
    plans: dict[tuple, Plan | None] = field(default_factory=dict)
    progress: agree.Progress | None = None
    calls: int = 0

    def called(self) -> None:
        """Count a call of a graph of the group. Each call of a graph with sites begins with this."""
        self.calls += 1
        if self.progress is not None:
            self.progress.begin_call()


class Left(Exception):
    """A graph is left to Inductor on all ranks, for this reason. together: whether all ranks decide it now"""

    def __init__(self, reason: str, together: bool = False):
        super().__init__(reason)
        self.together = together


@dataclass(frozen=True)
class _Known:
    decision: fingerprint.Decision
    fingerprints: dict


_contexts: dict[str, Context] = {}


def of(group_name: str) -> Context:
    """The context of a group. A destroyed group's name may be used again: the context of the old group is then dropped."""
    group = resolve_process_group(group_name)
    context = _contexts.get(group_name)
    if context is None or context.group() is not group:
        forget(group_name)
        context = _contexts[group_name] = Context(weakref.ref(group))
        weakref.finalize(group, _forget_of, group_name, weakref.ref(context)).atexit = False
    return context


def number_of_calls() -> int:
    """The number of calls of graphs with sites that this rank has begun, in all groups."""
    return sum(context.calls for context in _contexts.values())


def forget(group_name: str) -> None:
    """Drop everything that belongs to the group of this name, including its symmetric memory."""
    _contexts.pop(group_name, None)
    choose.forget(group_name)


def _forget_of(group_name: str, context: "weakref.ref[Context]") -> None:
    """Drop a destroyed group's context, unless another group has taken its name."""
    if _contexts.get(group_name) is not None and _contexts[group_name] is context():
        forget(group_name)


def is_current(context: Context, group_name: str) -> bool:
    """Whether a context belongs to the group that has this name now."""
    return context.group() is resolve_process_group(group_name)


def agreed(
    graph: Graph,
    options: Options,
    form: Place | str,
    attempt: Callable[[fingerprint.Decision], passes.Rewritten],
    may_cross: bool = False,
) -> tuple[passes.Rewritten, bool]:
    """Rewrite a graph as all ranks of its groups can. A collective of these groups, unless the decision is known.

    graph:   the graph before it is rewritten
    form:    the form to decide on: "fuse", or where the graph is cut
    attempt: rewrites the graph according to a decision
    may_cross: whether the caller handles agree.Crossed, which is raised before anything is exchanged
    Returns (the rewritten graph, whether all ranks have decided on it now).
    Raises Left on all ranks if they cannot agree, and TokenWeaveError on all ranks if a request cannot be met, or differs between ranks.
    """
    groups = [group for group in fingerprint.groups_of(graph) if group]
    signatures = {group: fingerprint.signature(graph, group) for group in groups}
    contexts = [of(group) for group in groups]
    if not groups:
        return attempt(fingerprint.Decision()), True
    key = options, str(form), json.dumps([*signatures.values()])
    known = contexts[0].decisions.get(key)
    # What is known holds for a group that was left later, too: other ranks may still run what they have compiled.
    if known is None and (left := next((context.left for context in contexts if context.left), "")):
        if options.forced:
            raise TokenWeaveError(f"{options.impossible}: {left}")
        raise Left(left)
    if known is not None:
        new, outcomes, _ = _attempt(attempt, known.decision, groups)
        if new is not None and {group: outcomes[group]["fingerprint"] for group in groups} == known.fingerprints:
            return new, False
        # To the process group two forms of a site differ only if one is cut and the other is not.
        if new is not None and all(map(choose.is_process_group, groups)) and (new.sites or options.fused_only):
            conformed = _conformed(new, known, groups, attempt)
            if conformed is not None:
                return conformed, False
    asked = [group for group in groups if not agree.is_alone(resolve_process_group(group))]
    decision = known.decision if known is not None else fingerprint.Decision()
    for _ in range(ROUNDS):
        new, outcomes, problem = _attempt(attempt, decision, groups)
        merged = decision
        for group in asked:
            try:
                said = _exchange(group, options, signatures[group], outcomes[group], problem, may_cross)
            except agree.PassedBy as passed:  # its collectives are those of the graph as it is
                for each in asked:
                    agree.leave(each, str(passed))
                _give_up(("left", str(passed)), contexts, options, together=False)
            may_cross = False
            problem = problem or _problem(group, said)
            if not problem:
                possible = fingerprint.merge(merged, group, [theirs["outcome"] for theirs in said])
                problem = ("left", "its ranks cannot agree on what to do with its collectives") if possible is None else None
                merged = possible or decision
        again = merged != decision
        if len(asked) > 1:  # a rank's new decision holds for all of its groups
            for group in asked:
                said = [json.loads(s) for s in agree.exchange(group, "the end of a round", json.dumps((again, problem)))]
                again = again or any(theirs for theirs, _ in said)
                problem = problem or next((theirs for _, theirs in said if theirs), None)
        if problem:
            _give_up(problem, contexts, options)
        if not again:
            contexts[0].decisions[key] = _Known(decision, {group: outcomes[group]["fingerprint"] for group in groups})
            return new, True
        decision = merged
    raise Left("its ranks cannot agree on what to do with its collectives", together=True)


def pass_by(graph: Graph) -> None:
    """Let other ranks know of a graph that this rank leaves as it is without asking them: its mode is off, or it needs gradients.

    Not a collective.
    """
    for group in filter(None, fingerprint.groups_of(graph)):
        agree.pass_by(group)


def plan_of(graph: Graph, options: Options, section: schedule.Section | None, device: torch.device, together: bool) -> Plan | None:
    """The plan of all ranks for a graph. If no rank has one, they autotune it. None if there is none: the plan then follows a rule.

    section:  the part of the graph that is run to autotune it
    together: whether all ranks call this now
    """
    groups = [group for group in fingerprint.groups_of(graph) if group]
    key = options, json.dumps([fingerprint.signature(graph, group) for group in groups])
    plans = of(groups[0]).plans
    if key in plans or not together or not schedule.possible(device):
        if key not in plans and section is not None:
            return schedule.known(section, groups[0], device, options.transport_and_wire)
        return plans.get(key)
    plan = None
    for group in groups:
        plan = schedule.agree_on(section, group, device, options.transport_and_wire, plan or _mine(section, group, device, options))
        section = None  # the first group has autotuned it; the other groups take its plan
    plans[key] = plan
    return plan


def all_well(graph: Graph, what: str, failure: str) -> str:
    """Why a step failed on any rank of a graph's groups; '' if it did not. A collective. failure: why it failed on this rank, or ''"""
    groups = [group for group in fingerprint.groups_of(graph) if group and not agree.is_alone(resolve_process_group(group))]
    for group in groups:
        said = agree.exchange(group, what, failure)
        failure = failure or next((f"rank {rank}: {theirs}" for rank, theirs in enumerate(said) if theirs), "")
    return failure


def _mine(section: schedule.Section | None, group: str, device: torch.device, options: Options) -> Plan | None:
    return schedule.known(section, group, device, options.transport_and_wire) if section is not None else None


def _conformed(new: passes.Rewritten, known: _Known, groups: list[str], attempt: Callable) -> passes.Rewritten | None:
    """The graph with its collectives cut as on the other ranks; None if that is not possible."""
    decision = fingerprint.conform(known.decision, new, known.fingerprints)
    if decision is None:
        return None
    if decision != known.decision:
        new, *_ = _attempt(attempt, decision, groups)
    if new is None:
        return None
    for group in groups:
        mine, theirs = fingerprint.plain(fingerprint.fingerprint(new.graph, group)), fingerprint.plain(known.fingerprints[group])
        nodes = [n for n in collectives(new.graph) if collective_group(n) == group and n.meta.get("half") in (None, 0)]
        for node, mine_halved, halved in zip(nodes, mine, theirs):
            if halved and not mine_halved and (new.cut is None or not halve(node, new.cut)):
                return None
        if fingerprint.plain(fingerprint.fingerprint(new.graph, group)) != theirs:
            return None
    return new


def _attempt(attempt: Callable, decision: fingerprint.Decision, groups: list[str]) -> tuple:
    """(the rewritten graph or None, group -> what the rank tells the others, problem or None)"""
    try:
        new = attempt(decision)
    except TokenWeaveError as error:
        return None, dict.fromkeys(groups), ("error", str(error))
    except Left as left:
        return None, dict.fromkeys(groups), ("left", str(left))
    except Exception as error:  # perhaps on this rank only: the others must know
        log.debug("a graph could not be rewritten", exc_info=True)
        return None, dict.fromkeys(groups), ("left", f"it could not be rewritten: {type(error).__name__}: {error}")
    outcomes = {}
    for group in groups:
        outcomes[group] = {
            "refused": {str(number): why for (of, number), why in new.refused.items() if of == group},
            "sites": {str(site): number for site, (of, number) in new.sites.items() if of == group},
            "merged": {str(number): into for (of, number), into in new.merged.items() if of == group},
            "not_woven": new.not_woven,
            "fingerprint": fingerprint.fingerprint(new.graph, group),
            "rows": fingerprint.first_rows(new.graph, group),
        }
    return new, outcomes, None


def _exchange(
    group: str, options: Options, signature: list, outcome: dict | None, problem: tuple | None, may_cross: bool
) -> list[dict]:
    context = of(group)
    if context.progress is None:
        context.progress = agree.progress(group, may_cross)  # the first exchange of all ranks
    mine = {
        "version": agree.version(),
        "options": options.requested,
        "registered": sorted((*registered_all_reduces(), *registered_rules(), *decompositions())),
        "signature": signature,
        "outcome": outcome,
        "problem": problem,
    }
    what, message = "the agreement on a graph", json.dumps(mine)
    said = agree.exchange(group, what, message, progress=context.progress, may_cross=may_cross, may_leave=True)
    return [json.loads(theirs) for theirs in said]


def _problem(group: str, said: list[dict]) -> tuple[str, str] | None:
    """Why the ranks cannot agree, the same on all of them: ("error" or "left", the reason); None if they can."""
    for name, what in _MUST_BE_EQUAL.items():
        values = [theirs[name] for theirs in said]
        if any(mine != values[0] for mine in values):
            values_of_ranks = "; ".join(f"rank {rank}: {_different(values, rank)}" for rank in range(len(values)))
            return "error", f"the ranks of group {group} {what}: {values_of_ranks}"
    if any(theirs["signature"] != said[0]["signature"] for theirs in said):
        counts = "; ".join(f"rank {rank}: {_count(theirs['signature'])}" for rank, theirs in enumerate(said))
        return "left", f"the ranks of group {group} have different graphs ({counts}), for example as one of them has a graph break"
    for rank, theirs in enumerate(said):
        if theirs["problem"]:
            kind, what = theirs["problem"]
            return kind, f"rank {rank}: {what}" if kind == "left" else what
    return None


_MUST_BE_EQUAL = {
    "version": "run different versions",
    "options": "have different options",
    "registered": "have registered different rules or all-reduces",
}


def _different(values: list, rank: int) -> str:
    """The part of one rank's value that differs between ranks."""
    mine = values[rank]
    if not isinstance(mine, dict):
        return str(mine)
    names = [name for name in dict.fromkeys(name for theirs in values for name in theirs) if len({str(v.get(name)) for v in values}) > 1]
    return ", ".join(f"{name}={mine[name]}" if name in mine else f"{name} is not set" for name in names)


def _count(signature: list) -> str:
    names = [entry[0] for entry in signature]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "no collective"


def _give_up(problem: tuple[str, str], contexts: list[Context], options: Options, together: bool = True) -> NoReturn:
    kind, what = problem
    if kind == "error":
        raise TokenWeaveError(what)
    if "different graphs" in what or not together:  # the ranks cannot agree on later graphs either
        for context in contexts:
            context.left = what
    if options.forced:
        raise TokenWeaveError(f"{options.impossible}: {what}")
    raise Left(what, together)
