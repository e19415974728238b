"""The forms of a graph: which one a call takes, what is compiled for it, and that no size is guarded on."""

import logging

import pytest
import torch
import torch.distributed as dist
from graphs import without_codegen
from sites import H, all_reduce, hf_norm, values
from test_split import mlp, mlp_inputs
from torch._inductor import config as _config
from torch.fx.experimental import _config as symbolic_config

import tw_compile
from tw_compile import backend, context, forms, ops, report
from tw_compile.transports import choose, process_group


@pytest.fixture(autouse=True)
def quick(world):
    with without_codegen(), torch.no_grad():
        yield


def compiled(function, **options):
    options = {f"tokenweave.{name}": option for name, option in {"min_tokens": 32, **options}.items()}
    return torch.compile(function, backend=backend.tokenweave, options=options)


def inputs_of(tokens, mark=None, batch=None):
    x, residual, *weights = mlp_inputs(*([batch] if batch else []), tokens)
    for tensor in (x, residual) if mark else ():
        mark(tensor, 0)
    return x, residual, *weights


def run(function, tokens, **kwargs):
    inputs = inputs_of(tokens, **kwargs)
    torch.testing.assert_close(function(*inputs), mlp(*inputs), rtol=1e-4, atol=1e-4)


def modes():
    return [report.mode for report in tw_compile.reports()]


def graphs_of_dynamo():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


MARKS = {
    "dynamic": torch._dynamo.mark_dynamic,
    "bounded": lambda tensor, dim: torch._dynamo.mark_dynamic(tensor, dim, min=2, max=4096),
    "unbacked": torch._dynamo.decorators.mark_unbacked,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mark", MARKS.values(), ids=MARKS)
def test_each_call_takes_the_form_for_its_tokens(mark):
    torch._dynamo.utils.counters.clear()
    function = compiled(mlp)
    for tokens in (48, 16, 300, 31, 32, 33, 7, 64, 2):
        run(function, tokens, mark=mark)
    assert graphs_of_dynamo() == 1, "a size was guarded on"
    assert modes() == ["weave", "off", "weave"], "300 tokens are cut in whole tiles"
    assert [report.split[0] for report in tw_compile.reports() if report.split][1].count("128") == 1


def test_one_token_and_none_where_guards_are_dropped():
    function = compiled(mlp)
    for tokens in (48, 1, 0, 40):
        run(function, tokens, mark=MARKS["unbacked"])
    assert modes() == ["weave", "off", "off"]


def test_one_token_takes_the_form_of_more_where_dynamo_took_it_for_impossible():
    """vLLM traces once and drops all guards. One token, as in decoding, is not compiled for itself."""
    options = {"tokenweave.min_tokens": 32}
    backend_with_options = lambda gm, inputs: backend.tokenweave(gm, inputs, options=options)  # noqa: E731
    function = torch.compile(mlp, backend=backend_with_options, options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe})
    for tokens in (48, 1, 16, 2):
        run(function, tokens, mark=MARKS["dynamic"] if tokens == 48 else None)
    assert modes() == ["weave", "off"]


@pytest.mark.full
def test_sizes_that_torch_is_oblivious_of():
    with symbolic_config.patch(backed_size_oblivious=True):
        function = compiled(mlp)
        for tokens in (48, 16):
            run(function, tokens, mark=MARKS["dynamic"])
    assert modes() == ["weave", "off"]


def test_a_half_of_one_sequence():
    def function(x, residual, weight, up, down):
        return mlp(x, residual, weight, up, down)

    run_it = compiled(function)
    for batch in (3, 2, 5):
        x, residual, *weights = mlp_inputs(batch, 16)
        for tensor in (x, residual):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(run_it(x, residual, *weights), mlp(x, residual, *weights), rtol=1e-4, atol=1e-4)
    assert modes() == ["weave"] * 3 and not any(report.joins for report in tw_compile.reports())


def test_tokens_of_which_there_are_as_many_as_data_says_are_not_woven():
    def packed(x, keep, residual, weight):
        x, residual = x[keep], residual[keep]
        return hf_norm(residual + all_reduce(x), weight)

    x, residual, weight = values(48, H), values(48, H), values(H)
    keep = torch.arange(48) % 3 != 0
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(compiled(packed)(x, keep, residual, weight), packed(x, keep, residual, weight))
    (report,) = tw_compile.reports()
    assert report.mode == "off" and report.reasons[0] == "not woven: its number of tokens depends on data"


def test_what_is_compiled_too_often_runs_uncompiled_and_right(monkeypatch, caplog):
    monkeypatch.setattr(forms, "MOST_VARIANTS", 1)
    caplog.set_level(logging.WARNING, "tw_compile")
    function = compiled(mlp)
    for tokens in (48, 300, 400):
        run(function, tokens, mark=MARKS["dynamic"])
    function = compiled(mlp, mode="fuse")
    for tokens in (48, 1, 0):
        run(function, tokens, mark=MARKS["unbacked"])
    assert [r.getMessage() for r in caplog.records if "different sizes" in r.getMessage()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_last_compilation_before_dynamos_limit_warns(fails, caplog):
    report.say_once.cache_clear()
    warned, fused = [], compiled(mlp)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=fails):
        for batch in (1, 2):
            fused(*inputs_of(8, batch=batch))
            warned.append("recompile_limit allows" in caplog.text)
    assert warned == [False, not fails]


def test_a_form_is_compiled_with_the_configuration_of_the_graph(monkeypatch):
    seen = []
    inner = backend.compile_fx_inner
    monkeypatch.setattr(backend, "compile_fx_inner", lambda *args, **kw: seen.append(_config.max_autotune) or inner(*args, **kw))
    with _config.patch(max_autotune=True):
        function = compiled(mlp)
        run(function, 48, mark=MARKS["dynamic"])
    run(function, 16, mark=MARKS["dynamic"])
    assert seen == [True, True] and not _config.max_autotune


def test_the_kill_switch(monkeypatch):
    for value, expected in (("fuse", "off"), ("off", "off"), ("", "weave")):
        monkeypatch.setenv("TW_COMPILE_MODE", value)
        torch._dynamo.reset()
        run(compiled(mlp, mode="weave"), 48)
        report = tw_compile.reports()[-1]
        assert report.mode == expected
    reasons = [report.reasons[0] for report in tw_compile.reports()[:2]]
    assert reasons[1] == "TW_COMPILE_MODE is off" and not reasons[0].startswith("not woven")


def test_a_kill_switch_of_another_value_is_an_error(monkeypatch):
    monkeypatch.setenv("TW_COMPILE_MODE", "weave")
    with pytest.raises(Exception, match="TW_COMPILE_MODE is 'weave'; it takes 'off' or 'fuse', or is not set"):
        run(compiled(mlp), 48)


def test_what_cannot_be_compiled_is_left_to_inductor_with_the_reason(unexpanded, monkeypatch):
    real = backend.compile_fx_inner

    def failing(gm, inputs, **kwargs):
        if any(node.target in (ops.fused, ops.start) for node in gm.graph.nodes):
            raise ValueError("no code for this")
        return real(gm, inputs, **kwargs)

    monkeypatch.setattr(backend, "compile_fx_inner", failing)
    run(compiled(mlp), 48)
    (report,) = tw_compile.reports()
    assert report.mode == "off" and report.reasons == ["it could not be compiled: ValueError: no code for this"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no code for this"):
        run(compiled(mlp, mode="weave"), 48)


def test_what_cannot_be_rewritten_is_left_to_inductor_with_the_reason(monkeypatch):
    def failing(*args):
        raise ValueError("no way")

    monkeypatch.setattr("tw_compile.passes.fuse", failing)
    run(compiled(mlp), 48)
    (report,) = tw_compile.reports()
    assert report.mode == "off" and report.reasons == ["it could not be rewritten: ValueError: no way"]


def test_a_graph_with_an_unknown_kind_of_input_is_left_to_inductor_with_the_reason(monkeypatch):
    def failing(gm):
        raise ValueError("no input of the graph has the size s0")

    monkeypatch.setattr(forms, "Sizes", failing)
    run(compiled(mlp), 48)
    (report,) = tw_compile.reports()
    assert report.mode == "off" and report.reasons == ["no input of the graph has the size s0"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot be woven: no input of the graph has the size s0"):
        run(compiled(mlp, mode="weave"), 48)


def test_a_weave_that_fails_is_not_woven(monkeypatch):
    def failing(*args):
        raise ValueError("no way")

    monkeypatch.setattr("tw_compile.passes.split", failing)
    run(compiled(mlp), 48)
    (report,) = tw_compile.reports()
    assert report.mode == "off" and "no way" in report.reasons[0]


def test_transports_are_chosen_and_prepared_with_real_tensors(monkeypatch):
    """A compilation has fake tensors on, in which a workspace would have no memory."""
    seen = []

    def real(function):
        def checked(*args):
            seen.append(torch.zeros(1).data_ptr() and torch.ones(3).sum().item())
            return function(*args)

        return checked

    monkeypatch.setattr(choose, "_make", real(choose._make))
    monkeypatch.setattr(process_group.ProcessGroup, "prepare", real(process_group.ProcessGroup.prepare))
    for mark in (None, MARKS["dynamic"]):
        run(compiled(mlp), 48, mark=mark)
    assert set(seen) == {3.0} and len(seen) >= 3


def test_groups_are_entered_in_one_order(monkeypatch):
    """Threads whose graphs have the same groups in another order do not wait for each other."""
    group = dist.new_group([0, 1], backend="fake")
    names, entered, real = [dist.group.WORLD.group_name, group.group_name], [], process_group.ProcessGroup.__enter__

    def enter(transport):
        if not transport._depth:
            entered.append(transport.group_name)
        real(transport)

    monkeypatch.setattr(process_group.ProcessGroup, "__enter__", enter)

    def function(x, matrix, weight, first, second):
        x = hf_norm(x + all_reduce(x @ matrix, group=first), weight)
        return hf_norm(x + all_reduce(x @ matrix, group=second), weight)

    for order in (names, names[::-1]):
        compiled(function)(values(48, H), values(H, H), values(H), *order)
    dist.destroy_process_group(group)
    assert entered == sorted(names) * 2


# --- groups that come and go ------------------------------------------------------------------------------------------


def test_what_was_known_of_a_group_is_forgotten_with_it():
    group = dist.new_group([0, 1], backend="fake")
    name = group.group_name
    context.of(name).left = "for a reason"
    choose.choose("auto", name, torch.device("cpu"))
    assert any(key[0] == name for key in choose.chosen)
    dist.destroy_process_group(group)
    del group
    assert name not in context._contexts and not any(key[0] == name for key in choose.chosen)
