"""keep: over the process group, a graph that is not woven stays the original one, unless fusing removes collectives."""

import importlib

import expecttest
import pytest
import torch
import torch.distributed as dist
from graphs import copy, run_as_it_is, text, without_codegen
from sites import H, all_reduce, hf_norm, values
from test_extending import reduced_by_it
from test_outline import mlps_inputs
from test_regions import plain, stack
from test_sequence_parallel import inputs as scattered_inputs
from test_sequence_parallel import two_sites
from test_split import mlp, mlp_inputs

import tw_compile
from tw_compile import backend, context

pytestmark = pytest.mark.usefixtures("world")

KEPT = "Inductor's own graph is kept: over the process group in the model's dtype, fused sites are not faster"


def given_to_inductor(function, *inputs, **options):
    """The graph that Inductor compiles, and the report. The results must be the function's."""
    seen = []

    def keep(gm, fakes, **kwargs):
        seen.append(copy(gm.graph))
        return run_as_it_is(gm, fakes, **kwargs)

    torch._dynamo.reset()
    with torch.no_grad(), without_codegen(keep):
        options = {f"tokenweave.{name}": value for name, value in options.items()}
        got = torch.compile(function, backend=backend.tokenweave, options=options)(*inputs)
        torch.testing.assert_close(got, function(*inputs), rtol=1e-4, atol=1e-4)
    return seen[-1], tw_compile.reports()[-1]


class Snapshot(expecttest.TestCase):
    @pytest.fixture(autouse=True)
    def _world(self, world):
        pass

    def test_the_original_graph(self):
        graph, report = given_to_inductor(mlp, *mlp_inputs(8))
        self.assertExpectedInline(text(graph, "x residual weight up down"), """\
%0 = _c10d_functional.all_reduce(x, sum, 0) : f32[8, 16]
%1 = _c10d_functional.wait_tensor(%0) : f32[8, 16]
%2 = aten.add.Tensor(residual, %1) : f32[8, 16]
%3 = aten.pow.Tensor_Scalar(%2, 2) : f32[8, 16]
%4 = aten.mean.dim(%3, [-1], True) : f32[8, 1]
%5 = aten.add.Tensor(%4, 1e-05) : f32[8, 1]
%6 = aten.rsqrt(%5) : f32[8, 1]
%7 = aten.mul.Tensor(%2, %6) : f32[8, 16]
%8 = aten.mul.Tensor(weight, %7) : f32[8, 16]
%9 = aten.mm(%8, up) : f32[8, 24]
%10 = aten.relu(%9) : f32[8, 24]
%11 = aten.mm(%10, down) : f32[8, 16]
%12 = _c10d_functional.all_reduce(%11, sum, 0) : f32[8, 16]
%13 = _c10d_functional.wait_tensor(%12) : f32[8, 16]
%14 = aten.add.Tensor(%2, %13) : f32[8, 16]
%15 = aten.pow.Tensor_Scalar(%14, 2) : f32[8, 16]
%16 = aten.mean.dim(%15, [-1], True) : f32[8, 1]
%17 = aten.add.Tensor(%16, 1e-05) : f32[8, 1]
%18 = aten.rsqrt(%17) : f32[8, 1]
%19 = aten.mul.Tensor(%14, %18) : f32[8, 16]
%20 = aten.mul.Tensor(weight, %19) : f32[8, 16]
return %20
""")
        self.assertExpectedInline("\n".join(str(report).splitlines()[:5]), """\
tokenweave: off (requested: auto), transport process_group
  2 sites, 0 refused, 0 unsplit ops
  wire: 32 bits, 0.1 KB from each rank for a token
  because not woven: fewer than 1024 tokens
  because Inductor's own graph is kept: over the process group in the model's dtype, fused sites are not faster""")
        off, _ = given_to_inductor(mlp, *mlp_inputs(8), mode="off")
        assert text(off, "x residual weight up down") == text(graph, "x residual weight up down")


def is_kept(function, *inputs, **options):
    _, report = given_to_inductor(function, *inputs, **options)
    assert (report.mode == "off") == (KEPT in report.reasons)
    assert report.sites and report.transport.startswith("process_group")
    return report.mode == "off"


def test_which_graphs_are_kept(monkeypatch):
    inputs = mlp_inputs(8)
    assert is_kept(mlp, *inputs)
    assert is_kept(mlp, *inputs, min_tokens=9, mode="weave"), "fused as in auto"
    assert not is_kept(mlp, *inputs, mode="weave")
    assert not is_kept(mlp, *inputs, mode="fuse")
    assert is_kept(mlp, *inputs, wire=8), "sent in the model's dtype, for its hidden size"
    monkeypatch.setenv("TW_COMPILE_MODE", "fuse")
    assert is_kept(mlp, *inputs, mode="fuse"), "the kill switch forces nothing"


def test_fewer_collectives_are_something_to_win():
    def sum_of_two(a, b, r, w):
        return hf_norm(all_reduce(a) + all_reduce(b) + r, w)

    assert not is_kept(sum_of_two, values(8, H), values(8, H), values(8, H), values(H))
    with torch.no_grad(), without_codegen():  # a fake group computes other values in the two forms
        torch._dynamo.reset()
        torch.compile(two_sites, backend=backend.tokenweave)(*scattered_inputs(8))
    assert (tw_compile.reports()[-1].mode, len(tw_compile.reports()[-1].sites)) == ("fuse", 2)


def test_a_wire_of_fewer_bits_is_something_to_win():
    wide = [values(*shape) for shape in ((8, 128), (8, 128), (128,), (128, 24), (24, 128))]
    with torch.no_grad(), without_codegen():  # as above
        torch.compile(mlp, backend=backend.tokenweave, options={"tokenweave.wire": 8})(*wide)
    (report,) = tw_compile.reports()
    assert (report.mode, report.packed) == ("fuse", 2) and KEPT not in report.reasons


def test_an_all_reduce_of_the_users_own_is_not_known(monkeypatch):
    """What takes its place may be faster."""
    read = lambda node: tw_compile.AllReduce(x=node.args[0], reduce_op="sum", group=node.args[1])  # noqa: E731
    all_reduces = importlib.import_module("tw_compile.passes.find")._ALL_REDUCES
    monkeypatch.setitem(all_reduces, torch.ops.tests_extending.my_all_reduce.default, read)
    assert not is_kept(reduced_by_it, values(8, H), values(8, H), values(H))


def test_layers_that_are_marked_are_compiled_once():
    inputs = mlps_inputs(5, 8)
    assert is_kept(stack(plain, 5), *inputs)
    _, report = given_to_inductor(stack(torch.compiler.nested_compile_region(plain), 5), *inputs)
    assert report.mode == "fuse" and report.alike >= 3


def test_calls_are_counted(monkeypatch):
    """A rank that waits for this one sees that it has gone on."""
    begun = []
    monkeypatch.setattr(context.Context, "called", lambda self: begun.append(self.group() is dist.group.WORLD))
    given_to_inductor(mlp, *mlp_inputs(8))
    assert begun == [True]


def test_sizes_above_the_threshold_are_woven():
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend=backend.tokenweave, dynamic=True, options={"tokenweave.min_tokens": 32})
    with torch.no_grad(), without_codegen():
        for tokens in (7, 40, 8, 64):
            inputs = mlp_inputs(tokens)
            for x in inputs:
                torch._dynamo.mark_static(x, 1) if x.dim() == 2 else None
            torch.testing.assert_close(compiled(*inputs), mlp(*inputs), rtol=1e-4, atol=1e-4)
    assert [report.mode for report in tw_compile.reports()] == ["off", "weave"]
