"""How one form of a graph is compiled for given sizes, and what the compiled form needs when it is called.

A compilation may happen in a call, outside of Dynamo. ``Compiler.inside`` sets up what Inductor expects there: the tracing context, the
fake tensor mode, and Inductor's configuration from when the graph was traced.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from . import context, logs, ops, passes, sent
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
    symbolic_config,
    tracing,
)
from .compat import inductor_config as config
from .options import Options, TokenWeaveError
from .passes.graph_utils import arguments, calls, value
from .quantise import read
from .report import Break, Report, record, say_once
from .site import Planned
from .sizes import ForSizes, copied, for_sizes
from .transports import choose

_LAST = (
    "a model was compiled as often as torch._dynamo.config.recompile_limit allows: where it would be compiled again, this rank runs "
    "uncompiled, and the collectives of ranks that do not will not match. Set torch._dynamo.config.fail_on_recompile_limit_hit = True for "
    "an error in its place. See docs/ranks.md"
)

# Symbols of a graph -> their values in a call.
Values = dict[sympy.Symbol, int]


@dataclass
class Variant:
    """A form of a graph, compiled for given sizes.

    sized: the graph with the sizes that it was compiled for, and the conditions on others
    run:   the compiled graph: a function of a list of inputs
    sites: for each site: group, device, slot, dtype, shape of the reduced value in the symbols of ``sized``, whether a LayerNorm follows,
           what the norm is quantised to, as ``Planned`` has it
    """

    sized: ForSizes
    run: Callable
    sites: list[tuple] = field(default_factory=list)

    def workspaces(self, values: Values) -> dict[tuple[str, torch.device], list[Planned]]:
        """(group, device) -> the sites of a call with these values of the symbols."""
        found: dict[tuple[str, torch.device], dict[Planned, None]] = {}
        for group, device, slot, dtype, shape, center, output in self.sites:
            numbers = [n for size in shape if (n := self.sized.number(size, values)) is not None]
            if len(numbers) == len(shape):
                found.setdefault((group, device), {})[Planned(slot, dtype, tuple(numbers), center, output)] = None
        return {place: [*prepared] for place, prepared in found.items()}


class Compiler:
    """Compiles the forms of one graph, and reports each.

    gm, inputs:    the graph that AOTAutograd has traced, and its fake inputs
    inner_compile: Inductor's ``compile_fx_inner``, or a function like it
    kwargs:        further arguments of ``inner_compile``
    broken:        where Dynamo broke the graph, or None
    """

    def __init__(self, gm: GraphModule, inputs: list, options: Options, inner_compile: Callable, kwargs: dict, broken: Break | None = None):
        self.gm, self.inputs, self.options, self.inner_compile, self.kwargs = gm, inputs, options, inner_compile, kwargs
        self.broken = broken
        self.config, self.compile_id = config.get_config_copy(), logs.compile_id()
        self.autotuned: dict | None = None
        self.not_tuned = ""

    def for_sizes(self, values: Values, fixed: bool = False) -> ForSizes:
        """A copy of the graph with symbols of its own; the graph itself where it has no symbols. fixed: for these values only"""
        if values:
            with self._configured():
                return for_sizes(self.gm, values, fixed)
        return ForSizes(self.gm, self.inputs, detect_fake_mode(self.inputs), {}, {})

    @contextlib.contextmanager
    def inside(self, sized: ForSizes) -> Iterator[None]:
        """Rewrite and compile a graph as in a compilation of Dynamo's, also in a call, and where it has symbols of its own."""
        if not sized.symbols and (sized.mode is None or TracingContext.try_get() is not None):
            yield
            return
        with self._configured(), tracing(TracingContext(sized.mode)), V.set_fake_mode(sized.mode):
            yield

    @contextlib.contextmanager
    def _configured(self) -> Iterator[None]:
        now = config.get_config_copy()
        changes = {name: given for name, given in self.config.items() if now.get(name) != given}
        # Fake tensors of symbolic sizes are decomposed in Python. The symbols of a form have guards of their own: nothing is gained by
        # being oblivious of their sizes, and with PyTorch 2.11 sizes of unknown value come of it.
        with outside(), enable_python_dispatcher(), config.patch(changes), symbolic_config.patch(backed_size_oblivious=False):
            yield

    def compile(self, sized: ForSizes, new: passes.Rewritten, together: bool) -> Callable:
        """Compile a rewritten graph with Inductor.

        together: all ranks compile it now, so that a failure on one of them is a failure on all
        Raises context.Left on all ranks if they compile together and one of them fails. Otherwise, or if the mode is forced, raises what
        Inductor raised, and TokenWeaveError where only another rank failed.
        """
        failure, error, run = "", None, None
        with self.inside(sized):
            try:
                gm, patches = copied(sized.gm, new.graph), {}
                if new.sites:
                    sent.describe(new, self.options.transport_and_wire)
                    # The user's passes run here, on the whole graph, before equal layers become calls of one function.
                    for user_pass in _user_passes():
                        user_pass(gm.graph)
                    passes.expand(gm.graph, functools.partial(choose.is_over_process_group, self.options.transport_and_wire))
                    _outline(gm, new.report)
                    patches = {"post_grad_custom_pre_pass": None, "reorder_for_locality": False}
                    for name, which in (("before", sized.gm), ("after", gm)):
                        logs.artifact(name, functools.partial(which.print_readable, print_output=False), self.compile_id)
                kwargs = self.kwargs | {"cudagraphs": BoxedBool(bool(self.kwargs.get("cudagraphs")))}
                with config.patch(patches):
                    run = self.inner_compile(gm, sized.inputs, **kwargs)
            except Exception as raised:
                failure, error = f"it could not be compiled: {type(raised).__name__}: {raised}", raised
        if together:
            failure = context.all_well(self.gm.graph, "the compilation of a graph", failure)
        if failure:
            if self.options.forced or not together:
                raise error or TokenWeaveError(failure)
            raise context.Left(failure) from error
        if new.report.sites:
            self.complete(new.report)
        assert run is not None
        return run

    def complete(self, report: Report) -> None:
        """Add transport and plan to the report of a form with sites, and record it."""
        for group, device in places_of(report):
            transport, why_not = choose.choose(self.options.transport_and_wire, group, device, self.timeout)
            report.transport = transport.name
            report.reasons += [why_not] if why_not else []
        if logs.is_last_compilation(self.compile_id):
            say_once(_LAST)
        report.rehearsal = self.autotuned
        report.reasons += [f"not autotuned: {self.not_tuned}"] if self.not_tuned else []
        self.record(report)

    def record(self, report: Report) -> None:
        """Add the report of a form of this graph to ``tw_compile.reports()``, and to the logs."""
        report.broken = self.broken
        record(report)
        logs.artifact("report", report.__str__, self.compile_id, logging.INFO)

    @property
    def timeout(self) -> float | None:
        """Seconds that a kernel waits for another rank; None for the transport's own."""
        return None if isinstance(self.options.timeout, str) else self.options.timeout

    @property
    def cuda_graphs(self) -> bool:
        """Whether CUDA graphs run the graph."""
        asked = self.options.cuda_graphs
        return asked if isinstance(asked, bool) else bool(self.kwargs.get("cudagraphs"))


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Switch off all modes of Dynamo, AOTAutograd and the user: tensors are real, and ops do what they do alone."""
    with torch.inference_mode(False), torch.no_grad(), DisableAutocast(), disable_current_modes(), no_python_dispatcher():
        yield


def uncompiled(sized: ForSizes, new: passes.Rewritten) -> Callable:
    """A function that runs a rewritten graph without code generation."""
    gm = copied(sized.gm, new.graph)

    def run(args: list) -> Any:
        given = list(args)
        args.clear()
        with torch.no_grad():
            return gm(*given)

    return run


def places_of(report: Report) -> list[tuple[str, torch.device]]:
    """The groups and devices of a graph's sites."""
    return [(group, torch.device(device)) for group, device in dict.fromkeys((site.group, site.device) for site in report.sites)]


def sites_of(new: passes.Rewritten) -> list[tuple]:
    """The sites of a rewritten graph, as ``Variant.sites`` has them."""
    found = []
    for node in new.graph.nodes if new.sites else ():
        if calls(node, ops.start, ops.fused):
            given, x = arguments(node), value(node.args[0])
            output = read(given["quantise"]).output if given["quantise"] else ""
            found.append((given["group"], x.device, given["slot"], x.dtype, tuple(x.shape), given["center"], output))
    return found


def _user_passes() -> list[Callable]:
    given = config.post_grad_custom_pre_pass or ()
    given = given if isinstance(given, (list, tuple)) else (given,)
    aware = [isinstance(each, CustomInferenceAwareGraphPass) for each in given]
    return [functools.partial(each, is_inference=True) if knows else each for each, knows in zip(given, aware)]


def _outline(gm: GraphModule, report: Report) -> None:
    """Let Inductor compile one of the layers that are alike."""
    if config.cpp_wrapper or config.fx_wrapper:
        report.reasons.append("each layer is compiled: only code in Python can call one for several")
        return
    layer, found = passes.outline(gm.graph)
    if layer is not None:
        report.alike = int(found)
    elif found:
        report.reasons.append(f"each layer is compiled: {found}")
