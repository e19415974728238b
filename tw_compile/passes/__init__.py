"""The passes over a post-grad graph, in order. ``rewrite`` reads as the story."""

from dataclasses import asdict

from torch.fx import Graph

from ..options import Options, TokenWeaveError
from ..report import Refusal, Report, Site
from .cut import Cut, choose_cut, section_of
from .find import Match, find
from .fuse import fuse
from .graph_utils import value
from .outline import outline
from .place import place
from .split import split
from .unshard import unshard
from .weave import weave

__all__ = ["rewrite", "unshard", "find", "fuse", "choose_cut", "split", "weave", "place", "outline"]


def rewrite(graph: Graph, options: Options, may_be_symmetric, plan_of=lambda section, group, device: None) -> tuple[Graph, Report]:
    """Find the sites of a graph and do what the options ask for. Returns the new graph, and what was done.

    Sequence-parallel sites are found in the form that ``unshard`` gives them; ``graph`` keeps its own where nothing is done.

    may_be_symmetric: (group name, device) -> whether its sites may run over symmetric memory, so that values should live there
    plan_of:          (section, group name, device) -> the Plan that was rehearsed for it, or None for one by rule
    Raises TokenWeaveError where ``mode`` asks for what the graph does not allow. Free of side effects but on ``graph``:
    on a cache hit this does not run.
    """
    report = Report(requested=asdict(options))
    whole, scatters = unshard(graph)
    reduces = find(whole)
    found = [*scatters, *reduces]
    matches = [f for f in found if isinstance(f, Match)]
    report.refusals = [f for f in found if isinstance(f, Refusal)]
    rows = [_site(match) for match in matches]
    if options.mode == "off" or not matches:
        report.sites = rows if options.mode == "off" else []
        kinds = [name for name, some in (("all-reduces", reduces), ("reduce-scatters", scatters)) if some]
        return graph, _idle(report, options, kinds)

    device = value(matches[0].total).device  # asked now: the passes below replace the node
    ctas = 0 if options.ctas == "auto" else options.ctas
    graph, sites = whole, fuse(whole, matches, options.transport, ctas)
    report.mode, cut = "fuse", "mode is fuse"
    if options.mode != "fuse":
        plan, section = None, section_of(sites, options)
        if section is not None and (plan := plan_of(section, matches[0].group, device)):
            report.rehearsal = {"section": asdict(section), "plan": asdict(plan)}
        cut = choose_cut(sites, options, plan)
    woven = []
    if isinstance(cut, Cut):
        graph, woven, report.joins, _ = split(graph, sites, cut)
        graph = weave(graph, cut.ctas or ctas)
        report.mode, report.split = "weave", tuple(n if isinstance(n, int) else str(n) for n in cut.halves)
    elif options.mode == "weave" and options.min_tokens == "auto":
        raise TokenWeaveError(f"option 'tokenweave.mode' is 'weave', but this graph cannot be woven: {cut}")
    elif options.mode != "fuse":
        report.reasons.append(f"not woven: {cut}")
    place(graph, workspace=all(may_be_symmetric(match.group, device) for match in matches))
    report.sites = [_site(match, site in woven) for match, site in zip(matches, sites)]
    return graph, report


def _idle(report: Report, options: Options, kinds: list[str]) -> Report:
    """The report of a graph that is left as it is. kinds: of what it has"""
    if options.mode == "off":
        report.reasons.append("mode is off")
        return report
    reason = (
        f"none of its {' and '.join(kinds)} can be fused"
        if kinds
        else "it contains no all-reduce; is the model tensor-parallel, and are its collectives inside the compiled region?"
    )
    if options.mode != "auto":
        detail = "".join(f"\n  {r.all_reduce}: {r.reason} ({r.source})" for r in report.refusals)
        raise TokenWeaveError(f"option 'tokenweave.mode' is {options.mode!r}, but this graph cannot be: {reason}{detail}")
    report.reasons.append(reason)
    return report


def _site(match: Match, woven: bool = False) -> Site:
    total = value(match.total)
    shape = tuple(size if isinstance(size, int) else str(size) for size in total.shape)
    dtype = str(total.dtype).removeprefix("torch.")
    device, has_residual = str(total.device), match.residual is not None
    return Site(str(match.all_reduce), match.source, match.group, device, shape, dtype, has_residual, match.norm.kind, woven)
