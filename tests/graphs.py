"""Post-grad graphs for the passes' tests: captured without code generation, printed, and run."""

import functools
import random
import re
from dataclasses import dataclass, replace
from unittest import mock

import torch
from sites import INNER, H
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import detect_fake_mode
from torch._inductor import compile_fx as inductor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tw_compile import backend, ops, passes
from tw_compile.ops import lowering
from tw_compile.options import Options
from tw_compile.passes.graph_utils import c10d, subgraphs
from tw_compile.quantise import read, results
from tw_compile.report import Report
from tw_compile.site import Site, add_norm

RANKS = 2


# --- capturing -------------------------------------------------------------------------------------------------------


def run_as_it_is(gm, inputs, **kwargs):
    """Inductor's inner_compile without its code generation: its post-grad passes, then the FX graph itself."""
    view_to_reshape(gm)
    with torch.no_grad():
        fake_mode = inductor.fake_tensor_prop(gm, inputs)
    with V.set_fake_mode(fake_mode):
        inductor._recursive_post_grad_passes(gm, is_inference=kwargs.get("is_inference", False))
    gm.recompile()

    def run(arguments):
        return gm(*arguments)

    run._boxed_call = True
    return run


def without_codegen(inner=run_as_it_is):
    """While this context is open, the backend leaves out code generation, which takes most of a compilation."""
    # What the backend leaves to Inductor it gives to compile_fx alone.
    return mock.patch.multiple(backend, compile_fx_inner=inner, compile_fx=functools.partial(inductor.compile_fx, inner_compile=inner))


def capture_with_inputs(model, *inputs, dynamic=False) -> tuple[Graph, list]:
    """The post-grad graph that the passes get, of a model without graph breaks, and what the graph is called with."""
    graphs, arguments = [], []

    def keeping_inputs(gm, inputs, **kwargs):
        run = run_as_it_is(gm, inputs, **kwargs)

        def keep(given):
            arguments[:] = given
            return run(given)

        keep._boxed_call = True
        return keep

    options = {"tokenweave.mode": "off", "post_grad_custom_pre_pass": lambda graph: graphs.append(copy(graph))}
    torch._dynamo.reset()
    for tensor in inputs:
        for dim, size in enumerate(tensor.shape):
            if size in (H, INNER):
                torch._dynamo.mark_static(tensor, dim)
    with torch.no_grad(), without_codegen(keeping_inputs):
        torch.compile(model, backend=backend.tokenweave, options=options, dynamic=dynamic, fullgraph=True)(*inputs)
    return graphs[-1], arguments  # the graphs of higher-order ops come before the one that calls them


def trace_with_inputs(function, *inputs, dynamic=False) -> tuple[Graph, list]:
    """What ``capture_with_inputs`` gives, in half the time: without Dynamo, so for functions that change nothing in place."""
    mode, graphs = FakeTensorMode(shape_env=ShapeEnv()), []

    def fake(tensor):
        dims = [DimDynamic.DUCK if dynamic and size not in (H, INNER) else DimDynamic.STATIC for size in tensor.shape]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))

    fakes = [fake(tensor) for tensor in inputs]
    pairs = [pair for f, tensor in zip(fakes, inputs) for pair in zip(f.shape, tensor.shape)]
    sizes = {str(symbol): (symbol, size) for symbol, size in pairs if isinstance(symbol, torch.SymInt)}
    symbols = [symbol for symbol, _ in sizes.values()]  # inputs of the graph, as Dynamo makes them
    keep = torch._inductor.config.patch(post_grad_custom_pre_pass=lambda graph: graphs.append(copy(graph)))
    with torch.no_grad(), mode, V.set_fake_mode(mode), enable_python_dispatcher(), keep:
        gm = make_fx(lambda *args: function(*args[len(symbols) :]), decomposition_table=select_decomp_table())(*symbols, *fakes)
        gm.graph.eliminate_dead_code()
        inductor._recursive_joint_graph_passes(gm)
        run_as_it_is(gm, [*symbols, *fakes], is_inference=True)
    return graphs[-1], [size for _, size in sizes.values()] + list(inputs)


def capture(model, *inputs, dynamic=False) -> Graph:
    return capture_with_inputs(model, *inputs, dynamic=dynamic)[0]


def copy(graph: Graph, order=None) -> Graph:
    new, env = Graph(graph.owning_module), {}
    for node in order or graph.nodes:
        env[node] = new.node_copy(node, env.__getitem__)
    return new


def all_reduces(graph: Graph) -> list[Node]:
    """Every all-reduce and reduce-scatter of a graph and of the graphs inside it."""
    kinds = (
        c10d.all_reduce.default, c10d.all_reduce_.default, c10d.all_reduce_coalesced.default,
        c10d.reduce_scatter_tensor.default, c10d.reduce_scatter_tensor_coalesced.default,
    )  # fmt: skip
    inner = [g for _, g in subgraphs(graph)]
    return [node for g in (graph, *inner) for node in g.nodes if node.target in kinds]


# --- printing --------------------------------------------------------------------------------------------------------


def text(graph: Graph, inputs: str = "") -> str:
    """A graph as documentation: ``%i = op(arguments) : type``, the same in every version of torch.

    inputs: names for the graph's tensor inputs, in order. The lines of a half begin with its number.
    """
    names, given, lines = {}, inputs.split(), []

    def show(argument):
        if isinstance(argument, Node):
            return names.setdefault(argument, f"%{sum(n[0] == '%' for n in names.values())}")
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(map(show, argument))}]"
        return f"{argument:.3g}" if isinstance(argument, float) else str(argument)

    for node in graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            names[node] = str(value) if isinstance(value, torch.SymInt) else given.pop(0)
        elif node.op == "output":
            lines.append(("", f"return {', '.join(map(show, node.args[0]))}"))
        elif node.op == "get_attr":
            names[node] = node.target
        else:
            arguments = [*_positional(node, show), *(f"{k}={show(v)}" for k, v in node.kwargs.items())]
            half = node.meta.get("half")
            line = f"{show(node)} = {_name(node)}({', '.join(arguments)}) : {_type(node.meta['val'])}"
            lines.append(("" if half is None else str(half), line))
    halves = any(half for half, _ in lines)
    return _with_canonical_symbols("\n".join(f"{half:1} {line}" if halves else line for half, line in lines)) + "\n"


def _positional(node, show):
    """The arguments as they stand; those of our own ops by name, without what says nothing in a test."""
    if getattr(node.target, "namespace", "") != "tokenweave":
        return map(show, node.args)
    named = [(a.name, v) for a, v in zip(node.target._schema.arguments, node.args)]
    dull = {"eps", "group", "transport", "ctas", "site"}
    named = [(k, read(v).name if k == "quantise" and v else v) for k, v in named]
    said = [(k, v) for k, v in named if k not in dull and v is not None and v is not False and v != ""]
    said = [pair for pair in said if pair not in (("scale", 1.0), ("offset", 0.0))]
    return [show(v) if isinstance(v, Node) and k not in ("shift", "after") else f"{k}={show(v)}" for k, v in said]


def _name(node):
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
    return name.removesuffix(".default")


def _type(value):
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_type, value))})"
    if not isinstance(value, torch.Tensor):
        return str(value)
    short = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float8_e4m3fn: "fp8", torch.int8: "i8"}
    return f"{short.get(value.dtype, value.dtype)}[{', '.join(map(str, value.shape))}]"


def _with_canonical_symbols(printed):
    symbols = list(dict.fromkeys(re.findall(r"\bs\d+\b", printed)))
    return re.sub(r"\bs\d+\b", lambda found: f"s{symbols.index(found.group())}", printed)


# --- rewriting -------------------------------------------------------------------------------------------------------


@dataclass
class Rewritten:
    """A graph before and after the passes, what it is called with, and what they report."""

    before: Graph
    after: Graph
    inputs: list
    report: Report

    def outputs(self, transport=None, shuffle=None):
        graph = self.after if shuffle is None else shuffled(self.after, shuffle)
        return run(graph, self.inputs, transport)

    def expected(self):
        return run(self.before, self.inputs)

    def check(self, transport=None, shuffle=None):
        """Assert that the graph computes what it did before. For float32: nothing but the order of sums may differ."""
        torch.testing.assert_close(self.outputs(transport, shuffle), self.expected(), rtol=1e-4, atol=1e-4)

    def outlined(self) -> "Rewritten":
        """The same with one graph for layers that are alike, if there are any."""
        graph = GraphModule(self.after.owning_module, copy(self.after)).graph
        passes.outline(graph)
        return replace(self, after=graph)

    def count(self, op) -> int:
        return sum(node.target is op for node in self.after.nodes)


def rewrite(function, *inputs, dynamic=False, symmetric=False, plan_of=lambda *_: None, by=capture_with_inputs, **options) -> Rewritten:
    """Capture a function and run the passes on it. That every all-reduce is in the report is part of every test.

    symmetric: whether the passes may place values in a workspace, as over symmetric memory
    plan_of:   what stands for the tuning of schedules
    by:        ``capture_with_inputs``, or ``trace_with_inputs``
    """
    before, arguments = by(function, *inputs, dynamic=dynamic)
    options = Options(**options)

    def cut_of(sites):
        section = passes.section_of(sites, options, cuda_graphs=True)
        plan = plan_of(section) if section else None
        return passes.choose_cut(sites, options, plan)

    with V.set_fake_mode(detect_fake_mode([n.meta["val"] for n in before.nodes if n.op == "placeholder"])):
        new = passes.rewrite(before, options, lambda group, device: symmetric, cut_of)
    passes.check_sites(new, options)
    if new.not_woven:
        passes.check_woven(new.not_woven, options)
    assert sum(site.merged for site in new.report.sites) + len(new.report.refusals) == len(all_reduces(before))
    return Rewritten(before, new.graph, arguments, new.report)


# --- running ---------------------------------------------------------------------------------------------------------


def run(graph: Graph, inputs, transport=None, emulated=None):
    """The outputs of a graph, as if every one of RANKS ranks held the same values.

    emulated: functions to call in place of ops that this machine does not have
    """
    return _Run(graph, transport or Plain(), emulated or {}).run(*inputs)


class Plain:
    """The functions of ``ops.direct`` as the specification has them."""

    def __init__(self):
        self.pending = {}

    def linear(self, a, b, bias, slot, group, transport):
        return a @ b if bias is None else a @ b + bias

    def scaled_linear(self, *given):
        return torch.ops.aten._scaled_mm.default(*given[:-3])

    def scaled_linear_v2(self, *given):
        return torch.ops.aten._scaled_mm_v2.default(*given[:-3])

    def placed(self, x, slot, group, transport):
        return x.contiguous()

    def start(self, site, group, transport):
        site = Site._make(site)
        assert site.slot not in self.pending, "a slot's site is started before its last one was waited for"
        self.pending[site.slot] = site, add_norm(site.x * RANKS, *site.addends)
        return site.x.new_empty(0)

    def wait(self, x, slot, in_workspace, group, transport):
        site, (norm, total) = self.pending.pop(slot)
        total = total if site.fp32_residual else total.to(x.dtype)
        return results(norm.to(x.dtype), total, site.quantise, site.static_scale)

    def fused(self, site, in_workspace, group, transport):
        self.start(site, group, transport)
        return self.wait(site[0], Site._make(site).slot, in_workspace, group, transport)


OPS = "linear", "scaled_linear", "scaled_linear_v2", "placed", "start", "wait", "fused"


class _Run(Interpreter):
    def __init__(self, graph, transport, emulated):
        super().__init__(GraphModule(graph.owning_module, graph))
        self.replaced = {
            c10d.all_reduce.default: lambda x, *_: x * RANKS,
            c10d.wait_tensor.default: lambda x: x,
            c10d.all_gather_into_tensor.default: lambda x, ranks, _: torch.cat([x] * ranks),
            **{op: functools.partial(self.direct, op, getattr(transport, op._opname)) for op in (getattr(ops, name) for name in OPS)},
            lowering.layer: lambda gm, written, *operands: _Run(gm.graph, transport, emulated).run(*operands),
            **emulated,
        }

    @staticmethod
    def direct(op, function, *args):
        return function(*ops.direct_arguments(op, args))

    def call_function(self, target, args, kwargs):
        return self.replaced.get(target, target)(*args, **kwargs)

    def run_node(self, node):
        result = super().run_node(node)
        promised = node.meta.get("val")
        if isinstance(promised, torch.Tensor):
            assert (result.dtype, result.dim()) == (promised.dtype, promised.dim()), f"{node.format_node()} gives {result.dtype}"
        return result


def shuffled(graph: Graph, seed: int) -> Graph:
    """The same graph in another order that its data flow allows, as a compiler may choose it."""
    choice, placed, order = random.Random(seed), set(), []
    waiting = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    order += [n for n in graph.nodes if n.op == "placeholder"]
    placed.update(order)
    while waiting:
        ready = [n for n in waiting if all(a in placed for a in n.all_input_nodes)]
        node = choice.choice(ready)
        waiting.remove(node)
        placed.add(node)
        order.append(node)
    return copy(graph, [*order, next(n for n in graph.nodes if n.op == "output")])
