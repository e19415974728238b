"""outline: layers that are alike are calls of one graph, which computes the same in every order that data flow allows."""

from dataclasses import replace

import expecttest
import pytest
import torch
import torch._inductor.config
from graphs import copy, rewrite, run, shuffled, text, without_codegen
from models import VOCAB, parallel
from sites import INNER, H, all_reduce, hf_norm, values
from test_weave import Logging, designed
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.compile_fx import _recursive_post_grad_passes
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
from torch._opaque_base import OpaqueBase
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from workspace import Workspace

import tw_compile
from tw_compile import backend, forms, ops, passes
from tw_compile.compat import FakeScriptObject, auto_functionalized
from tw_compile.ops import lowering
from tw_compile.options import Options
from tw_compile.passes import outline
from tw_compile.passes.graph_utils import arguments, aten, c10d, prims, value
from tw_compile.passes.rules import token_axis
from tw_compile.passes.rules.functional import rows
from tw_compile.site import Site

pytestmark = pytest.mark.usefixtures("world")


def mlps(layers, between=lambda i, norm, up, down: (norm @ up).relu() @ down):
    """A function of x, a residual and the weights of so many layers. between: (number, norm, weights) -> what is reduced next"""

    def stack(x, residual, *weights):
        for i in range(layers):
            weight, up, down = weights[3 * i : 3 * i + 3]
            residual = residual + all_reduce(x)
            x = between(i, hf_norm(residual, weight), up, down)
        return residual + x

    return stack


def mlps_inputs(layers, *batch, dtype=torch.float32, inner=lambda i: INNER):
    draw = lambda *shape: values(*shape).to(dtype)  # noqa: E731
    weights = [w for i in range(layers) for w in (draw(H), draw(H, inner(i)) / 4, draw(inner(i), H) / 5)]
    return draw(*batch, H), draw(*batch, H), *weights


def calls(outlined):
    """What each call of the outlined graph takes, and that graph."""
    nodes = [node for node in outlined.after.nodes if node.target is lowering.layer]
    (body,) = {getattr(outlined.after.owning_module, node.args[0].target) for node in nodes} or {None}
    return [node.args[2:] for node in nodes], body


def check(function, *inputs, count, mode="weave", orders=5, **kwargs):
    """Assert that so many layers become calls, and that they compute what the graph did, over a workspace too."""
    rewritten = rewrite(function, *inputs, symmetric=True, mode=mode, **kwargs)
    outlined = rewritten.outlined()
    taken, body = calls(outlined)
    assert len(taken) == count
    for order in [None, *range(orders)]:
        workspace = Workspace()
        outlined.check(workspace, shuffle=order)
    return outlined, body


class Snapshot(expecttest.TestCase):
    def test_four_layers(self):
        outlined = rewrite(mlps(4), *mlps_inputs(4, 8), mode="fuse", symmetric=True).outlined()
        _, body = calls(outlined)
        names = "x residual " + " ".join(f"norm{i} up{i} down{i}" for i in range(4))
        self.assertExpectedInline(text(outlined.after, names), """\
%0 = tokenweave.fused(x, residual, norm0, slot=2, fp32_residual=True, sharded_residual=True, in_workspace=True) : (f32[8, 16], f32[8, 16])
%1 = getitem(%0, 1) : f32[8, 16]
%2 = getitem(%0, 0) : f32[8, 16]
%3 = aten.mm(%2, up0) : f32[8, 24]
%4 = aten.relu(%3) : f32[8, 24]
%5 = tokenweave.linear(%4, down0, slot=2) : f32[8, 16]
%6 = layer(tokenweave_layer, [], %5, %1, norm1, up1, down1) : (f32[8, 16], f32[8, 16])
%7 = getitem(%6, 0) : f32[8, 16]
%8 = getitem(%6, 1) : f32[8, 16]
%9 = layer(tokenweave_layer, [], %8, %7, norm2, up2, down2) : (f32[8, 16], f32[8, 16])
%10 = getitem(%9, 0) : f32[8, 16]
%11 = getitem(%9, 1) : f32[8, 16]
%12 = tokenweave.fused(%11, %10, norm3, slot=2, in_workspace=True) : (f32[8, 16], f32[8, 16])
%13 = getitem(%12, 1) : f32[8, 16]
%14 = getitem(%12, 0) : f32[8, 16]
%15 = aten.mm(%14, up3) : f32[8, 24]
%16 = aten.relu(%15) : f32[8, 24]
%17 = aten.mm(%16, down3) : f32[8, 16]
%18 = aten.add.Tensor(%13, %17) : f32[8, 16]
return %18
""")
        self.assertExpectedInline(text(body.graph, "x residual norm up down"), """\
%0 = tokenweave.fused(x, residual, norm, slot=2, fp32_residual=True, sharded_residual=True, in_workspace=True) : (f32[8, 16], f32[8, 16])
%1 = getitem(%0, 1) : f32[8, 16]
%2 = getitem(%0, 0) : f32[8, 16]
%3 = aten.mm(%2, up) : f32[8, 24]
%4 = aten.relu(%3) : f32[8, 24]
%5 = tokenweave.linear(%4, down, slot=2) : f32[8, 16]
return %1, %5
""")

    def test_two_layers_of_a_dynamic_weave(self):
        """It takes the number of tokens, of which the sizes of its halves are made, and what its first waits are for."""
        _, body = calls(rewrite(mlps(4), *mlps_inputs(4, 8), mode="weave", dynamic=True).outlined())
        self.assertExpectedInline(text(body.graph, "a b c d e f g h i j k l"), """\
0 %0 = tokenweave.start(a, b, c, slot=0, fp32_residual=True) : f32[0]
1 %1 = tokenweave.wait(d, e, f, g, after=%0, slot=1, fp32_residual=True) : (f32[s0 - ((s0//2)), 16], f32[s0 - ((s0//2)), 16])
1 %2 = getitem(%1, 1) : f32[s0 - ((s0//2)), 16]
1 %3 = getitem(%1, 0) : f32[s0 - ((s0//2)), 16]
1 %4 = aten.mm(%3, h) : f32[s0 - ((s0//2)), 24]
1 %5 = aten.relu(%4) : f32[s0 - ((s0//2)), 24]
1 %6 = aten.mm(%5, i) : f32[s0 - ((s0//2)), 16]
1 %7 = tokenweave.start(%6, %2, c, slot=1, fp32_residual=True) : f32[0]
0 %8 = tokenweave.wait(%0, a, b, c, after=%7, slot=0, fp32_residual=True) : (f32[(s0//2), 16], f32[(s0//2), 16])
0 %9 = getitem(%8, 1) : f32[(s0//2), 16]
0 %10 = getitem(%8, 0) : f32[(s0//2), 16]
0 %11 = aten.mm(%10, j) : f32[(s0//2), 24]
0 %12 = aten.relu(%11) : f32[(s0//2), 24]
0 %13 = aten.mm(%12, k) : f32[(s0//2), 16]
  return %2, %6, %7, %9, %13
""")


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "style, batch, mode, dynamic",
    [("functional", 1, "weave", False), ("functional", 4, "fuse", True), ("in_place", 1, "weave", False), ("in_place", 4, "weave", True)],
)
def test_a_llama(style, batch, mode, dynamic):
    """All of its layers but the first, or the first two where the first one's half has no site in front of it."""
    model = parallel(style, 4, dtype=torch.float32)
    count = 2 if (style, batch, mode) == ("in_place", 1, "weave") else 3
    check(model, torch.randint(0, VOCAB, (batch, 12)), count=count, mode=mode, dynamic=dynamic, orders=2)


def test_the_order_of_a_weave_stays():
    outlined, _ = check(mlps(5), *mlps_inputs(5, 8), count=3)
    order = Logging()
    outlined.outputs(order)
    assert " ".join(order.log) == designed(5)


# --- what is alike ---------------------------------------------------------------------------------------------------


MODES = pytest.mark.parametrize("mode", ["fuse", "weave"])


@MODES
def test_layers_of_two_kinds_in_turn_are_one(mode):
    check(mlps(8, lambda i, norm, up, down: (torch.relu if i % 2 else torch.sin)(norm @ up) @ down), *mlps_inputs(8, 8), count=3, mode=mode)


def test_the_longest_run_is_taken():
    """Layers 0 and 1 are others than layers 2 to 7, and the last one's residual is for somebody else."""
    check(mlps(8, lambda i, norm, up, down: (norm @ up + (i < 2)).relu() @ down), *mlps_inputs(8, 8), count=5, mode="fuse")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("first, second", [(1.0, 2.0), (0.0, -0.0), (1.0, True), (1, 1.0)])
def test_other_constants_are_another_layer(first, second):
    layers = mlps(4, lambda i, norm, up, down: (norm @ up).clamp(min=second if i == 2 else first) @ down)
    check(layers, *mlps_inputs(4, 8), count=0, mode="fuse")


def test_other_sizes_are_another_layer():
    check(mlps(4), *mlps_inputs(4, 8, inner=lambda i: INNER + 8 * (i == 2)), count=0, mode="fuse")


def test_another_flow_of_data_is_another_layer():
    def between(i, norm, up, down):
        one, other = norm @ up, norm @ up.sin()
        return (one * (one if i == 2 else other)) @ down

    check(mlps(4, between), *mlps_inputs(4, 8), count=0, mode="fuse")


@pytest.mark.one_in(3)
@MODES
@pytest.mark.parametrize("handed_on", [slice(3, 4), slice(None)], ids=["one", "all"])
def test_what_layers_hand_on(handed_on, mode):
    """Every call returns it; where one layer alone hands it on, all but one of them for nothing."""
    seen = []

    def between(i, norm, up, down):
        seen.append(norm @ up)
        return seen[-1].relu() @ down

    def stack(*inputs):
        seen.clear()
        return mlps(6, between)(*inputs), *seen[handed_on]

    check(stack, *mlps_inputs(6, 8), count=4, mode=mode)


@MODES
def test_constants_of_the_model(mode):
    """Each layer has a tensor of its own, which is no input of the graph; and all have one."""
    own, common = [values(INNER) for _ in range(5)], values(INNER)
    check(mlps(5, lambda i, norm, up, down: (norm @ up * own[i] + common).relu() @ down), *mlps_inputs(5, 8), count=3, mode=mode)


def rotated(layers, view=lambda angles: angles):
    """A stack whose layers all take the cosines of one input, rounded."""

    def stack(x, residual, angles, *weights):
        cos = view(angles.cos().bfloat16())
        return mlps(layers, lambda i, norm, up, down: (norm @ up * cos).relu() @ down)(x, residual, *weights)

    x, residual, *weights = mlps_inputs(layers, 8, dtype=torch.bfloat16)
    return stack, (x, residual, values(1, 8, INNER), *weights)


@pytest.mark.one_in(5)
@MODES
@pytest.mark.parametrize("view", [lambda x: x[0], lambda x: x.squeeze(0), lambda x: x.view(8, INNER)], ids=["select", "squeeze", "view"])
def test_layers_round_for_themselves(mode, view):
    """What each takes in bfloat16 is handed to it in float32, in which Inductor may go on to compute with it."""

    stack, inputs = rotated(5, view)
    rewritten = rewrite(stack, *inputs, mode=mode)
    outlined = rewritten.outlined()
    taken, _ = calls(outlined)
    assert len(taken) == (2 if mode == "weave" else 3)
    assert all(sum(a.target is aten.cos.default for a in operands) == 1 for operands in taken)
    torch.testing.assert_close(outlined.outputs(), rewritten.outputs(), rtol=0, atol=0)


def test_sites_are_numbered_on():
    outlined, body = check(mlps(6), *mlps_inputs(6, 8), count=4)
    assert {arguments(node)["site"] for node in body.graph.nodes if node.target is ops.start} == {ops.NEXT_SITE}
    counted, sites = [], {}

    class Numbering(Logging):
        def start(self, site, *where):
            slot, number = (given := Site._make(site)).slot, given.number
            sites[slot] = sites[slot] + 1 if number == ops.NEXT_SITE else number  # as Symmetric does: tests/test_host.py
            counted.append((slot, sites[slot]))
            return super().start(site, *where)

    outlined.outputs(Numbering())
    assert counted == [(slot, site) for site in range(6) for slot in (0, 1)]


class Name(OpaqueBase):
    """What vLLM's layers have: the name of a layer, which is an input of a graph."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Name) and self.value == other.value

    def __hash__(self):
        return hash(self.value)

    def __fx_repr__(self):
        return f"Name({self.value!r})", {"Name": Name}


register_opaque_type(Name, typ="value", hoist=True)
FACTORS = {f"layers.{i}": 1.0 + i for i in range(6)}  # what is kept under a name


def scale_by_what_is_kept(x, output, name):
    output.copy_(x * FACTORS[getattr(name, "value", name)])


library = torch.library.Library("tests_outline_named", "DEF")
for op, name_type in (("scale", get_opaque_type_name(Name)), ("scale_by_text", "str")):
    library.define(f"{op}(Tensor x, Tensor(a!) output, {name_type} name) -> ()")
    library.impl(op, scale_by_what_is_kept, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tests_outline_named::{op}", lambda x, output, name: None, lib=library)
scale, scale_by_text = (getattr(torch.ops.tests_outline_named, op) for op in ("scale", "scale_by_text"))


def named(op, name_of, output_of=lambda x, earlier: x.new_empty(x.shape)):
    """A stack whose layers each call an op, which writes to ``output_of`` what it computes from something under the layer's name."""

    def stack(*inputs):
        earlier = []

        def between(i, norm, up, down):
            x = norm @ up
            output = output_of(x, earlier)
            earlier.append(x)
            op(x, output, name_of(f"layers.{i}"))
            return output @ down

        return mlps(len(FACTORS), between)(*inputs)

    return stack


def copies(body):
    """How many copies Inductor makes in a layer, so that its ops can write."""
    with V.set_fake_mode(detect_fake_mode([value(node) for node in body.graph.find_nodes(op="placeholder")])):
        _recursive_post_grad_passes(body, is_inference=True)
    assert not body.graph.find_nodes(op="call_function", target=auto_functionalized)
    return len(body.graph.find_nodes(op="call_function", target=aten.clone.default))


@MODES
def test_layers_with_names(mode, monkeypatch):
    """A layer takes its name as an operand, if that is an object. The op writes to memory of the layer."""
    monkeypatch.setitem(token_axis._RULES, scale.default, rows("x", "output"))
    outlined, body = check(named(scale, Name), *mlps_inputs(len(FACTORS), 8), count=4, mode=mode)
    taken, _ = calls(outlined)
    names = [[value(a).real_obj.value for a in operands if isinstance(value(a), FakeScriptObject)] for operands in taken]
    # A woven layer ends between the halves of one.
    assert names == [[f"layers.{i + at}" for at in ((0, 1) if mode == "weave" else (1,))] for i in range(4)]
    assert copies(body) == 0


def test_an_op_does_not_write_to_what_a_layer_takes():
    """It writes to a copy of the operand, which the caller may read again."""

    def output_of(x, earlier):
        return earlier.pop() if earlier else x.cos()

    _, body = check(named(scale, Name, output_of), *mlps_inputs(len(FACTORS), 8), count=4, mode="fuse")
    assert copies(body) == 1


def test_layers_with_texts_as_names_are_not_equal(monkeypatch):
    monkeypatch.setitem(token_axis._RULES, scale_by_text.default, rows("x", "output"))
    for mode in ("fuse", "weave"):
        said = reason(named(scale_by_text, str), *mlps_inputs(len(FACTORS), 8), mode=mode)
        assert said.startswith("its layers differ in name of tests_outline_named.scale_by_text.default, a constant: 'layers."), said


# --- what is not called ----------------------------------------------------------------------------------------------


def reason(function, *inputs, **options):
    graph = rewrite(function, *inputs, **{"mode": "fuse"} | options).after
    return outline(GraphModule(graph.owning_module, graph).graph)[1]


def test_one_layer_is_no_reason_to_say_anything():
    assert reason(mlps(1), *mlps_inputs(1, 8)) == ""


POSITIONS = torch.arange(4, 12)


def cached(layers, read_before=0):
    """A stack whose layers each write their keys to a cache of their own, and attend to that; and of which some are read before."""

    def stack(x, residual, *rest):
        caches, weights = rest[:layers], rest[layers:]
        scale = 1.0 + sum(cache.mean() for cache in caches[:read_before])

        def between(i, norm, up, down):
            rows = norm @ up
            caches[i][POSITIONS] = rows
            return (rows @ caches[i].t() * scale).softmax(-1) @ caches[i] @ down

        return mlps(layers, between)(x, residual, *weights)

    return stack


def cached_inputs(layers):
    x, residual, *weights = mlps_inputs(layers, len(POSITIONS))
    return x, residual, *(values(2 * len(POSITIONS), INNER) for _ in range(layers)), *weights


def test_layers_that_write_to_inputs_of_their_own():
    """Each writes inside what nobody else reads."""
    rewritten = rewrite(cached(5), *cached_inputs(5), mode="fuse", symmetric=True)
    outlined = rewritten.outlined()
    taken, body = calls(outlined)
    writes = [sum(node.target is aten.copy_.default for node in graph.nodes) for graph in (body.graph, outlined.after)]
    assert len(taken) == 3 and writes == [1, 2]

    def outcome(graph, transport=None):
        inputs = [x.clone() for x in rewritten.inputs]
        return run(graph, inputs, transport), inputs

    for order in range(5):
        got = outcome(shuffled(outlined.after, order), Workspace())
        torch.testing.assert_close(got, outcome(rewritten.before), rtol=1e-4, atol=1e-4)


def test_layers_that_write_to_inputs_that_others_read():
    """A layer that writes what another reads is not called; where all do, none is."""
    some = rewrite(cached(6, read_before=2), *cached_inputs(6), mode="fuse").outlined()
    assert len(calls(some)[0]) == 3
    assert reason(cached(6, read_before=6), *cached_inputs(6)) == "its layers write to inputs of the graph that are also read elsewhere"


def test_layers_that_hand_on_what_they_take():
    """Inductor would take a view of it for memory of its own, and reuse what it is a view of."""
    handed = []

    def between(i, norm, up, down):
        one = norm @ up
        other = handed.pop() if i else one
        handed.append(other.t())
        return (one + other.sin()) @ down

    assert reason(mlps(8, between), *mlps_inputs(8, INNER)) == "its layers return a view of an input, or of a value that they write"


def test_layers_that_hand_on_a_part_of_a_tensor():
    """Inductor would count its place in the storage twice."""

    handed = [0.0]

    def between(i, norm, up, down):
        one, other = (norm @ up).chunk(2, -1)
        out = (one * other + handed.pop()) @ down
        handed.append(other)
        return out

    x, residual, *weights = mlps_inputs(5, 8)
    weights = [w[: INNER // 2] if w.shape == (INNER, H) else w for w in weights]
    said = reason(mlps(5, between), x, residual, *weights)
    assert said == "its layers return the result of getitem, which is not a tensor, or is a part of one"


@torch.library.custom_op("tests_outline::unsafe", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def unsafe(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@unsafe.register_fake
def _(x):
    return torch.empty_like(x)


def test_layers_that_cuda_graphs_cannot_have():
    said = reason(mlps(4, lambda i, norm, up, down: unsafe(norm @ up) @ down), *mlps_inputs(4, 8))
    assert said == "its layers call tests_outline.unsafe.default, which is not a function of its inputs alone"


def test_layers_with_graphs_of_their_own():
    def between(i, norm, up, down):
        return torch.cond(norm.sum() > 0, torch.sin, torch.cos, (norm @ up,)) @ down

    assert reason(mlps(4, between), *mlps_inputs(4, 8)) == "its layers call cond, which has a graph of its own"


# --- as a part of the backend ----------------------------------------------------------------------------------------


def compile_and_run(function, *inputs, **options):
    with without_codegen(), torch.no_grad():
        torch.compile(function, backend=backend.tokenweave, options={"tokenweave.mode": "weave", **options})(*inputs)
    return tw_compile.reports()[-1]


def test_the_report_has_it(unexpanded):
    report = compile_and_run(mlps(5), *mlps_inputs(5, 8))
    assert report.alike == 3 and "split 4 | 4, 3 layers compiled as one" in str(report)


def test_passes_of_the_user_run_before_it_and_those_behind_on_both(unexpanded):
    before, behind = [], []
    report = compile_and_run(
        mlps(5), *mlps_inputs(5, 8),
        post_grad_custom_pre_pass=lambda graph: before.append(sum(n.target is ops.start for n in graph.nodes)),
        post_grad_custom_post_pass=lambda graph: behind.append(sum(n.target is ops.start for n in graph.nodes)),
    )  # fmt: skip
    assert report.alike == 3
    assert before == [10] and behind == [2, 4]


def test_code_in_cpp_cannot_call_it():
    report = compile_and_run(mlps(5), *mlps_inputs(5, 8), cpp_wrapper=True)
    assert report.alike == 0
    assert "each layer is compiled: only code in Python can call one for several" in report.reasons


@pytest.fixture
def workspace(unexpanded, monkeypatch):
    """What carries the sites in code that Inductor writes."""
    workspace = Workspace()
    for name in ("linear", "start", "wait", "fused"):
        monkeypatch.setattr(ops.direct, name, getattr(workspace, name))
    monkeypatch.setattr(forms.Forms, "_may_be_symmetric", lambda *_: True)
    torch._dynamo.reset()
    return workspace


@pytest.mark.full
def test_through_inductor(workspace, monkeypatch):
    """What Inductor makes of calls reuses no memory of the workspace, inside of layers and between them. The bits do not hang on whether
    there are calls."""
    stack, inputs = rotated(5, lambda angles: angles[0])

    def compiled():
        torch._dynamo.reset()
        for tensor in inputs:
            torch._dynamo.mark_static(tensor, -1)
        with torch.no_grad():
            return torch.compile(stack, backend=backend.tokenweave, dynamic=True, options={"tokenweave.mode": "weave"})(*inputs)

    expected = rewrite(stack, *inputs, mode="weave").expected()[0]
    called = compiled()
    assert min(workspace.counts.values()) > 0
    torch.testing.assert_close(called, expected, rtol=2**-4, atol=2**-4)  # bfloat16; what is not theirs to read is NaN
    monkeypatch.setattr(passes, "outline", lambda graph: (None, ""))
    with torch._inductor.config.patch(force_disable_caches=True):
        assert torch.equal(compiled(), called)
    assert [report.alike for report in tw_compile.reports()[-2:]] == [2, 0]


def test_caches_through_inductor(workspace):
    """A call writes what the layer would have."""
    inputs = cached_inputs(5)
    same = [x.clone() for x in inputs]
    expected = rewrite(cached(5), *same, mode="fuse").expected()
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(cached(5), backend=backend.tokenweave, options={"tokenweave.mode": "fuse"})(*inputs)
    assert tw_compile.reports()[-1].alike == 3
    torch.testing.assert_close([got, *inputs], [*expected, *same], rtol=1e-4, atol=1e-4)


@MODES
def test_over_the_process_group_a_layer_reduces_what_it_has_made(mode):
    """Inductor would make a copy of an input of the layer."""
    rewritten = rewrite(mlps(5), *mlps_inputs(5, 16), mode=mode)
    expanded = replace(rewritten, after=copy(rewritten.after))
    passes.expand(expanded.after, lambda *_: True)
    outlined = expanded.outlined()
    outlined.check()
    called, body = calls(outlined)
    assert len(called) >= 3
    reduced = [node.args[0].op for node in body.graph.nodes if node.target is c10d.all_reduce.default]
    assert reduced == ["call_function"] * (2 if mode == "weave" else 1)


# --- on GPUs, as fake tensors show them ----------------------------------------------------------------------------------


def on_gpu(function, *inputs, **options):
    """What the passes make of a function of fake CUDA tensors; those of one number stay where they are."""
    if torch.version.cuda is None:
        pytest.skip("a CPU build has no fake CUDA tensors")
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch.no_grad(), mode, V.set_fake_mode(mode):
        fakes = [torch.empty(x.shape, dtype=x.dtype, device="cpu" if x.dim() == 0 else "cuda") for x in inputs]
        gm = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
        graph = passes.rewrite(gm.graph, Options(mode="fuse", **options), lambda group, device: True, lambda sites: "mode is fuse").graph
        graph = GraphModule(gm, graph).graph
        return graph, outline(graph)


def lengths(layers, between):
    """A stack whose layers each take a number: (number, what goes up) -> what goes down"""

    def stack(x, residual, *rest):
        numbers, weights = rest[:layers], rest[layers:]
        return mlps(layers, lambda i, norm, up, down: between(numbers[i], norm @ up) @ down)(x, residual, *weights)

    x, residual, *weights = mlps_inputs(layers, 8)
    return stack, (x, residual, *(torch.tensor(3) for _ in range(layers)), *weights)


@pytest.mark.parametrize(
    "between, copies",
    [
        (lambda number, up: up + number.to(up.device), "outside"),
        (lambda number, up: up + (number + 1).to(up.device), "outside"),
        (lambda number, up: up * number, "made"),
        (lambda number, up: up * torch.full((), 0.5), "none"),
    ],
    ids=["moved", "moved after a sum", "taken as it is", "a constant"],
)
def test_numbers_on_the_cpu(between, copies):
    """A new StaticCache of Hugging Face's has its length on the CPU."""
    function, inputs = lengths(5, between)
    graph, (body, found) = on_gpu(function, *inputs)
    assert found == 3
    assert not any(node.target is prims.device_put.default for node in body.graph.nodes)
    assert all(node.meta["val"].device.type == "cuda" for node in body.graph.nodes if node.op == "placeholder")
    moved = sum(node.target is prims.device_put.default for node in graph.nodes)
    assert moved == (0 if copies == "none" else 5)


def test_a_product_with_a_number_in_float64_stays():
    """On the GPU, Inductor would compute it in float64."""
    stack, (x, residual, *rest) = lengths(5, lambda number, up: up * number)
    rest[:5] = [torch.tensor(3.0, dtype=torch.float64)] * 5
    _, (body, found) = on_gpu(stack, x, residual, *rest)
    assert body is None and found == "its layers have tensors that are not on cuda:0"


# --- where a layer begins ------------------------------------------------------------------------------------------------


def test_layers_that_are_callable_from_another_site_on():
    """Two sites a layer. Of the layers that begin at the second one there are more, but they would hand on a part of a tensor."""
    handed = []

    def between(i, norm, up, down):
        one, other = (norm @ up).chunk(2, -1)
        if i % 2 == 0:
            handed.append(other)
            return one.relu() @ down
        return (one.sin() * handed.pop()) @ down

    x, residual, *weights = mlps_inputs(8, 8)
    weights = [w[: INNER // 2] if w.shape == (INNER, H) else w for w in weights]
    check(mlps(8, between), x, residual, *weights, count=2, mode="fuse")
