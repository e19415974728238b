"""The forms of a graph, fused and woven, and the choice between them: made when the graph is called, by its number of tokens.

No threshold is a guard, so none specialises a graph, and whoever drops Dynamo's guards gets the right form, too. A form is compiled
when a call first needs it, for the sizes of that call (sizes.py), and again where what was taken for granted does not hold.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from . import context, logs, ops, passes
from .autotune.plan import Place, first_half, place_of_cut
from .compat import (
    BoxedBool,
    CustomInferenceAwareGraphPass,
    DisableAutocast,
    TracingContext,
    V,
    detect_fake_mode,
    disable_current_modes,
    enable_python_dispatcher,
    no_python_dispatcher,
    reorder_for_locality,
    tracing,
    view_to_reshape,
)
from .compat import inductor_config as config
from .options import Options, TokenWeaveError
from .passes.cut import batch_of, cut_at, plan_by_rule, section_of
from .passes.find import collectives
from .passes.graph_utils import arguments, calls, value
from .report import Report, record, say_once
from .sizes import ForSizes, Sizes, copied, for_sizes
from .transports import choose
from .transports.together import WorkspaceError

log = logging.getLogger("tw_compile")

# Compilations of one form for different sizes. Calls of yet others run as they are, uncompiled.
MOST_VARIANTS = 16
# Sizes of calls whose form is remembered.
MOST_CALLS = 4096

FUSE, PLAIN = "fuse", "plain"


def compile_forms(gm, inputs: list, options: Options, inner_compile: Callable, kwargs: dict, forms, broken=None) -> Callable:
    """What runs a graph of inference that AOTAutograd has traced: its forms; or where it has no sites, what Inductor makes of it.

    inner_compile: Inductor's; kwargs: further arguments of its; forms: Forms, or what stands for it
    broken: where Dynamo broke the graph (report.Break), or None
    Raises TokenWeaveError for a request that cannot be met, on every rank alike.
    """
    view_to_reshape(gm)
    if config.reorder_for_locality:
        reorder_for_locality(gm.graph)  # Inductor would do it to the graph that is woven
    made = forms(gm, inputs, options, inner_compile, kwargs)
    made.broken = broken
    run = made.begin()
    if run is not None:
        return run
    made.record(made.left)
    if not options.off:
        say_once(f"nothing to fuse or weave in a graph: {made.left.reasons[-1]}")
    return inner_compile(gm, inputs, **kwargs)


@dataclass
class _Variant:
    """A form that was compiled, and the sizes that it is for.

    sites: (group, device, slot, dtype, shape of what is reduced in the symbols of ``made``, whether a LayerNorm follows)
    """

    made: ForSizes
    run: Callable
    sites: list[tuple]

    def calls(self, known: dict) -> dict[tuple, list[tuple]]:
        """(group, device) -> what its transport is to be prepared for, with these values of the symbols."""
        found = {}
        for group, device, slot, dtype, shape, center in self.sites:
            numbers = tuple(self.made.number(size, known) for size in shape)
            if None not in numbers:
                found.setdefault((group, device), {})[slot, dtype, numbers, center] = None
        return {place: [*calls] for place, calls in found.items()}


@dataclass
class _Learnt:
    """What is known of a graph whose sites were found.

    batch: the shape of its reduced values, in the symbols of ``made``
    first: whether all ranks are here, as what is made of the graph was decided just now
    """

    made: ForSizes
    new: passes.Rewritten
    batch: list
    first: bool


class Forms:
    """A graph that can be called: ``forms(args)`` with a list of its inputs, which it empties.

    left: the report of a graph that is left to Inductor; None where it is not
    """

    _boxed_call = True

    def __init__(self, gm, inputs, options, inner_compile, kwargs):
        self.gm, self.inputs, self.options, self.inner_compile, self.kwargs = gm, inputs, options, inner_compile, kwargs
        self.config, self.compile_id = config.get_config_copy(), logs.compile_id()
        self.left: Report | None = None
        self.broken = None
        self.plan, self.rehearsal = None, None
        self.learnt: list[_Learnt] = []
        self.variants: dict[object, list[_Variant]] = {}
        self.not_woven: dict[Place, str] = {}
        self.runs: dict[tuple, Callable] = {}
        self.places: list[tuple[str, torch.device]] = []  # groups and devices of its sites
        self.lock = threading.RLock()

    def begin(self) -> Callable | None:
        """What runs the graph, with the form compiled for the sizes that it was traced with; None if it is left to Inductor."""
        if self.options.off or not collectives(self.gm.graph):
            self.left = passes.rewrite(self.gm.graph, self.options, self._may_be_symmetric, lambda sites: "").report
            return None
        try:
            self.sizes = Sizes(self.gm)
            values = self.sizes.hints(self.gm)
            if values is None:
                return self  # sizes without a hint: the first call has them
            run = self._run_of(values)
            return self if self.sizes else run
        except context.Left as left:
            self.left = self.left or self._report(str(left))
            return None

    def __call__(self, args: list):
        values = self.sizes.of_call(args)
        run = self.runs.get(values)
        if run is None:
            with self.lock:
                run = self._run_in_call(values)
        return run(args)

    def _run_in_call(self, values: tuple) -> Callable:
        try:
            return self._run_of(values)
        except context.Left as left:
            self.left = self.left or self._report(str(left))
            return self._run_of(values)

    def _run_of(self, values: tuple) -> Callable:
        """What runs calls with these values of the symbols."""
        if values not in self.runs:
            variant = self._variant(*self._form_of(values), values)
            self._prepare(variant, dict(zip(self.sizes.symbols, values)))
            run = self._entered(variant.run) if variant.sites else variant.run
            if len(self.runs) >= MOST_CALLS:
                self.runs.clear()
            self.runs[values] = run
        return self.runs[values]

    # --- which form ----------------------------------------------------------------------------------------------------

    def _form_of(self, values: tuple) -> tuple[object, str]:
        """(FUSE, PLAIN or where the graph is cut; why it is not woven)"""
        if self.left is not None:
            return PLAIN, ""
        known = dict(zip(self.sizes.symbols, values))
        learnt = next((learnt for learnt in self.learnt if learnt.made.is_alike(known)), None) or self._learn(known)
        batch = [learnt.made.number(size, known) for size in learnt.batch]
        if None in batch:
            at = "its number of tokens depends on data"
        else:
            at = place_of_cut(batch, self.options, self.plan)
        at = self.not_woven.get(at, at)
        if isinstance(at, str):
            passes.check_woven(at, self.options)
            return FUSE, at
        return at, ""

    def _learn(self, known: dict) -> _Learnt:
        """Find the sites of the graph with sizes of this kind, and agree on what is made of them, and how the graph is woven."""
        made, seen = self._for_sizes(known), {}

        def look(sites):
            seen.update(batch=batch_of(sites), section=section_of(sites, self.options), by_rule=plan_by_rule(sites))
            return ""

        new, first = self._agreed(FUSE, made, look)
        passes.check_sites(new, self.options)
        if not new.sites:
            self.left = new.report
            raise context.Left(new.report.reasons[-1])
        self.places = _places(new.report)
        with _outside():
            for group, device in self.places:
                choose.choose(self.options.transport, group, device, self._timeout)
        if self.plan is None and not self.options.fused_only:
            with _outside():
                plan = context.plan_of(self.gm.graph, self.options, seen["section"], device, first)
            if plan is not None and seen["section"] is not None:
                self.rehearsal = {"section": asdict(seen["section"]), "plan": asdict(plan)}
            self.plan = plan or seen["by_rule"]
        self.learnt.append(_Learnt(made, new, seen["batch"], first))
        return self.learnt[-1]

    # --- compiling -----------------------------------------------------------------------------------------------------

    def _variant(self, form, why: str, values: tuple, first: bool = False) -> _Variant:
        """A form that is compiled for sizes like these. first: whether all ranks are here, so that they can fail together"""
        known = dict(zip(self.sizes.symbols, values))
        variants = self.variants.setdefault(form, [])
        if found := next((variant for variant in variants if variant.made.holds(known)), None):
            return found
        learnt = next((learnt for learnt in self.learnt if learnt.made.values == known), None)
        # A half of one entry has another size than any other: torch takes a size of 1 for a constant.
        fixed = isinstance(form, Place) and bool(known) and self._least_half(form, known) < 2
        made = learnt.made if learnt and not fixed else self._for_sizes(known, fixed)
        if form == PLAIN:
            new = passes.Rewritten(made.gm.graph, self.left)
        elif form == FUSE:
            if learnt:
                new, first, learnt.first = learnt.new, first or learnt.first, False
            else:
                new, _ = self._agreed(FUSE, made, lambda sites: "")
            new.report.reasons += [f"not woven: {why}"] if why != self.options.fused_only else []
        else:
            try:
                new, first = self._agreed(form, made, lambda sites: cut_at(batch_of(sites), form, self.plan))
                reason = new.not_woven
            except context.Left as left:
                reason, first = str(left), left.together
            if learnt:
                learnt.first = False
            if reason:
                passes.check_woven(reason, self.options)
                self.not_woven[form] = reason
                return self._variant(FUSE, reason, values, first)
        if len(variants) < MOST_VARIANTS:
            run = self._compile(made, new, first)
        else:
            message = f"a graph was compiled {MOST_VARIANTS} times for different sizes: others run uncompiled. See docs/ranks.md, Sizes"
            say_once(message)
            run = _uncompiled(made, new)
        variants.append(_Variant(made, run, _sites_of(new)))
        return variants[-1]

    def _agreed(self, form, made: ForSizes, cut_of: Callable) -> tuple[passes.Rewritten, bool]:
        def attempt(decision):
            return passes.rewrite(made.gm.graph, self.options, self._may_be_symmetric, cut_of, decision)

        with self._inside(made):
            return context.agreed(self.gm.graph, self.options, form, attempt)

    def _compile(self, made: ForSizes, new: passes.Rewritten, first: bool) -> Callable:
        """Have Inductor compile a rewritten graph. first: whether all ranks are at it, so that they can fail together"""
        failure, error = "", None
        with self._inside(made):
            try:
                gm, patches = copied(made.gm, new.graph), {}
                if new.sites:
                    # The user's passes of this place see the graph as a whole, before layers are calls.
                    for user_pass in _user_passes():
                        user_pass(gm.graph)
                    _outline(gm, new.report)
                    patches = {"post_grad_custom_pre_pass": None, "reorder_for_locality": False}
                    for name, which in (("before", made.gm), ("after", gm)):
                        logs.artifact(name, functools.partial(which.print_readable, print_output=False), self.compile_id)
                kwargs = self.kwargs | {"cudagraphs": BoxedBool(bool(self.kwargs.get("cudagraphs")))}
                with config.patch(patches):
                    run = self.inner_compile(gm, made.inputs, **kwargs)
            except Exception as raised:
                failure, error = f"it could not be compiled: {type(raised).__name__}: {raised}", raised
        if first:
            failure = context.all_well(self.gm.graph, "the compilation of a graph", failure)
        if failure:
            if self.options.forced or not first:
                raise error or TokenWeaveError(failure)
            raise context.Left(failure) from error
        if new.sites:
            self._complete(new.report)
        return run

    def _complete(self, report: Report) -> None:
        for group, device in _places(report):
            transport, why_not = choose.choose(self.options.transport, group, device, self._timeout)
            report.transport = transport.name
            report.reasons += [why_not] if why_not else []
        report.rehearsal = self.rehearsal
        self.record(report)

    def record(self, report: Report) -> None:
        """Add the report of a form of this graph to ``tw_compile.reports()``, and to the logs."""
        report.broken = self.broken
        record(report)
        logs.artifact("report", report.__str__, self.compile_id, logging.INFO)

    @property
    def _timeout(self) -> float | None:
        return None if self.options.timeout == "auto" else self.options.timeout

    def _may_be_symmetric(self, group: str, device: torch.device) -> bool:
        usable, _ = choose.candidates(self.options.transport, group, device)
        return any(name != "process_group" for name in usable)

    def _report(self, reason: str) -> Report:
        return Report(requested=self.options.requested, reasons=[reason])

    def _least_half(self, at: Place, known: dict) -> int:
        learnt = next(learnt for learnt in self.learnt if learnt.made.is_alike(known))
        length = learnt.made.number(learnt.batch[at.dim], known)
        first = first_half(length, at.rule, self.plan.split_ratio)
        return min(first, length - first)

    def _for_sizes(self, known: dict, fixed: bool = False) -> ForSizes:
        if known:
            with self._configured():
                return for_sizes(self.gm, known, fixed)
        return ForSizes(self.gm, self.inputs, detect_fake_mode(self.inputs), {}, {})

    @contextlib.contextmanager
    def _inside(self, made: ForSizes):
        """Where a graph with symbols of its own is rewritten and compiled: as in a compilation of Dynamo's, also in a call."""
        if not made.symbols:
            yield
            return
        with self._configured(), tracing(TracingContext(made.mode)), V.set_fake_mode(made.mode):
            yield

    @contextlib.contextmanager
    def _configured(self):
        now = config.get_config_copy()
        changes = {name: given for name, given in self.config.items() if now.get(name) != given}
        # Fake tensors of symbolic sizes are decomposed in Python.
        with _outside(), enable_python_dispatcher(), config.patch(changes):
            yield

    def _prepare(self, variant: _Variant, known: dict) -> None:
        """Have all that the sites of a call need made on all ranks. Where a rank cannot, its group's own collectives carry them."""
        for (group, device), calls in variant.calls(known).items():
            transport, _ = choose.choose(self.options.transport, group, device, self._timeout)
            try:
                with _outside():
                    transport.prepare(calls)
            except WorkspaceError as error:
                if self.options.transport != "auto":
                    raise TokenWeaveError(f"option 'tokenweave.transport' is {self.options.transport!r}, but {error}") from error
                choose.fall_back(self.options.transport, group, device, str(error))

    def _entered(self, run: Callable) -> Callable:
        """``run`` as a call of the groups that there are when it is called: in the order of their other calls."""
        places, requested = self.places, self.options.transport
        entries = [self._entry(group, device) for group, device in places]

        def entered(args):
            with contextlib.ExitStack() if len(places) > 1 else contextlib.nullcontext() as stack:
                for i, (group, device) in enumerate(places):
                    known, transport = entries[i]
                    if not context.is_current(known, group) or choose.chosen.get((group, device, requested), _NONE)[0] is not transport:
                        entries[i] = known, transport = self._entry(group, device)
                    known.called()
                    if stack is not None:
                        stack.enter_context(transport.call())
                if stack is not None:
                    return run(args)
                with transport.call():
                    return run(args)

        entered._boxed_call = True
        return entered

    def _entry(self, group: str, device: torch.device) -> tuple:
        known = context.of(group)
        return known, choose.choose(self.options.transport, group, device, self._timeout)[0]


_NONE = (None, "")


def _sites_of(new: passes.Rewritten) -> list[tuple]:
    found = []
    for node in new.graph.nodes if new.sites else ():
        if calls(node, ops.start, ops.fused):
            given, x = arguments(node), value(node.args[0])
            found.append((given["group"], x.device, given["slot"], x.dtype, tuple(x.shape), given["center"]))
    return found


@contextlib.contextmanager
def _outside():
    """Outside of whatever Dynamo, AOTAutograd or the user has switched on: tensors are real, and ops do what they do alone."""
    with torch.inference_mode(False), torch.no_grad(), DisableAutocast(), disable_current_modes(), no_python_dispatcher():
        yield


def _places(report: Report) -> list[tuple[str, torch.device]]:
    """The groups and devices of a graph's sites."""
    return [(group, torch.device(device)) for group, device in dict.fromkeys((site.group, site.device) for site in report.sites)]


def _uncompiled(made: ForSizes, new: passes.Rewritten) -> Callable:
    gm = copied(made.gm, new.graph)

    def run(args):
        given = list(args)
        args.clear()
        with torch.no_grad():
            return gm(*given)

    return run


def _user_passes() -> list[Callable]:
    given = config.post_grad_custom_pre_pass or ()
    given = given if isinstance(given, (list, tuple)) else (given,)
    aware = [isinstance(each, CustomInferenceAwareGraphPass) for each in given]
    return [functools.partial(each, is_inference=True) if knows else each for each, knows in zip(given, aware)]


def _outline(gm: torch.fx.GraphModule, report: Report) -> None:
    """Let Inductor compile one of the layers that are alike."""
    if config.cpp_wrapper or config.fx_wrapper:
        report.reasons.append("each layer is compiled: only code in Python can call one for several")
        return
    layer, found = passes.outline(gm.graph)
    if layer is not None:
        report.alike = found
    elif found:
        report.reasons.append(f"each layer is compiled: {found}")
