"""Layers that the user has marked as regions: the sites between them are found as if they were not."""

import pytest
import torch
from graphs import capture_with_inputs, rewrite, run, without_codegen
from sites import INNER, H, all_reduce, hf_norm, values
from test_outline import mlps_inputs

import tw_compile
from tw_compile import backend
from tw_compile.ops.lowering import layer
from tw_compile.passes.graph_utils import subgraphs

pytestmark = pytest.mark.usefixtures("world")


def stack(function, layers):
    def run_layers(x, residual, *weights):
        for i in range(layers):
            x, residual = function(x, residual, *weights[3 * i : 3 * i + 3])
        return residual + x

    return run_layers


def plain(x, residual, weight, up, down):
    residual = residual + all_reduce(x)
    return (hf_norm(residual, weight) @ up).relu() @ down, residual


def with_a_constant(x, residual, weight, up, down):
    residual = residual + all_reduce(x)
    return (hf_norm(residual, weight) @ up * torch.tensor([0.5] * INNER)).relu() @ down, residual


marked = torch.compiler.nested_compile_region(plain)


def with_a_region_inside(x, residual, weight, up, down):
    return marked(x, residual, weight, up, down)


def with_a_size(x, residual, weight, up, down):
    residual = residual + all_reduce(x)
    return (hf_norm(residual, weight) @ up).relu().view(x.shape[0], INNER) @ down, residual


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["fuse", "weave"])
@pytest.mark.parametrize("function", [plain, with_a_constant, with_a_region_inside, with_a_size])
def test_regions(function, mode, dynamic):
    inputs = mlps_inputs(5, 8)
    rewritten = rewrite(stack(torch.compiler.nested_compile_region(function), 5), *inputs, mode=mode, dynamic=dynamic, symmetric=True)
    assert len(rewritten.report.sites) == 5 and not rewritten.report.refusals and not rewritten.report.joins
    rewritten.check()
    rewritten.outlined().check()
    plainly, arguments = capture_with_inputs(stack(function, 5), *inputs, dynamic=dynamic)
    torch.testing.assert_close(rewritten.expected(), run(plainly, arguments))
    assert not subgraphs(rewritten.before)


class Layer(torch.nn.Module):
    """As models have it: with dynamic shapes, eps is an input of the graph."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.RMSNorm(H, eps=1e-5), torch.nn.Linear(H, INNER), torch.nn.Linear(INNER, H)

    @torch.compiler.nested_compile_region
    def forward(self, x, residual):
        residual = residual + all_reduce(x)
        return self.down(self.up(self.norm(residual)).relu()), residual


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(5))

    def forward(self, x, residual):
        for layer in self.layers:
            x, residual = layer(x, residual)
        return residual + x


def test_modules_whose_floats_are_inputs():
    rewritten = rewrite(Model(), values(8, H), values(8, H), mode="weave", dynamic=True)
    assert len(rewritten.report.sites) == 5
    rewritten.check()
    assert sum(node.target is layer for node in rewritten.outlined().after.nodes) == 3


def test_regions_are_compiled_as_one_layer_all_the_same():
    compiled = torch.compile(
        stack(torch.compiler.nested_compile_region(plain), 5), backend=backend.tokenweave, options={"tokenweave.mode": "weave"}
    )
    with without_codegen(), torch.no_grad():
        compiled(*mlps_inputs(5, 8))
    (report,) = tw_compile.reports()
    assert (report.mode, len(report.sites), report.alike) == ("weave", 5, 3)


def test_a_region_that_needs_gradients_is_inductors():
    x = values(8, H).requires_grad_()
    compiled = torch.compile(stack(torch.compiler.nested_compile_region(plain), 2), backend=backend.tokenweave)
    with without_codegen():
        compiled(x, *mlps_inputs(2, 8)[1:])
    assert tw_compile.reports() == []
