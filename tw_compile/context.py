"""What all ranks have agreed on: one Context for each process group, which lives and dies with it.

Each rank compiles for itself, and its graph may differ from the others' where their collectives do not: rank 0 alone returns hidden
states, say. So what is done with the collectives of a graph is decided by all ranks of their groups together, when a graph with
these collectives is first met (``agreed``). A rank that meets them again, compiling alone, takes the decision that is known; no
rank waits for one that has no reason to come.
"""

import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.fx import Graph

from . import passes
from .autotune import schedule
from .autotune.plan import Place
from .compat import resolve_process_group
from .options import Options, TokenWeaveError
from .passes import wire
from .passes.conform import halve
from .passes.find import collective_group, collectives, registered_all_reduces
from .passes.rules.token_axis import registered_rules
from .transports import agree, choose

log = logging.getLogger("tw_compile")

# Rounds in which ranks that differ come to what all can do. Each takes at least one thing away.
ROUNDS = 64


@dataclass
class Context:
    """group:     the process group, held weakly
    left:      why its graphs are left to Inductor from here on; ''
    decisions: (options, form, what the groups of a graph exchange) -> what was agreed
    plans:     the same without the form -> Plan or None
    progress:  the calls that each rank has begun; None where that is not known
    """

    group: "weakref.ref[dist.ProcessGroup]"
    left: str = ""
    decisions: dict = field(default_factory=dict)
    plans: dict = field(default_factory=dict)
    progress: agree.Progress | None = None

    def called(self) -> None:
        """To be said when a graph of the group is called."""
        if self.progress is not None:
            self.progress.begin_call()


class Left(Exception):
    """A graph is left to Inductor on all ranks, for this reason. together: whether they are all here to decide it"""

    def __init__(self, reason: str, together: bool = False):
        super().__init__(reason)
        self.together = together


@dataclass(frozen=True)
class _Known:
    decision: wire.Decision
    wires: dict


_contexts: dict[str, Context] = {}


def of(group_name: str) -> Context:
    """The context of a group. Names come again when groups are destroyed: what was known of one of the same name is forgotten."""
    group = resolve_process_group(group_name)
    context = _contexts.get(group_name)
    if context is None or context.group() is not group:
        forget(group_name)
        context = _contexts[group_name] = Context(weakref.ref(group))
        weakref.finalize(group, _forget_of, group_name, weakref.ref(context)).atexit = False
    return context


def forget(group_name: str) -> None:
    """Drop what belongs to a group of this name, its symmetric memory included."""
    _contexts.pop(group_name, None)
    choose.forget(group_name)


def _forget_of(group_name: str, context: "weakref.ref[Context]") -> None:
    """A group is gone. Another may have come by its name."""
    if _contexts.get(group_name) is not None and _contexts[group_name] is context():
        forget(group_name)


def is_current(context: Context, group_name: str) -> bool:
    return context.group() is resolve_process_group(group_name)


def agreed(
    graph: Graph, options: Options, form: Place | str, attempt: Callable[[wire.Decision], passes.Rewritten]
) -> tuple[passes.Rewritten, bool]:
    """What becomes of a graph on all ranks: ``attempt`` with the decision that all can carry out.

    graph: before it is rewritten
    form:  what of it is decided on: "fuse", or where it is cut
    Returns (the result, whether all ranks are here, as it is decided for the first time). A collective of the graph's groups where something is not known yet.
    Raises Left on all ranks where they cannot agree, and TokenWeaveError on all ranks for a contradiction.
    """
    groups = [group for group in wire.groups_of(graph) if group]
    signatures = {group: wire.signature(graph, group) for group in groups}
    contexts = [of(group) for group in groups]
    if not groups:
        return attempt(wire.Decision()), True
    if left := next((context.left for context in contexts if context.left), ""):
        if options.forced:
            raise TokenWeaveError(f"option 'tokenweave.mode' is {options.forced!r}, but this graph cannot be: {left}")
        raise Left(left)
    key = options, str(form), json.dumps([*signatures.values()])
    known = contexts[0].decisions.get(key)
    if known is not None:
        new = attempt(known.decision)
        if {group: wire.wire(new.graph, group) for group in groups} == known.wires:
            return new, False
        # The process group sees no more of a site than how it is cut.
        if all(map(choose.is_process_group, groups)) and (new.sites or options.fused_only):
            new = _conformed(new, known, groups, attempt)
            if new is not None:
                return new, False
    asked = [group for group in groups if not agree.is_alone(resolve_process_group(group))]
    decision = known.decision if known is not None else wire.Decision()
    for _ in range(ROUNDS):
        new, outcomes, problem = _attempt(attempt, decision, groups)
        merged = decision
        for group in asked:
            said = _exchange(group, options, signatures[group], outcomes[group], problem)
            problem = problem or _problem(group, said)
            if not problem:
                merged = wire.merge(merged, group, [theirs["outcome"] for theirs in said])
                problem = ("left", "its ranks cannot agree on what to do with its collectives") if merged is None else None
                merged = merged or decision
        again = merged != decision
        if len(asked) > 1:  # a rank that changes its mind does so for all the groups that it is in
            for group in asked:
                said = [json.loads(s) for s in agree.exchange(group, "the end of a round", json.dumps((again, problem)))]
                again = again or any(theirs for theirs, _ in said)
                problem = problem or next((theirs for _, theirs in said if theirs), None)
        if problem:
            _give_up(problem, contexts, options)
        if not again:
            contexts[0].decisions[key] = _Known(decision, {group: outcomes[group]["wire"] for group in groups})
            return new, True
        decision = merged
    raise Left("its ranks cannot agree on what to do with its collectives", together=True)


def plan_of(graph: Graph, options: Options, section: schedule.Section | None, device, asked: bool):
    """The plan of all ranks for a graph, tuned where none has one; None goes by a rule.

    section: what of it is run to tune it; asked: whether all ranks are here
    """
    groups = [group for group in wire.groups_of(graph) if group]
    key = options, json.dumps([wire.signature(graph, group) for group in groups])
    plans = of(groups[0]).plans
    if key in plans or not asked or not schedule.possible(device):
        if key not in plans and section is not None:
            return schedule.known(section, groups[0], device, options.transport)
        return plans.get(key)
    plan = None
    for group in groups:
        plan = schedule.agree_on(section, group, device, options.transport, plan or _mine(section, group, device, options))
        section = None  # the first group has tuned it; the others hear of it
    plans[key] = plan
    return plan


def all_well(graph: Graph, what: str, failure: str) -> str:
    """What failed on any rank of a graph's groups, '' if nothing did. A collective. failure: what did on this one"""
    groups = [group for group in wire.groups_of(graph) if group and not agree.is_alone(resolve_process_group(group))]
    for group in groups:
        said = agree.exchange(group, what, failure)
        failure = failure or next((f"rank {rank}: {theirs}" for rank, theirs in enumerate(said) if theirs), "")
    return failure


def _mine(section, group, device, options):
    return schedule.known(section, group, device, options.transport) if section is not None else None


def _conformed(new: passes.Rewritten, known: _Known, groups: list[str], attempt) -> passes.Rewritten | None:
    """What comes of a graph if its collectives are cut as the others have them; None where that is not possible."""
    decision = wire.conform(known.decision, new, known.wires)
    if decision is None:
        return None
    if decision != known.decision:
        new = attempt(decision)
    for group in groups:
        mine, theirs = wire.plain(wire.wire(new.graph, group)), wire.plain(known.wires[group])
        nodes = [n for n in collectives(new.graph) if collective_group(n) == group and n.meta.get("half") in (None, 0)]
        for node, mine_halved, halved in zip(nodes, mine, theirs):
            if halved and not mine_halved and (new.cut is None or not halve(node, new.cut)):
                return None
        if wire.plain(wire.wire(new.graph, group)) != theirs:
            return None
    return new


def _attempt(attempt, decision, groups):
    try:
        new = attempt(decision)
    except TokenWeaveError as error:
        return None, dict.fromkeys(groups), ("error", str(error))
    except Exception as error:  # of one rank, perhaps: the others must hear of it
        log.debug("a graph could not be rewritten", exc_info=True)
        return None, dict.fromkeys(groups), ("left", f"it could not be rewritten: {type(error).__name__}: {error}")
    outcomes = {}
    for group in groups:
        outcomes[group] = {
            "refused": {str(number): why for (of, number), why in new.refused.items() if of == group},
            "sites": {str(site): number for site, (of, number) in new.sites.items() if of == group},
            "not_woven": new.not_woven,
            "wire": wire.wire(new.graph, group),
        }
    return new, outcomes, None


def _exchange(group, options, signature, outcome, problem) -> list[dict]:
    context = of(group)
    if context.progress is None:
        context.progress = agree.progress(group)  # all ranks are here for the first time
    mine = {
        "version": agree.version(),
        "options": options.requested,
        "registered": sorted((*registered_all_reduces(), *registered_rules())),
        "signature": signature,
        "outcome": outcome,
        "problem": problem,
    }
    said = agree.exchange(group, "the agreement on a graph", json.dumps(mine), progress=context.progress)
    return [json.loads(theirs) for theirs in said]


def _problem(group: str, said: list[dict]) -> tuple[str, str] | None:
    """What keeps ranks from agreeing, the same on all of them: (kind, what it is), where the kind is "error" or "left"."""
    for name, what in _MUST_BE_EQUAL.items():
        values = [theirs[name] for theirs in said]
        if any(mine != values[0] for mine in values):
            told = "; ".join(f"rank {rank}: {_different(values, rank)}" for rank in range(len(values)))
            return "error", f"the ranks of group {group} {what}: {told}"
    if any(theirs["signature"] != said[0]["signature"] for theirs in said):
        counts = "; ".join(f"rank {rank}: {_count(theirs['signature'])}" for rank, theirs in enumerate(said))
        return "left", f"the ranks of group {group} have different graphs ({counts}), as where one of them has a graph break"
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
    """What of one rank's value is not that of all."""
    mine = values[rank]
    if not isinstance(mine, dict):
        return str(mine)
    names = [name for name in mine if any(theirs.get(name) != mine[name] for theirs in values)]
    return ", ".join(f"{name}={mine[name]}" for name in names) or "nothing of these"


def _count(signature: list) -> str:
    names = [entry[0] for entry in signature]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "no collective"


def _give_up(problem: tuple[str, str], contexts: list[Context], options: Options) -> None:
    kind, what = problem
    if kind == "error":
        raise TokenWeaveError(what)
    if "different graphs" in what:  # they are apart from here on
        for context in contexts:
            context.left = what
    if options.forced:
        raise TokenWeaveError(f"option 'tokenweave.mode' is {options.forced!r}, but this graph cannot be: {what}")
    raise Left(what, together=True)
