"""Layers that the user has marked as regions: the sites between them are found as if they were not."""

import pytest
import torch
import torch.distributed as dist
from graphs import capture_with_inputs, rewrite, run, without_codegen
from models import VOCAB, Block, parallel
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


CASES = [(plain, "fuse", False)] + [(f, "weave", True) for f in (plain, with_a_constant, with_a_region_inside, with_a_size)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("function, mode, dynamic", CASES)
def test_regions(function, mode, dynamic):
    inputs = mlps_inputs(5, 8)
    rewritten = rewrite(stack(torch.compiler.nested_compile_region(function), 5), *inputs, mode=mode, dynamic=dynamic, symmetric=True)
    assert len(rewritten.report.sites) == 5 and not rewritten.report.refusals and not rewritten.report.joins
    rewritten.check()
    rewritten.outlined().check()
    plainly, arguments = capture_with_inputs(stack(function, 5), *inputs, dynamic=dynamic)
    torch.testing.assert_close(rewritten.expected(), run(plainly, arguments))
    assert not subgraphs(rewritten.before)


# --- what they write to ----------------------------------------------------------------------------------------------


def reducing_in_place(x, residual, weight, up, down):
    x = x.clone()
    dist.all_reduce(x)
    residual = residual + x
    return (hf_norm(residual, weight) @ up).relu() @ down, residual


def test_a_region_that_reduces_in_place():
    inputs = mlps_inputs(3, 8)
    rewritten = rewrite(stack(torch.compiler.nested_compile_region(reducing_in_place), 3), *inputs, mode="weave")
    assert len(rewritten.report.sites) == 3
    rewritten.check()
    plainly, arguments = capture_with_inputs(stack(plain, 3), *inputs)
    torch.testing.assert_close(rewritten.expected(), run(plainly, arguments))


LAYERS, TOKENS = 4, 8


def cached(x, residual, weight, up, down, at, cache):
    residual = residual + all_reduce(x)
    norm = hf_norm(residual, weight)
    cache.index_copy_(0, at, norm)
    return ((norm + cache.sum(0)) @ up).relu() @ down, residual


def with_caches(function, cache_of):
    def run_layers(caches, at, x, residual, *weights):
        for i in range(LAYERS):
            x, residual = function(x, residual, *weights[3 * i : 3 * i + 3], at, cache_of(caches, i))
        return residual + x

    return run_layers


def caches():
    return [torch.ones(2 * TOKENS, H) for _ in range(LAYERS)]


def both(function, cache_of, new_caches, **options):
    """What a function of caches, and the same with regions, give and write through the backend and in eager mode."""
    inputs = torch.arange(3, 3 + TOKENS), *mlps_inputs(LAYERS, TOKENS)
    ours, eager = new_caches(), new_caches()
    marked = with_caches(torch.compiler.nested_compile_region(function), cache_of)
    with without_codegen(), torch.no_grad():
        compiled = torch.compile(marked, backend=backend.tokenweave, options=options)(ours, *inputs)
    torch.testing.assert_close(compiled, with_caches(function, cache_of)(eager, *inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    return tw_compile.reports()[-1]


@pytest.mark.parametrize("mode", ["fuse", "weave"])
def test_a_region_that_writes_to_a_cache(unexpanded, mode):
    report = both(cached, lambda caches, i: caches[i], caches, **{"tokenweave.mode": mode})
    assert (len(report.sites), report.alike) == (LAYERS, LAYERS - 2)


def test_a_region_that_writes_to_several():
    def twice(x, residual, weight, up, down, at, pair):
        one, two = pair
        two.add_(1)
        return cached(x, residual, weight, up, down, at, one)

    report = both(twice, lambda caches, i: (caches[i], caches[i + LAYERS]), lambda: caches() + caches())
    assert len(report.sites) == LAYERS


def test_a_region_that_writes_to_a_part_is_left_with_a_reason():
    report = both(cached, lambda caches, i: caches[i], lambda: torch.ones(LAYERS, 2 * TOKENS, H))
    assert not report.sites and report.refusals
    assert all(refusal.reason.endswith("the graph of a higher-order op") for refusal in report.refusals)


def test_a_region_with_sizes_that_depend_on_data_is_left():
    """In its place, the sizes of all layers would be the same symbol."""

    def sparse(x, residual, weight, up, down):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, weight)
        rows = (norm[:, 0] > 0).nonzero()[:, 0]
        return torch.zeros_like(x).index_add(0, rows, (norm[rows] @ up).relu() @ down), residual

    inputs = mlps_inputs(4, 8)
    with without_codegen(), torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(stack(torch.compiler.nested_compile_region(sparse), 4), backend=backend.tokenweave)(*inputs)
    torch.testing.assert_close(compiled, stack(sparse, 4)(*inputs), rtol=1e-4, atol=1e-4)
    (report,) = tw_compile.reports()
    assert not report.sites and all(refusal.reason.startswith("inside ") for refusal in report.refusals) and report.refusals


# --- numbers that are inputs -----------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """As models have it: with dynamic shapes, eps is an input of the graph."""

    def __init__(self, eps):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.RMSNorm(H, eps=eps), torch.nn.Linear(H, INNER), torch.nn.Linear(INNER, H)

    @torch.compiler.nested_compile_region
    def forward(self, x, residual):
        residual = residual + all_reduce(x)
        return self.down(self.up(self.norm(residual)).relu()), residual


class Model(torch.nn.Module):
    def __init__(self, epsilons):
        super().__init__()
        self.layers = torch.nn.ModuleList(map(Layer, epsilons))

    def forward(self, x, residual):
        for each in self.layers:
            x, residual = each(x, residual)
        return residual + x


def test_modules_whose_floats_are_inputs():
    rewritten = rewrite(Model([1e-5] * 5), values(8, H), values(8, H), mode="weave", dynamic=True)
    assert len(rewritten.report.sites) == 5
    rewritten.check()
    assert sum(node.target is layer for node in rewritten.outlined().after.nodes) == 3


def test_modules_whose_floats_differ():
    model, inputs = Model([1e-5, 1e-5, 1.0, 1e-5]), (values(8, H), values(8, H))
    for tensor in inputs:
        torch._dynamo.mark_static(tensor, 1)
    with without_codegen(), torch.no_grad():
        compiled = torch.compile(model, backend=backend.tokenweave, dynamic=True)(*inputs)
        torch.testing.assert_close(compiled, model(*inputs))
    assert len(tw_compile.reports()[-1].sites) == 4


# --- as a part of the backend ----------------------------------------------------------------------------------------


def test_regions_are_compiled_as_one_layer_all_the_same(unexpanded):
    compiled = torch.compile(
        stack(torch.compiler.nested_compile_region(plain), 5), backend=backend.tokenweave, options={"tokenweave.mode": "weave"}
    )
    with without_codegen(), torch.no_grad():
        compiled(*mlps_inputs(5, 8))
    (report,) = tw_compile.reports()
    assert (report.mode, len(report.sites), report.alike) == ("weave", 5, 3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("style", ["functional", "in_place", "dtensor"])
def test_layers_of_a_llama(style, monkeypatch):
    if style == "dtensor" and torch.__version__ < "2.12":
        pytest.skip("Dynamo 2.11 takes no DTensor into a region")
    model, ids = parallel(style, layers=4, dtype=torch.float32), torch.randint(VOCAB // 2, (1, 16))
    with without_codegen(), torch.no_grad():
        expected = model(ids)
        monkeypatch.setattr(Block, "forward", torch.compiler.nested_compile_region(Block.forward))
        compiled = torch.compile(model, backend=backend.tokenweave, options={"tokenweave.mode": "weave"})(ids)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
    report = tw_compile.reports()[-1]
    assert len(report.sites) >= 8 and not report.refusals and not report.joins and report.alike >= 2


def test_a_region_that_needs_gradients_is_inductors():
    x = values(8, H).requires_grad_()
    compiled = torch.compile(stack(torch.compiler.nested_compile_region(plain), 2), backend=backend.tokenweave)
    with without_codegen():
        compiled(x, *mlps_inputs(2, 8)[1:])
    assert tw_compile.reports() == []
