"""The backend: options, the training check, and Inductor with the passes in it."""

import functools
import json
import logging
from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import passes, planning, regions, rehearsal
from .ops import lowering, transport
from .options import Options, parse
from .passes.graph_utils import subgraphs
from .report import Report, record

log = logging.getLogger("tw_compile")

# Inductor keeps the counters that a compilation changed beside the compiled graph, and applies them again when the graph
# comes from its cache, where no pass runs. That is how a report survives: as the name of a counter.
_COUNTER = "tokenweave report "


def tokenweave(gm, inputs, *, mode=None, options=None):
    """What ``torch.compile(model, backend="tokenweave")`` calls for each graph.

    mode, options: torch.compile's; options in the namespace ``tokenweave.*`` are ours (``options.Options``), all others
    Inductor's. Raises TokenWeaveError for a request that cannot be met, on every rank alike.
    """
    ours, inductor = parse(options)
    # What backend="inductor" does with them: the same presets, the same errors.
    patches = torch._TorchCompileInductorWrapper(mode, inductor, None).config
    if _needs_grad(inputs):
        _say_once("a graph needs gradients: tokenweave leaves it to Inductor. For inference, run under torch.no_grad()")
        return compile_fx(gm, inputs, config_patches=patches)

    lowering.register()
    _fix_module_floats(gm)
    if any(map(is_traceable_wrapper_subclass, inputs)):
        regions.inline(gm)  # AOTAutograd does not pass a DTensor to a region
    theirs = patches.get("post_grad_custom_pre_pass") or config.post_grad_custom_pre_pass or ()
    theirs = tuple(theirs) if isinstance(theirs, (list, tuple)) else (theirs,)

    def compile_with(rewriting):
        before = counters["inductor"].copy()
        compiled = compile_fx(
            gm, inputs, inner_compile=rewriting.compile, config_patches={**patches, "post_grad_custom_pre_pass": rewriting}
        )
        names = [name for name in counters["inductor"] - before if name.startswith(_COUNTER)]
        return compiled, [_with_transport(Report.from_dict(json.loads(name.removeprefix(_COUNTER))), ours) for name in names]

    rewriting = _Pass(ours, theirs)
    try:
        compiled, reports = compile_with(rewriting)
    except Exception:  # whatever a pass raises comes wrapped in an error of Inductor's
        if rewriting.unplanned is None:
            raise
        _agree_on_plan(*rewriting.unplanned, None, ours)
        compiled, reports = compile_with(_Pass(ours, theirs))
    if others := [plan for report in reports if (plan := _other_plan(report, ours))]:
        compiled, reports = compile_with(_Pass(ours, theirs, others[0]))
    for report in reports:
        record(report)
    return compiled


def _reset() -> None:
    """torch._dynamo.reset() calls this: what Inductor's own backend does."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


tokenweave.reset = _reset


def _needs_grad(inputs) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _fix_module_floats(gm: torch.fx.GraphModule) -> None:
    """Make constants of the float attributes of modules: a norm's eps, a residual multiplier.

    With ``dynamic=True`` Dynamo traces them as inputs of the graph. Fixing one adds the guard that it stays what it is.
    """
    told, numbers = False, {}
    for node in gm.graph.find_nodes(op="placeholder"):
        number, graph_argument = getattr(node.meta.get("example_value"), "item_memo", None), node.meta.get("grapharg")
        if isinstance(number, torch.SymFloat) and graph_argument is not None:
            source = graph_argument.source
            if source.guard_source.is_unspecialized_nn_module() or source.guard_source.is_unspecialized_builtin_nn_module():
                name = str(number.node._expr)
                told = told or not TensorifyState.should_specialize(name)
                TensorifyState.specialize(name)
                numbers[node] = guard_scalar(number)
    if told:
        # Dynamo begins again, and makes constants of them itself: as inputs, every call would make a tensor of each.
        raise TensorifyScalarRestartAnalysis
    regions.fix_numbers(gm, numbers)  # where they are passed to regions, Dynamo has not


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def _with_transport(report: Report, options: Options) -> Report:
    """Settle what carries the sites, now that every rank has compiled the graph, and say so."""
    if report.mode == "off":
        if options.mode != "off":
            _say_once(f"nothing to fuse or weave in a graph: {report.reasons[-1]}")
        return report
    for group, device in dict.fromkeys((site.group, site.device) for site in report.sites):
        timeout_s = None if options.timeout == "auto" else options.timeout
        implementation, why_not = transport.choose(options.transport, group, torch.device(device), timeout_s)
        report.transport = implementation.name
        report.reasons += [why_not] if why_not else []
    return report


def _agree_on_plan(section, group: str, device: torch.device, mine: planning.Plan | None, options: Options) -> planning.Plan:
    transport.choose(options.transport, group, device, None if options.timeout == "auto" else options.timeout)
    return rehearsal.agree_on(section, group, device, options.transport, mine)


def _other_plan(report: Report, options: Options) -> planning.Plan | None:
    """The plan of all ranks, where it is not the one that this rank has compiled a graph with."""
    if report.rehearsal is None:
        return None
    site, mine = report.sites[0], planning.Plan(**report.rehearsal["plan"])
    section = rehearsal.Section.from_dict(report.rehearsal["section"])
    plan = _agree_on_plan(section, site.group, torch.device(site.device), mine, options)
    return None if plan == mine else plan


class _Unplanned(Exception):
    """The graph is to be rehearsed first."""


class _Pass(CustomGraphPass):
    """The passes, where Inductor calls them, and after them those that the user configured there.

    Free of side effects: on a cache hit they do not run. plan: the one to use, whatever this rank has.
    """

    def __init__(self, options: Options, then: tuple, plan: planning.Plan | None = None):
        self.options, self.then, self.plan = options, then, plan
        self.unplanned = None  # (section, group, device), if that is why it failed
        self.called = []  # the graphs of its higher-order ops: Inductor calls a pass with these, too, and they are not ours

    def compile(self, gm, inputs, **kwargs):
        """What Inductor does with a graph that AOTAutograd has traced, and does not do where the cache has it."""
        regions.inline(gm)
        self.called = [graph for _, graph in subgraphs(gm.graph)]
        return compile_fx_inner(gm, inputs, **kwargs)

    def __call__(self, graph: torch.fx.Graph) -> None:
        report = None if any(graph is called for called in self.called) else self._rewrite(graph)
        for other in self.then:
            other(graph)
        if report is not None:
            if report.mode != "off":
                _outline(graph, report)
            counters["inductor"][_COUNTER + json.dumps(report.to_dict())] += 1

    def _rewrite(self, graph: torch.fx.Graph) -> Report:
        new, report = passes.rewrite(graph, self.options, self._may_be_symmetric, self._plan_of)
        if new is not graph:
            _become(graph, new)
        return report

    def _may_be_symmetric(self, group: str, device: torch.device) -> bool:
        usable, _ = transport.candidates(self.options.transport, group, device)
        return any(name != "process_group" for name in usable)

    def _plan_of(self, section, group: str, device: torch.device) -> planning.Plan:
        plan = self.plan or rehearsal.known(section, group, device, self.options.transport)
        if plan is None:
            self.unplanned = section, group, device
            raise _Unplanned  # a rehearsal is for all ranks together, and one that has this graph in its cache does not come here
        return plan

    def uuid(self):
        if not all(isinstance(other, CustomGraphPass) for other in self.then):
            return None  # what a plain function does cannot be part of a cache key: no cache
        then = [other.uuid() for other in self.then]
        files = sorted(str(path) for path in Path(__file__).parent.rglob("*.py"))
        # The rank too: where a shard is cut from a whole, each rank cuts out its own.
        world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return get_hash_for_files(tuple(files), repr((self.options, self.plan, then, world, torch.cuda.device_count())))


def _outline(graph: torch.fx.Graph, report: Report) -> None:
    """Let Inductor compile one of the layers that are alike, and do to that what it is about to do to the graph."""
    if config.cpp_wrapper or config.fx_wrapper:
        report.reasons.append("each layer is compiled: only code in Python can call one for several")
        return
    layer, found = passes.outline(graph)
    if layer is not None:
        report.alike = found
        # The passes of this place are done, and it keeps the order of the weave.
        with config.patch(post_grad_custom_pre_pass=None, reorder_for_locality=False):
            post_grad_passes(layer, is_inference=True)
    elif found:
        report.reasons.append(f"each layer is compiled: {found}")


def _become(graph: torch.fx.Graph, new: torch.fx.Graph) -> None:
    """Fill ``graph`` with the nodes of ``new``: Inductor holds on to the object."""
    for node in reversed(graph.nodes):
        graph.erase_node(node)
    env = {}
    for node in new.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
