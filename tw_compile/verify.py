"""Whether a rewritten graph computes the same as the original: both run without code generation, and are compared site by site."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from . import backend, context, ops, passes, sent
from .explain import ISOLATED, anew
from .options import parse
from .passes.graph_utils import arguments, aten, calls
from .report import Report, Site
from .sizes import ForSizes, copied
from .transports import choose
from .variants import Compiler
from .wording import short


@dataclass(frozen=True)
class Difference:
    """The difference between the two graphs at one site.

    site:     its entry in the graph's report
    relative: |rewritten - original| / |original|, Euclidean norms in float64; the larger one of the site's norm and residual. None where
              the original graph has no such value, as at a sequence-parallel site
    """

    site: Site
    relative: float | None


@dataclass
class Verification:
    """The result of ``verify``. str() is a table.

    reports:     reports of the graphs that were compared
    differences: one for each site, in order
    outputs:     largest relative difference of the outputs of the graphs
    first:       the first op whose results differ by more than rounding; '' if there is none
    """

    reports: list[Report] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    outputs: float = 0.0
    first: str = ""

    @property
    def ok(self) -> bool:
        """Whether the rewritten graphs compute the same, except for rounding."""
        return not self.first

    def __str__(self) -> str:
        if not self.reports:
            return "tokenweave: nothing was compared, as no graph has a site. tw_compile.explain gives the reasons"
        lines = [f"tokenweave: {'the same but for rounding' if self.ok else 'NOT THE SAME: ' + self.first}"]
        for difference in self.differences:
            site, relative = difference.site, difference.relative
            done = "woven" if site.woven else "fused"
            text = "not compared" if relative is None else f"{relative:.1e}"
            lines.append(f"  {text:<12}  {done}  {'×'.join(map(str, site.shape))} {site.dtype}  {short(site.source)}")
        return "\n".join([*lines, f"  {self.outputs:<12.1e}  of what the graphs return and write"])


def verify(model: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Verification:
    """Run each graph of ``model`` as it is and rewritten, and compare the two at each site. Add the result to bug reports.

    model:   a module or a function, not compiled, or what torch.compile returned
    args, kwargs: the arguments of one call
    options: options of the backend, as for torch.compile

    It takes seconds, as no code is generated. It therefore checks the passes and the kernels, not Inductor. It computes no gradients.
    All ranks of the model's process groups must call it, with the same arguments.
    Raises TokenWeaveError for wrong options, and if ``model`` cannot be called; what the model raises; and Dynamo's error around a
    TokenWeaveError for options that this model or machine cannot meet.
    """
    parse(options)
    found = Verification()
    compiler = partial(backend.compile_graph, compiler=partial(_Comparer, found), inner_compile=_as_it_is)
    with torch.no_grad():
        torch.compile(anew(model), backend=compiler, options=options, **ISOLATED)(*args, **kwargs)
    return found


def _as_it_is(gm: GraphModule, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
    gm.recompile()
    return _boxed(lambda args: gm(*args))


def _boxed(run: Callable[..., Any]) -> Callable[..., Any]:
    run._boxed_call = True  # type: ignore[attr-defined]  # how Inductor knows a function that empties its arguments
    return run


class _Comparer(Compiler):
    """In place of compiled code, runs the original and the rewritten graph and compares them."""

    def __init__(self, found: Verification, *args: Any) -> None:
        super().__init__(*args)
        self.found = found

    def compile(self, sized: ForSizes, new: passes.Rewritten, together: bool) -> Callable[..., Any]:
        before, after = copied(sized.gm), copied(sized.gm, new.graph)
        if new.sites:
            sent.describe(new, self.options.transport_and_wire)
        if new.report.sites:
            self.complete(new.report)
        self.found.reports.append(new.report)
        return _boxed(lambda args: self._compare(before, after, new, args))

    def _compare(self, before: GraphModule, after: GraphModule, new: passes.Rewritten, args: list[Any]) -> tuple[Any, ...]:
        """Run both graphs. Only the rewritten one, which runs last, writes to the arguments of the call."""
        saved = _saved(before.graph, args)
        names = {name for pair in new.values.values() for name in pair}
        right = _Run(before, names)
        with _random_numbers_again(args):
            outputs = right.run(*saved(args))
        run = _Run(after, set(_results(after.graph)))
        results = run.run(*args)
        differences = {number: _at_site(right, run, after.graph, number, pair) for number, pair in new.values.items()}
        self.found.differences += [Difference(new.report.sites[i], differences.get(i)) for i in new.sites]
        limits = {number: _tolerance(new.report.sites[number].dtype) for number in differences}
        off = [number for number, relative in differences.items() if relative is not None and relative > limits[number]]
        worst = max([_relative(a, b) for a, b in zip(results, outputs) if isinstance(b, torch.Tensor)], default=0.0)
        self.found.outputs = max(self.found.outputs, worst)
        dtypes = [b.dtype for b in outputs if isinstance(b, torch.Tensor) and b.dtype.is_floating_point]
        differs = bool(off) or any(worst > _tolerance(dtype) for dtype in dtypes)
        said = context.all_well(self.gm.graph, "a verification", "here" if differs else "")
        if said and not self.found.first:
            self.found.first = self._first(before, after, saved, args) or f"no op by itself: at {said}"
        return results

    def _first(self, before: GraphModule, after: GraphModule, saved: Callable[..., Any], args: list[Any]) -> str:
        """The first op whose results differ. It runs both graphs once more, as it keeps the values of all nodes."""
        kept = saved(args)
        right, run = _Run(before, None), _Run(after, None)
        for each in (right, run):
            with _random_numbers_again(args):
                each.run(*saved(kept))
        parts: dict[str, dict[int | None, torch.Tensor | None]] = {}
        for node in after.graph.nodes:
            parts.setdefault(node.meta.get("of", node.name), {})[node.meta.get("half")] = run.kept.get(node.name)
        for node in before.graph.nodes:
            wanted = right.kept.get(node.name)
            got = _joined(parts.get(node.name, {}), wanted)
            if got is not None and wanted is not None and _relative(got, wanted) > _tolerance(wanted.dtype):
                return f"{node.target}, relative difference {_relative(got, wanted):.1e} ({short(passes.source_of(node))})"
        return ""


class _Run(Interpreter):
    """Runs a graph and keeps values. names: the nodes whose values it keeps; None for all nodes"""

    def __init__(self, gm: GraphModule, names: set[str] | None):
        super().__init__(gm)
        self.names = names
        self.kept: dict[str, torch.Tensor] = {}

    def run_node(self, node: Node) -> object:
        result = super().run_node(node)
        if isinstance(result, torch.Tensor) and (self.names is None or node.name in self.names):
            self.kept[node.name] = result.clone()  # the graph reuses the memory of the workspace
        return result


def _saved(graph: Graph, args: list[Any]) -> Callable[[list[Any]], list[Any]]:
    """A function of arguments that replaces those that the graph writes to by copies of their present values."""
    written = {node.args[0] for node in graph.nodes if calls(node, aten.copy_.default)}
    at = [i for i, node in enumerate(graph.find_nodes(op="placeholder")) if node in written]
    before = {i: args[i].clone() for i in at}
    return lambda given: [before[i].clone() if i in before else a for i, a in enumerate(given)]


def _random_numbers_again(args: list[Any]) -> AbstractContextManager[None]:
    """A context after which the generators have the states that they had before, so that the next graph draws the same numbers."""
    return torch.random.fork_rng(sorted({a.device.index for a in args if isinstance(a, torch.Tensor) and a.is_cuda}))


def _results(graph: Graph) -> dict[str, tuple[int, int, int | None]]:
    """The outputs of sites: name of a node -> (number of the site, 0 for the norm or 1 for the residual, half)."""
    found: dict[str, tuple[int, int, int | None]] = {}
    for node in graph.nodes:
        if calls(node, ops.fused, ops.wait):
            site = node if calls(node, ops.fused) else node.args[0]
            for user in node.users:
                found[user.name] = cast(int, arguments(site)["site"]), user.args[1], node.meta.get("half")
    return found


def _at_site(right: _Run, run: _Run, graph: Graph, number: int, names: tuple[str, str]) -> float | None:
    differences = []
    for index, name in enumerate(names):
        wanted = right.kept.get(name)
        parts = {half: run.kept.get(n) for n, (site, i, half) in _results(graph).items() if (site, i) == (number, index)}
        sharded = index == 1 and any(_is_sharded(node, number) for node in graph.nodes)
        got = None if sharded else _joined(parts, wanted)
        differences += [] if got is None or wanted is None else [_relative(got, wanted)]
    return max(differences, default=None)


def _is_sharded(node: Node, number: int) -> bool:
    """Whether a node is this site, with a residual that stays in symmetric memory, where each rank has its own rows only."""
    if not calls(node, ops.fused, ops.start) or arguments(node)["site"] != number or not arguments(node)["sharded_residual"]:
        return False
    return not choose.is_process_group(cast(str, arguments(node)["group"]))


def _joined(parts: dict[int | None, torch.Tensor | None], wanted: torch.Tensor | None) -> torch.Tensor | None:
    """A value of the rewritten graph in the shape of ``wanted``; None if it does not fit. parts: its halves, or the whole under None"""
    if wanted is None:
        return None
    got, first, second = parts.get(None), parts.get(0), parts.get(1)
    if got is None:
        if first is None or second is None or not first.dim() == second.dim() == wanted.dim():
            return None
        shapes = zip(first.shape, second.shape, wanted.shape)
        dims = [d for d, (a, b, w) in enumerate(shapes) if a + b == w and _are_equal_but_for(d, first, second, wanted)]
        if not dims:
            return None
        got = torch.cat([first, second], dims[0])
    return got.reshape(wanted.shape) if got.numel() == wanted.numel() else None


def _are_equal_but_for(dim: int, *tensors: torch.Tensor) -> bool:
    """Whether all dimensions but one are equal."""
    return len({(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}) == 1


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative difference; of integers 1.0 if any differs, of infinite values in different places ``inf``."""
    if not wanted.dtype.is_floating_point or wanted.numel() == 0:
        return float((got != wanted).any()) if wanted.numel() else 0.0
    got, wanted = got.double(), wanted.double()
    finite = torch.isfinite(wanted)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    got, wanted = got[finite], wanted[finite]
    return ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def _tolerance(dtype: torch.dtype | str) -> float:
    """The largest relative difference that rounding explains, over the layers of a model."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return max(16 * torch.finfo(dtype).eps, 1e-4) if dtype.is_floating_point else 0.0
