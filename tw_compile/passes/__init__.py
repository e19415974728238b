"""The passes over a post-grad graph. ``rewrite`` runs them in order."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from ..options import Options, TokenWeaveError
from ..report import Refusal, Report, Site
from .cut import Cut, choose_cut
from .find import Match, find
from .fuse import fuse
from .graph_utils import copied_graph, source_of, value
from .outline import outline
from .place import place
from .plain import plain
from .section import section_of
from .split import split
from .unshard import unshard
from .weave import weave
from .wire import Decision, numbered

__all__ = [
    "Cut",
    "Decision",
    "Rewritten",
    "choose_cut",
    "find",
    "fuse",
    "outline",
    "place",
    "rewrite",
    "section_of",
    "source_of",
    "split",
    "unshard",
    "weave",
]


@dataclass
class Rewritten:
    """A rewritten graph. The original is the graph before it was rewritten.

    graph:     the new graph; the original if nothing is done
    report:    what was done, and why not more
    sites:     number of a site -> (group, number of its collective in the original)
    refused:   (group, number in the original) of each all-reduce and reduce-scatter that is no site -> why
    values:    number of a site -> the names of its norm and its residual in the original
    cut:       where the graph is cut; None if it is not
    not_woven: why the graph is not woven, or ''
    """

    graph: Graph
    report: Report
    sites: dict[int, tuple[str, int]] = field(default_factory=dict)
    refused: dict[tuple[str, int], str] = field(default_factory=dict)
    values: dict[int, tuple[str, str]] = field(default_factory=dict)
    cut: Cut | None = None
    not_woven: str = ""


def rewrite(
    graph: Graph,
    options: Options,
    may_be_symmetric: Callable[[str, object], bool],
    cut_of: Callable[[list[Node]], Cut | str],
    decision: Decision = Decision(),
) -> Rewritten:
    """Find the sites of a graph, then fuse or weave them as the options ask. ``graph`` is not changed.

    may_be_symmetric: (group name, device) -> whether sites of the group may use symmetric memory
    cut_of:           the sites, as ``fused`` calls -> the cut, or why the graph is not woven; '' if the caller gives the reason
    decision:         what is not done, as some rank cannot do it
    """
    report = Report(requested=options.requested)
    work = copied_graph(graph)
    numbers = {node.name: number for node, number in numbered(work).items()}
    plain(work)
    denied = {name: decision.refused[number] for name, number in numbers.items() if number in decision.refused}
    work, scatters = unshard(work, denied)
    reduces = find(work, denied)
    found = [*scatters, *reduces]
    matches = [f for f in found if isinstance(f, Match)]
    report.refusals = [f for f in found if isinstance(f, Refusal)]
    new = Rewritten(graph, report)
    new.sites = {i: numbers[match.all_reduce.name] for i, match in enumerate(matches)}
    new.values = {i: (match.norm.output.name, match.total.name) for i, match in enumerate(matches)}
    new.refused = {numbers[f.all_reduce]: f.reason for f in report.refusals if f.all_reduce in numbers}
    if options.off or not matches:
        report.sites = [_site(match) for match in matches]
        kinds = [name for name, of_kind in (("all-reduces", reduces), ("reduce-scatters", scatters)) if of_kind]
        report.reasons.append(options.off or _nothing(kinds))
        return new

    device = value(matches[0].total).device  # read now, as the passes below replace the node
    ctas = options.ctas if isinstance(options.ctas, int) else 0
    sites = fuse(work, matches, options.transport, ctas)
    woven: list[Node] = []
    report.mode = "fuse"
    cut = decision.not_woven or cut_of(sites)
    if isinstance(cut, Cut):
        may_be_cut = [site for i, site in enumerate(sites) if i not in decision.unwoven]
        others = numbered(work, without=sites)
        unsplit = {node: "another rank cannot cut it" for node, number in others.items() if number in decision.unsplit}
        work, woven, unsplit_ops, *_ = split(work, may_be_cut, cut, unsplit)
        report.joins = [*unsplit_ops.values()]
        work, new.cut = weave(work, cut.ctas or ctas), cut
        report.mode, report.split = "weave", tuple(n if isinstance(n, int) else str(n) for n in cut.halves)
    else:
        new.not_woven = cut
        if cut and cut != options.fused_only:
            report.reasons.append(f"not woven: {cut}")
    place(work, all(may_be_symmetric(match.group, device) for match in matches), decision.gathered)
    new.graph, report.sites = work, [_site(match, site in woven) for match, site in zip(matches, sites)]
    return new


def check_sites(new: Rewritten, options: Options) -> None:
    """Raises TokenWeaveError for a graph without sites if ``mode`` forces sites."""
    if options.forced and not new.sites:
        rows = "".join(f"\n  {r.all_reduce}: {r.reason} ({r.source})" for r in new.report.refusals)
        raise TokenWeaveError(f"{_asked(options)}: {new.report.reasons[-1]}{rows}")


def check_woven(reason: str, options: Options) -> None:
    """Raises TokenWeaveError for a graph that is not woven for this reason, if ``mode`` forces weaving."""
    if options.forced == "weave" and options.min_tokens == "auto":
        raise TokenWeaveError(f"{_asked(options)} woven: {reason}")


def _asked(options: Options) -> str:
    return f"option 'tokenweave.mode' is {options.mode!r}, but this graph cannot be"


def _nothing(kinds: list[str]) -> str:
    """Why a graph has no site. kinds: the kinds of its collectives that could have been sites"""
    if kinds:
        return f"none of its {' and '.join(kinds)} can be fused"
    return "it contains no all-reduce; is the model tensor-parallel, and are its collectives inside the compiled region?"


def _site(match: Match, woven: bool = False) -> Site:
    total = value(match.total)
    shape = tuple(size if isinstance(size, int) else str(size) for size in total.shape)
    dtype = str(total.dtype).removeprefix("torch.")
    device, has_residual = str(total.device), match.residual is not None
    return Site(str(match.all_reduce), match.source, match.group, device, shape, dtype, has_residual, match.norm.kind, woven)
