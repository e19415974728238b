"""explain(): what a model's graphs are, where Dynamo broke them, and that other compiled models keep theirs."""

import pytest
import torch
from graphs import without_codegen
from sites import H, all_reduce, hf_norm, values
from test_split import mlp, mlp_inputs

import tw_compile
from tw_compile import wording
from tw_compile.explain import ISOLATED


def broken(x, w):
    x = hf_norm(all_reduce(x), w)
    torch._dynamo.graph_break()  # here
    return hf_norm(all_reduce(x.sin()), w)


def inner(x):
    x = x.sin()
    print(end="")
    return x.cos()


def nested(x, w):
    return inner(hf_norm(all_reduce(x), w))


@torch.compiler.disable
def not_traced(x):
    return all_reduce(x)


class Eager(torch.nn.Module):
    """Of which Dynamo traces nothing."""

    forward = torch.compiler.disable(lambda self, x: x)


@pytest.fixture
def explain(world):
    with without_codegen():
        yield tw_compile.explain


def test_a_break_is_in_the_report_of_the_graph_that_it_ends(explain):
    found = explain(broken, values(8, H), values(H))
    first, second = found
    assert first.broken.reason == "Call to `torch._dynamo.graph_break()`: User-inserted graph break. Message: None"
    assert "test_explain.py:" in first.broken.source and first.broken.source.endswith("in broken: torch._dynamo.graph_break()  # here")
    assert second.broken is None and found.breaks == [first.broken]
    assert f"  graph break at {wording.short(first.broken.source)}: Call to" in str(first)
    assert str(found).splitlines()[-2] == "1 graph break"
    assert tw_compile.Report.from_dict(first.to_dict()) == first


def test_a_break_that_leads_out_of_several_functions_is_one(explain):
    found = explain(nested, values(8, H), values(H))
    assert [b.source.split(": ", 1)[1] for b in found.breaks] == ['print(end="")']
    assert "Failed to trace builtin operator" in found.breaks[0].reason


@pytest.mark.parametrize("model", [not_traced, Eager()], ids=("function", "module"))
def test_a_model_of_which_nothing_is_compiled(explain, model):
    found = explain(model, values(8, H))
    assert found == [] and len(found.breaks) == 1
    assert "Dynamo compiled no graph" in str(found) and "torch.compiler.disable" in str(found)


def test_a_whole_graph_has_no_break(explain):
    found = explain(mlp, *mlp_inputs(8))
    assert len(found) == 1 and found.breaks == [] and found[0].broken is None
    assert str(found) == f"{found[0]}\n0 graph breaks"


def test_options(explain):
    (found,) = explain(mlp, *mlp_inputs(8), options={"tokenweave.mode": "weave"})
    assert (found.mode, found.requested["mode"]) == ("weave", "weave")
    with pytest.raises(tw_compile.TokenWeaveError, match="unknown option 'tokenweave.mood'"):
        explain(mlp, *mlp_inputs(8), options={"tokenweave.mood": "weave"})
    with pytest.raises(RuntimeError, match="backend='tokenweave' raised:\nTokenWeaveError: .* cannot be woven: one token cannot be split"):
        explain(mlp, *mlp_inputs(1), options={"tokenweave.mode": "weave"})


@pytest.mark.parametrize("function", [tw_compile.explain, tw_compile.verify])
def test_what_is_no_model(world, function):
    with pytest.raises(tw_compile.TokenWeaveError, match="{'layers': 1} is not a model: give a module or a function"):
        function({"layers": 1}, values(8, H))
    with pytest.raises(tw_compile.TokenWeaveError, match="options is 'fuse'; it takes a dict"):
        function(mlp, *mlp_inputs(8), options="fuse")


@pytest.mark.parametrize("function", [mlp, broken], ids=("whole", "broken"))
def test_other_compiled_models_keep_their_graphs(explain, function):
    """Also those of the model that is explained, which is compiled anew each time."""
    inputs = mlp_inputs(8) if function is mlp else (values(8, H), values(H))
    graphs = 1 if function is mlp else 2
    compiled, other = torch.compile(function, backend="tokenweave"), torch.compile(nested, backend="tokenweave")
    with torch.no_grad():
        compiled(*inputs), other(values(8, H), values(H))
        before = len(tw_compile.reports())
        # Of a model with graph breaks, older versions of Dynamo keep what explain compiles: then a few times must do.
        times, limit = (4, 2) if function is mlp or ISOLATED else (3, torch._dynamo.config.recompile_limit)
        with torch._dynamo.config.patch(recompile_limit=limit):
            for _ in range(times):
                assert len(explain(function, *inputs)) == graphs
        explained = len(tw_compile.reports())
        assert explained == before + graphs * times
        compiled(*inputs), other(values(8, H), values(H))
        assert len(tw_compile.reports()) == explained


def test_one_that_is_compiled_already(explain):
    compiled = torch.compile(mlp, backend="tokenweave")
    assert len(explain(compiled, *mlp_inputs(8))) == 1
    assert len(explain(torch.compile(torch.nn.Identity(), backend="tokenweave"), values(8, H))) <= 1
