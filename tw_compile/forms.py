"""The forms of a graph, fused and woven. Each call takes one by its number of tokens.

The choice is made in the call, not by Dynamo: no threshold is a guard, so that none specialises a graph, and a caller that drops
Dynamo's guards gets the right form, too. A form is compiled when a call first needs it, for the sizes of that call (sizes.py), and again
where a call has sizes that the compiled form does not cover.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import context, passes, sent
from .autotune.plan import Place, Plan, first_half, place_of_cut
from .compat import inductor_config as config
from .compat import reorder_for_locality, view_to_reshape
from .options import Options, TokenWeaveError
from .passes.cut import batch_of, cut_at, plan_by_rule
from .passes.find import collectives
from .report import Break, Report, say_once
from .sizes import ForSizes, Sizes
from .transports import agree, choose
from .transports.process_group import ProcessGroup
from .transports.symmetric import gemms
from .transports.together import WorkspaceError
from .variants import Compiler, Values, Variant, outside, places_of, sites_of, uncompiled

log = logging.getLogger("tw_compile")

# Compilations of one form for different sizes. Calls with yet other sizes run uncompiled.
MOST_VARIANTS = 16
# Combinations of sizes for which the chosen variant is remembered.
MOST_CALLS = 4096

FUSE, PLAIN = "fuse", "plain"


def compile_forms(
    gm: GraphModule,
    inputs: list,
    options: Options,
    inner_compile: Callable,
    kwargs: dict,
    compiler: Callable[..., Compiler] = Compiler,
    broken: Break | None = None,
    regions: bool = False,
) -> Callable:
    """What runs an inference graph: its ``Forms``; or what Inductor compiles, where the graph has no sites.

    gm, inputs:    the graph that AOTAutograd has traced, and its fake inputs
    inner_compile: Inductor's ``compile_fx_inner``, or a function like it; kwargs: its further arguments
    compiler:      makes the Compiler of the graph's forms
    broken:        where Dynamo broke the graph, or None
    regions:       whether the user has marked layers that are to be compiled once
    Raises TokenWeaveError on all ranks for a request that cannot be met.
    """
    view_to_reshape(gm)
    if config.reorder_for_locality:
        reorder_for_locality(gm.graph)  # otherwise Inductor would reorder the woven graph
    forms = Forms(compiler(gm, inputs, options, inner_compile, kwargs, broken), regions)
    run = forms.begin()
    if run is not None:
        return run
    forms.say_left()
    return inner_compile(gm, inputs, **kwargs)


@dataclass
class _Analysis:
    """What is known of a graph with sites, for sizes of one kind: the same sizes are symbols, and the same ones are 0 or 1.

    sized:    the graph with such sizes
    fused:    the graph with fused sites, not compiled
    batch:    shape of the reduced values without the last dimension, in the symbols of ``sized``
    together: whether all ranks are in this analysis now, as they have just agreed on it
    """

    sized: ForSizes
    fused: passes.Rewritten
    batch: list
    together: bool


class Forms:
    """A graph that can be called: ``forms(args)`` with a list of its inputs, which it empties.

    regions:   see ``compile_forms``
    left:      the report of a graph that is left to Inductor; None where it is not
    plan:      how the graph is woven; None until its sites are found
    variants:  FUSE, PLAIN or a Place -> the compiled variants of that form
    unwoven:   a Place at which the graph cannot be cut -> the reason
    runs:      values of the symbols in a call -> what runs it
    places:    groups and devices of the sites
    """

    _boxed_call = True

    def __init__(self, compiler: Compiler, regions: bool = False):
        self.compiler, self.gm, self.options, self.regions = compiler, compiler.gm, compiler.options, regions
        self.left: Report | None = None
        self.plan: Plan | None = None
        self.analyses: list[_Analysis] = []
        self.variants: dict[Place | str, list[Variant]] = {}
        self.unwoven: dict[Place, str] = {}
        self.runs: dict[tuple, Callable] = {}
        self.places: list[tuple[str, torch.device]] = []
        self.lock = threading.RLock()

    def begin(self) -> Callable | None:
        """Compile the form for the sizes that the graph was traced with. Returns what runs the graph; None if it is left to Inductor."""
        if self.options.off or not collectives(self.gm.graph):
            self.left = passes.rewrite(self.gm.graph, self.options, self._may_be_symmetric, lambda sites: "").report
            context.pass_by(self.gm.graph)
            return None
        try:
            self.sizes = self._sizes()
            values = self.sizes.hints(self.gm)
            if values is None:
                return self  # sizes without a hint: the first call has them
            run = self._run_of(values, may_cross=True)
            return self if self.sizes else run
        except agree.Crossed:  # only outside of Dynamo's lock can the other thread come to its exchange
            return self
        except context.Left as left:
            self.left = self.left or self._report(str(left))
            return None

    def _sizes(self) -> Sizes:
        """The sizes of the graph. Raises context.Left on all ranks if it has an input that this backend does not know on one of them."""
        try:
            return Sizes(self.gm)
        except ValueError as error:
            unknown = context.Left(str(error))

        def attempt(decision: passes.Decision) -> passes.Rewritten:
            raise unknown

        context.agreed(self.gm.graph, self.options, FUSE, attempt)
        raise unknown

    def __call__(self, args: list) -> object:
        values = self.sizes.of_call(args)
        run = self.runs.get(values)
        if run is None:
            with self.lock:
                run = self._run_in_call(values)
        return run(args)

    def _run_in_call(self, values: tuple[int, ...]) -> Callable:
        try:
            return self._run_of(values)
        except context.Left as left:
            self.left = self.left or self._report(str(left))
            self.say_left()
            return self._run_of(values)

    def say_left(self) -> None:
        """Report why the graph is left to Inductor."""
        assert self.left is not None
        self.compiler.record(self.left)
        if not self.options.off:
            say_once(f"nothing to fuse or weave in a graph: {self.left.reasons[-1]}")

    def _run_of(self, values: tuple[int, ...], may_cross: bool = False) -> Callable:
        """What runs calls with these values of the symbols. may_cross: as of ``context.agreed``"""
        if values not in self.runs:
            known = dict(zip(self.sizes.symbols, values))
            form, why = self._form_of(known, may_cross)
            variant = self._variant(form, why, known)
            self._prepare(variant, known)
            run = variant.run if form == PLAIN else self._entered(self._beside_gemms(variant.run, form))
            if len(self.runs) >= MOST_CALLS:
                self.runs.clear()
            self.runs[values] = run
        return self.runs[values]

    # --- which form ----------------------------------------------------------------------------------------------------

    def _form_of(self, values: Values, may_cross: bool) -> tuple[Place | str, str]:
        """(FUSE, PLAIN, or the Place where the graph is cut; why it is not woven)"""
        if self.left is not None:
            return PLAIN, ""
        analysis = self._analysis_of(values) or self._analyse(values, may_cross)
        batch = [n for size in analysis.batch if (n := analysis.sized.number(size, values)) is not None]
        at: Place | str = "its number of tokens depends on data"
        if len(batch) == len(analysis.batch):
            at = place_of_cut(batch, self.options, self._plan)
        if isinstance(at, Place):
            at = self.unwoven.get(at, at)
        if isinstance(at, str):
            passes.check_woven(at, self.options)
            return FUSE, at
        return at, ""

    def _analysis_of(self, values: Values) -> _Analysis | None:
        return next((analysis for analysis in self.analyses if analysis.sized.is_alike(values)), None)

    def _analyse(self, values: Values, may_cross: bool) -> _Analysis:
        """Find the sites of the graph with sizes of this kind. The ranks agree on the sites, on a transport and on a plan.

        Raises context.Left for a graph without sites.
        """
        sized = self.compiler.for_sizes(values)
        seen: dict = {}

        def look(sites: list[Node]) -> str:
            section = passes.section_of(sites, self.options, self.compiler.cuda_graphs) if self.plan is None else ""
            seen.update(batch=batch_of(sites), by_rule=plan_by_rule(sites))
            seen.update(section=None, not_tuned=section) if isinstance(section, str) else seen.update(section=section, not_tuned="")
            return ""

        new, together = self._agreed(FUSE, sized, look, may_cross)
        passes.check_sites(new, self.options)
        if not new.sites:
            self.left = new.report
            raise context.Left(new.report.reasons[-1])
        self.places = places_of(new.report)
        with outside():
            for group, device in self.places:
                choose.choose(self.options.transport_and_wire, group, device, self.compiler.timeout)
        if self.plan is None and not self.options.fused_only:
            with outside():
                plan = context.plan_of(self.gm.graph, self.options, seen["section"], device, together)
            if plan is not None and seen["section"] is not None:
                self.compiler.autotuned = {"section": asdict(seen["section"]), "plan": asdict(plan)}
            elif plan is None and seen["not_tuned"]:
                self.compiler.not_tuned = seen["not_tuned"]
            self.plan = plan or seen["by_rule"]
        self.analyses.append(_Analysis(sized, new, seen["batch"], together))
        return self.analyses[-1]

    @property
    def _plan(self) -> Plan:
        """The plan of the graph; any where nothing is woven, and so none is made."""
        return self.plan or Plan(None)

    # --- its compilation -----------------------------------------------------------------------------------------------

    def _variant(self, form: Place | str, why: str, values: Values, together: bool = False) -> Variant:
        """A form compiled for sizes like these.

        why:      the reason why a fused form is not woven
        together: whether all ranks compile it now, so that they can fail together
        """
        variants = self.variants.setdefault(form, [])
        if found := next((variant for variant in variants if variant.sized.holds(values)), None):
            return found
        analysis = next((analysis for analysis in self.analyses if analysis.sized.values == values), None)
        # torch takes a size of 1 for a constant, so that a half with one entry needs a graph for its sizes alone.
        fixed = isinstance(form, Place) and bool(values) and self._least_half(form, values) < 2
        sized = analysis.sized if analysis and not fixed else self.compiler.for_sizes(values, fixed)
        if isinstance(form, Place):
            try:
                new, together = self._agreed(form, sized, lambda sites: cut_at(batch_of(sites), form, self._plan))
                reason = new.not_woven
            except context.Left as left:
                reason, together = str(left), left.together
            if analysis:
                analysis.together = False
            if reason:
                passes.check_woven(reason, self.options)
                self.unwoven[form] = reason
                return self._variant(FUSE, reason, values, together)
        elif form == PLAIN:
            assert self.left is not None
            new = passes.Rewritten(sized.gm.graph, self.left)
        else:
            if analysis:
                new, together, analysis.together = analysis.fused, together or analysis.together, False
            else:
                new, _ = self._agreed(FUSE, sized, lambda sites: "")
            new.report.reasons += [f"not woven: {why}"] if why != self.options.fused_only else []
            new = self._kept(new, sized)
        sites = sites_of(new)  # before the compilation, which changes the graph
        if len(variants) < MOST_VARIANTS:
            run = self.compiler.compile(sized, new, together)
        else:
            say_once(
                f"a graph was compiled {MOST_VARIANTS} times for different sizes: calls of other sizes run uncompiled, which is slow. Pad "
                "the inputs to fewer sizes, or mark the dimensions that vary (torch._dynamo.mark_dynamic)"
            )
            run = uncompiled(sized, new)
        variants.append(Variant(sized, run, sites))
        return variants[-1]

    def _agreed(self, form: Place | str, sized: ForSizes, cut_of: Callable, may_cross: bool = False) -> tuple[passes.Rewritten, bool]:
        """The rewritten graph that all ranks have agreed on, and whether they agreed now. See ``context.agreed``."""

        def attempt(decision: passes.Decision) -> passes.Rewritten:
            return passes.rewrite(sized.gm.graph, self.options, self._may_be_symmetric, cut_of, decision, self._may_be_sharded)

        with self.compiler.inside(sized):
            return context.agreed(self.gm.graph, self.options, form, attempt, may_cross)

    def _kept(self, new: passes.Rewritten, sized: ForSizes) -> passes.Rewritten:
        """The original graph in place of a fused one that wins nothing, unless it must be fused; else the fused one."""
        if self.options.forced == "fuse" or self.regions or new.merged:
            return new
        over_process_group = functools.partial(choose.is_over_process_group, self.options.transport_and_wire)
        with self.compiler.inside(sized):
            if not passes.wins_nothing(new.graph, sized.gm.graph, new.sites.values(), over_process_group):
                return new
            sent.describe(new, self.options.transport_and_wire)
        return passes.kept(new, sized.gm.graph)

    def _least_half(self, at: Place, values: Values) -> int:
        analysis = self._analysis_of(values)
        assert analysis is not None
        length = analysis.sized.number(analysis.batch[at.dim], values)
        assert length is not None
        first = first_half(length, at.rule, self._plan.split_ratio)
        return min(first, length - first)

    def _may_be_symmetric(self, group: str, device: torch.device) -> bool:
        return choose.may_be_symmetric(self.options.transport_and_wire, group, device)

    def _may_be_sharded(self, group: str, device: torch.device) -> bool:
        return choose.may_be_hierarchical(self.options.transport_and_wire, group, device)

    def _report(self, reason: str) -> Report:
        return Report(requested=self.options.requested, reasons=[reason])

    # --- its calls -----------------------------------------------------------------------------------------------------

    def _prepare(self, variant: Variant, values: Values) -> None:
        """Make what the sites of a call need, on all ranks. If a rank cannot, the group falls back to its own collectives.

        Raises TokenWeaveError on all ranks if the transport is forced.
        """
        for (group, device), calls in variant.workspaces(values).items():
            transport, _ = choose.choose(self.options.transport_and_wire, group, device, self.compiler.timeout)
            try:
                with outside():
                    transport.prepare(calls)
            except WorkspaceError as error:
                if self.options.transport != "auto":
                    raise TokenWeaveError(f"option 'tokenweave.transport' is {self.options.transport!r}, but {error}") from error
                choose.fall_back(self.options.transport_and_wire, group, device, str(error))

    def _beside_gemms(self, run: Callable, form: Place | str) -> Callable:
        """``run`` of a woven form over process groups, whose GEMMs leave SMs to the kernels of the other half's collectives.

        Such a kernel would otherwise wait for the end of a GEMM that has all SMs. Symmetric reserves SMs itself, from start to wait.
        """
        ctas = self.options.ctas if isinstance(self.options.ctas, int) else self._plan.ctas
        if not isinstance(form, Place) or not ctas:
            return run
        transports = [choose.choose(self.options.transport_and_wire, group, device)[0] for group, device in self.places]
        return gemms.reserved(ctas)(run) if all(isinstance(transport, ProcessGroup) for transport in transports) else run

    def _entered(self, run: Callable) -> Callable:
        """``run`` inside of ``transport.call()`` for each group of the sites, so that the group's calls keep their order.

        Groups and transports are looked up in each call: a group may be destroyed and made again under its name. Groups are entered in
        the order of their names, so that two threads never wait for each other's group.
        """
        places, requested = sorted(self.places, key=str), self.options.transport_and_wire
        entries = [self._entry(group, device) for group, device in places]

        def entered(args: list) -> Any:
            with contextlib.ExitStack() if len(places) > 1 else contextlib.nullcontext() as stack:
                for i, (group, device) in enumerate(places):
                    known, transport = entries[i]
                    if not context.is_current(known, group) or choose.chosen.get((group, device, requested), _NONE)[0] is not transport:
                        entries[i] = known, transport = self._entry(group, device)
                    if stack is not None:
                        stack.enter_context(transport.call())
                        known.called()
                if stack is not None:
                    return run(args)
                with transport.call():
                    known.called()
                    return run(args)

        entered._boxed_call = True  # type: ignore[attr-defined]  # how Inductor knows a function that empties its arguments
        return entered

    def _entry(self, group: str, device: torch.device) -> tuple:
        known = context.of(group)
        return known, choose.choose(self.options.transport_and_wire, group, device, self.compiler.timeout)[0]


_NONE = (None, "")
