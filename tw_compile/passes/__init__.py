"""The passes over a post-grad graph. ``rewrite`` runs them in order."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch.fx import Graph, Node

from ..options import Options, TokenWeaveError
from ..report import Refusal, Report, Site
from .cut import Cut, choose_cut, stream
from .expand import expand
from .find import LEAVES, Match, find
from .fingerprint import Decision, numbered
from .fuse import fuse
from .graph_utils import copied_graph, source_of, value
from .keep import wins_nothing
from .merge import Merged, merge
from .outline import outline
from .place import place
from .plain import plain
from .quantise import outputs, quantise
from .rules.experts import key_sorts
from .rules.quantised import one_scale
from .section import section_of
from .split import split
from .unshard import unshard
from .weave import weave

__all__ = [
    "Cut",
    "Decision",
    "Rewritten",
    "choose_cut",
    "expand",
    "find",
    "fuse",
    "merge",
    "outline",
    "place",
    "quantise",
    "rewrite",
    "section_of",
    "source_of",
    "split",
    "unshard",
    "weave",
    "wins_nothing",
]


@dataclass
class Rewritten:
    """A rewritten graph. The original is the graph before it was rewritten.

    graph:     the new graph; the original if nothing is done
    report:    what was done, and why not more
    sites:     number of a site -> (group, number of its collective in the original)
    refused:   (group, number in the original) of each all-reduce and reduce-scatter that is no site -> why
    merged:    (group, number in the original) of each all-reduce of a sum that is one all-reduce now -> (the number of the one whose place
               it takes, which rows it reduces)
    values:    number of a site -> the names of its norm and its residual in the original
    cut:       where the graph is cut; None if it is not
    not_woven: why the graph is not woven, or ''
    """

    graph: Graph
    report: Report
    sites: dict[int, tuple[str, int]] = field(default_factory=dict)
    refused: dict[tuple[str, int], str] = field(default_factory=dict)
    merged: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)
    values: dict[int, tuple[str, str]] = field(default_factory=dict)
    cut: Cut | None = None
    not_woven: str = ""


def rewrite(
    graph: Graph,
    options: Options,
    may_be_symmetric: Callable[[str, object], bool],
    cut_of: Callable[[list[Node]], Cut | str],
    decision: Decision = Decision(),
    may_be_sharded: Callable[[str, object], bool] = lambda group, device: False,
) -> Rewritten:
    """Find the sites of a graph, then fuse or weave them as the options ask. ``graph`` is not changed.

    may_be_symmetric: (group name, device) -> whether sites of the group may use symmetric memory
    cut_of:           the sites, as ``fused`` calls -> the cut, or why the graph is not woven; '' if the caller gives the reason
    decision:         what is not done, as some rank cannot do it
    may_be_sharded:   (group name, device) -> whether residuals may stay sharded without symmetric memory and with 16 bits
    """
    report = Report(requested=options.requested)
    work = copied_graph(graph)
    numbers = {node.name: number for node, number in numbered(work).items()}
    plain(work)
    denied = {name: decision.refused[number] for name, number in numbers.items() if number in decision.refused}
    unmerged = {name: _UNMERGED for name, number in numbers.items() if number in decision.unmerged}
    work, scatters, reduces, sums = _found(work, denied, unmerged)
    found = [*scatters, *reduces]
    matches = [f for f in found if isinstance(f, Match)]
    report.refusals = [f for f in found if isinstance(f, Refusal)]
    new = Rewritten(graph, report)
    new.sites = {i: numbers[match.all_reduce.name] for i, match in enumerate(matches)}
    new.values = {i: (match.norm.output.name, match.total.name) for i, match in enumerate(matches)}
    new.merged = {numbers[name]: (numbers[last][1], each.rows) for last, each in sums.items() for name in each.all_reduces}
    new.refused = {numbers[f.all_reduce]: f.reason for f in report.refusals if f.all_reduce in numbers}
    if options.off or not matches:
        report.sites = [_site(match, sums) for match in matches]
        kinds = [name for name, of_kind in (("all-reduces", reduces), ("reduce-scatters", scatters)) if of_kind]
        report.reasons.append(options.off or _nothing(kinds))
        return new

    for why, ends in Counter(match.norm.lacking for match in matches if match.norm.lacking).items():
        if why == LEAVES:
            said = f"{ends} sites end before their norm" if ends > 1 else "1 site ends before its norm"
            report.reasons.append(f"{said}, which is in the next graph: compile the whole model instead of each layer")
        else:
            report.reasons.append(f"{ends} sites have no norm: {why}" if ends > 1 else f"1 site has no norm: {why}")
    device = value(matches[0].total).device  # read now, as the passes below replace the node
    ctas = options.ctas if isinstance(options.ctas, int) else 0
    sites = fuse(work, matches, options.transport_and_wire, ctas)
    if options.transport_and_wire == options.transport:  # with fewer bits the norm travels in a format of its own
        quantise(work, sites, decision.unquantised)
    woven: list[Node] = []
    report.mode = "fuse"
    alike = stream(sites)
    cut = decision.not_woven or cut_of(alike)
    may_be_cut = [site for i, site in enumerate(sites) if i not in decision.unwoven and site in alike]
    if isinstance(cut, Cut) and not may_be_cut:
        cut = "the ranks have agreed not to weave a graph with these collectives"
    if isinstance(cut, Cut):
        if others_than_most := len(sites) - len(alike):
            said = f"{others_than_most} sites are not cut: they have other numbers of tokens than most"
            report.reasons.append(said if others_than_most > 1 else "1 site is not cut: it has another number of tokens than most")
        others = numbered(work, without=sites)
        unsplit = {node: "another rank cannot cut it" for node, number in others.items() if number in decision.unsplit}
        unsplit |= dict.fromkeys(key_sorts(work), cut.experts) if cut.experts else {}
        halves, cut_sites, unsplit_ops, *_ = split(work, may_be_cut, cut, unsplit)
        if reason := one_scale(unsplit_ops):
            cut = reason
        else:
            woven, report.joins = cut_sites, [*unsplit_ops.values()]
            work, new.cut = weave(halves, cut.ctas or ctas), cut
            report.mode, report.split = "weave", tuple(n if isinstance(n, int) else str(n) for n in cut.halves)
    if not isinstance(cut, Cut):
        new.not_woven = cut
        if cut and cut != options.fused_only:
            report.reasons.append(f"not woven: {cut}")
    symmetric, sharded = (all(may_be(match.group, device) for match in matches) for may_be in (may_be_symmetric, may_be_sharded))
    if lost := place(work, symmetric, decision.gathered, sharded or options.transport_and_wire != options.transport):
        lacking = {new.sites[number]: _READ for number in lost}
        decision = replace(decision, refused={**decision.refused, **lacking})
        return rewrite(graph, options, may_be_symmetric, cut_of, decision, may_be_sharded)
    names = outputs(work)
    new.graph = work
    report.sites = [_site(match, sums, site in woven, names.get(i, "")) for i, (match, site) in enumerate(zip(matches, sites))]
    return new


_READ = "its residual is float32 and its sum is not, which symmetric memory has only where norms and the next site alone read the residual"
_UNMERGED = "another rank does not make one all-reduce of the same sum"


def _found(
    graph: Graph, denied: Mapping[str, str], unmerged: Mapping[str, str]
) -> tuple[Graph, list[Refusal], list[Match | Refusal], dict[str, Merged]]:
    """The sites of a graph in which sums are one all-reduce. A sum that makes no site is left as it is.

    denied:   names of all-reduces that are refused -> the reason
    unmerged: names of all-reduces that are left as they are in sums -> the reason
    Returns (the graph; the refusals of ``unshard``; the sites and refusals of ``find``; name of an all-reduce -> the sum that it makes).
    """
    skip: set[str] = set()
    while True:
        work, merged, why = merge(graph, {*denied, *unmerged}, skip)
        sums = {each.all_reduces[-1]: each for each in merged}
        work, scatters = unshard(work, denied)
        reduces = find(work, {**why, **denied})
        refused = {sums[f.all_reduce].root for f in reduces if isinstance(f, Refusal) and f.all_reduce in sums}
        if not refused:
            reduces = [replace(f, reason=unmerged.get(f.all_reduce, f.reason)) if isinstance(f, Refusal) else f for f in reduces]
            return work, scatters, reduces, sums
        skip |= refused


def kept(new: Rewritten, original: Graph) -> Rewritten:
    """The original graph in place of a fused one that wins nothing: see ``wins_nothing``. It has the report of the fused one."""
    report = replace(new.report, mode="off", reasons=[*new.report.reasons, _KEPT])
    return Rewritten(copied_graph(original), report)


_KEPT = "Inductor's own graph is kept: over the process group in the model's dtype, fused sites are not faster"


def check_sites(new: Rewritten, options: Options) -> None:
    """Raises TokenWeaveError for a graph without sites if ``mode`` forces sites."""
    if options.forced and not new.sites:
        rows = "".join(f"\n  {r.all_reduce}: {r.reason} ({r.source})" for r in new.report.refusals)
        raise TokenWeaveError(f"{options.impossible}: {new.report.reasons[-1]}{rows}")


def check_woven(reason: str, options: Options) -> None:
    """Raises TokenWeaveError for a graph that is not woven for this reason, if ``mode`` forces weaving."""
    if options.forced == "weave" and options.min_tokens == "auto":
        raise TokenWeaveError(f"{options.impossible}: {reason}")


def _nothing(kinds: list[str]) -> str:
    """Why a graph has no site. kinds: the kinds of its collectives that could have been sites"""
    if kinds:
        return f"none of its {' and '.join(kinds)} can be fused"
    return "it contains no all-reduce; is the model tensor-parallel, and are its collectives inside the compiled region?"


def _site(match: Match, sums: Mapping[str, Merged], woven: bool = False, output: str = "") -> Site:
    total = value(match.total)
    shape = tuple(size if isinstance(size, int) else str(size) for size in total.shape)
    dtype = str(value(match.x).dtype).removeprefix("torch.")
    device, has_residual = str(total.device), match.residual is not None
    name = str(match.all_reduce)
    merged = len(sums[name].all_reduces) if name in sums else 1
    return Site(name, match.source, match.group, device, shape, dtype, has_residual, match.norm.kind, woven, merged, output)
