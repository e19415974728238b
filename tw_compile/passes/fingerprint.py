"""The collectives of a rewritten graph, in program order: its *fingerprint*. It must be the same on all ranks of a group.

Each rank rewrites its own graph. If the graphs of two ranks differ elsewhere, as when only rank 0 returns hidden states, the ranks could
do different things with the same all-reduce. ``merge`` returns a decision that all of them can carry out.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from .find import collective_group, collectives
from .graph_utils import arguments, calls, value


@dataclass(frozen=True)
class Decision:
    """What is not done with the collectives of a graph, as a rank cannot do it. A group's collectives are numbered in program order.

    refused:   (group, number of a collective in the original graph) -> why it is not a site
    unmerged:  (group, number of a collective in the original graph) of all-reduces that stay as they are in a sum
    unwoven:   numbers of the sites that are not cut in a woven graph
    unsplit:   (group, number of a collective, without counting the sites) of other collectives that are not cut
    gathered:  numbers of the sites after which each rank has the whole residual
    unquantised: numbers of the sites that do not end in a quantisation
    not_woven: why the graph is not woven, or ''
    """

    refused: Mapping[tuple[str, int], str] = field(default_factory=dict)
    unmerged: frozenset[tuple[str, int]] = frozenset()
    unwoven: frozenset[int] = frozenset()
    unsplit: frozenset[tuple[str, int]] = frozenset()
    gathered: frozenset[int] = frozenset()
    unquantised: frozenset[int] = frozenset()
    not_woven: str = ""


def groups_of(graph: Graph) -> list[str]:
    """The groups of a graph's collectives, in the order of their first collectives."""
    return list(dict.fromkeys(collective_group(node) for node in collectives(graph)))


def numbered(graph: Graph, without: Collection[Node] = ()) -> dict[Node, tuple[str, int]]:
    """Each collective -> (its group, its number in the group). without: collectives that are not counted"""
    counts: dict[str, int] = {}
    numbers: dict[Node, tuple[str, int]] = {}
    for node in (node for node in collectives(graph) if node not in without):
        group = collective_group(node)
        counts[group] = counts.get(group, -1) + 1
        numbers[node] = group, counts[group]
    return numbers


def signature(graph: Graph, group: str) -> list:
    """[op, reduce op, dtype, row length or None] of each collective of a group. The same on all ranks, for all numbers of tokens."""
    entries = []
    for node, (of, _) in numbered(graph).items():
        if of == group:
            x = next((value(a) for a in node.all_input_nodes if isinstance(value(a), torch.Tensor)), None)
            row = x.shape[-1] if x is not None and x.dim() > 1 and isinstance(x.shape[-1], int) else None
            named = [a for a in node.args if isinstance(a, str) and a != group]  # the reduce op
            entries.append([_name(node), *named, str(x.dtype).removeprefix("torch.") if x is not None else "", row])
    return entries


def fingerprint(graph: Graph, group: str) -> list:
    """The collectives of a group in a rewritten graph, as plain data: all that must be the same on all ranks.

    A site is ["site", number, in halves, form, sharded, quantisation], where ``sharded`` is whether each rank has only its own rows of the
    residual.
    Another collective is [op, in halves].
    """
    entries: list[list] = []
    for node in collectives(graph):
        if collective_group(node) != group:
            continue
        half = node.meta.get("half")
        if calls(node, ops.start, ops.fused):
            given = arguments(node)
            form = [given[name] is not None for name in ("residual", "weight", "bias", "shift")]
            form += [given[name] for name in ("eps", "scale", "offset", "center")]
            entry = ["site", given["site"], half is not None, form, given["fp32_residual"], given["quantise"]]
            if half == 1 and entries and entries[-1][:2] == entry[:2]:
                entries[-1][4] = entries[-1][4] and given["fp32_residual"]
                continue
        else:
            entry = [_name(node), half is not None]
            if half == 1:  # a collective that is cut is two calls, one for each half
                continue
        entries.append(entry)
    return entries


def first_rows(graph: Graph, group: str) -> int | None:
    """The rows of the first half of a group's sites, for the sizes of this call; None if no site is cut."""
    for node in collectives(graph):
        if calls(node, ops.start, ops.fused) and collective_group(node) == group and node.meta.get("half") == 0:
            sizes = value(node.args[0]).shape[:-1]
            return math.prod(size if isinstance(size, int) else size.node.hint for size in sizes)
    return None


def plain(of_group: list) -> list[bool]:
    """Whether each collective of a fingerprint is in halves. Over the process group nothing else differs."""
    return [entry[2] if entry[0] == "site" else entry[1] for entry in of_group]


def merge(decision: Decision, group: str, outcomes: list[dict]) -> Decision | None:
    """A decision that ranks with different outcomes can all carry out; None if they cannot agree.

    outcomes: one of each rank, as plain data: {"refused": {number of a collective: why}, "sites": {number of a site: number of its
              collective}, "merged": {number of a collective: the one that it is part of}, "not_woven": why, "fingerprint": fingerprint,
              "rows": ``first_rows``}
    """
    if all(all(o[name] == outcomes[0][name] for name in ("fingerprint", "not_woven", "merged", "rows")) for o in outcomes):
        return decision
    sums = [o["merged"] for o in outcomes]
    differ = {(group, int(number)) for number in set().union(*sums) if any(mine.get(number) != sums[0].get(number) for mine in sums)}
    if not differ <= decision.unmerged:
        return replace(decision, unmerged=decision.unmerged | differ)
    refused = dict(decision.refused)
    for rank, outcome in enumerate(outcomes):
        for number, why in outcome["refused"].items():
            if any(int(number) in other["sites"].values() for other in outcomes):
                refused.setdefault((group, int(number)), f"rank {rank}: {why}")
    if refused != decision.refused:
        return replace(decision, refused=refused)
    if any(o["not_woven"] for o in outcomes):
        rank, why = next((rank, o["not_woven"]) for rank, o in enumerate(outcomes) if o["not_woven"])
        return None if decision.not_woven else replace(decision, not_woven=f"rank {rank}: {why}")
    if len({o["rows"] for o in outcomes} - {None}) > 1:
        rows = "; ".join(f"rank {rank}: {o['rows']}" for rank, o in enumerate(outcomes))
        return replace(decision, not_woven=f"the ranks have their tokens in different shapes, with different first halves ({rows} tokens)")
    fingerprints = [o["fingerprint"] for o in outcomes]
    if len(set(map(len, fingerprints))) > 1:
        return None
    unwoven, unsplit, gathered, others = set(decision.unwoven), set(decision.unsplit), set(decision.gathered), 0
    unquantised = set(decision.unquantised)
    for entries in zip(*fingerprints):
        if len({(e[0], e[1] if e[0] == "site" else None) for e in entries}) > 1:
            return None
        if entries[0][0] != "site":
            if len({e[1] for e in entries}) > 1:
                unsplit.add((group, others))
            others += 1
            continue
        number = entries[0][1]
        different = next((rank for rank, e in enumerate(entries) if e[3] != entries[0][3]), None)
        if different is not None:
            why = f"its residual or norm on rank {different} differs from that on rank 0"
            refused[group, outcomes[0]["sites"][str(number)]] = why
        if len({e[2] for e in entries}) > 1:
            unwoven.add(number)
        if len({e[4] for e in entries}) > 1:
            gathered.add(number)
        if len({e[5] for e in entries}) > 1:
            unquantised.add(number)
    if refused != decision.refused:
        return replace(decision, refused=refused)
    merged = replace(
        decision, unwoven=frozenset(unwoven), unsplit=frozenset(unsplit), gathered=frozenset(gathered), unquantised=frozenset(unquantised)
    )
    return None if merged == decision else merged


def conform(decision: Decision, new: Any, fingerprints: dict[str, list]) -> Decision | None:
    """A decision with which a graph cuts nothing that the others do not cut, and has no uncut site that they cut; None if impossible.

    new:          the Rewritten of ``decision``
    fingerprints: group -> the fingerprint of the other ranks
    """
    refused, unwoven, unsplit = dict(decision.refused), set(decision.unwoven), set(decision.unsplit)
    for group, theirs in fingerprints.items():
        mine, others = fingerprint(new.graph, group), 0
        if len(mine) != len(theirs):
            return None
        for entry, halved in zip(mine, plain(theirs)):
            if entry[0] == "site":
                if entry[2] and not halved:
                    unwoven.add(entry[1])
                elif halved and not entry[2]:
                    refused[new.sites[entry[1]]] = "other ranks run it in halves"
            else:
                if entry[1] and not halved:
                    unsplit.add((group, others))
                others += 1
    return replace(decision, refused=refused, unwoven=frozenset(unwoven), unsplit=frozenset(unsplit))


def _name(node: Node) -> str:
    return str(node.target).removeprefix("_c10d_functional.").removesuffix(".default").removesuffix("_")
