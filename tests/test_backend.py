"""The backend as torch.compile calls it: modes, options, training, and the passes of others."""

import importlib.metadata
import logging
import re

import pytest
import torch
import torch.distributed as dist
from graphs import without_codegen
from models import VOCAB, whole
from sites import H, all_reduce, hf_norm, values
from test_split import mlp, mlp_inputs
from torch import nn

import tw_compile
from tw_compile import backend, ops
from tw_compile.passes.graph_utils import c10d


def compiled(function, **kwargs):
    return torch.compile(function, backend=backend.tokenweave, **kwargs)


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.WARNING, "tw_compile")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "tw_compile"]


@pytest.fixture
def quick():
    with without_codegen():
        yield


def test_the_backend_is_known_by_name():
    assert "tokenweave" in torch._dynamo.list_backends(exclude_tags=())


def test_an_installed_package_registers_itself():
    points = [p for p in importlib.metadata.entry_points(group="torch_dynamo_backends") if p.name == "tokenweave"]
    if not points:
        pytest.skip("not installed")
    assert points[0].load() is backend.tokenweave


def test_by_name_it_takes_the_options(world, quick):
    torch.compile(mlp, backend="tokenweave", options={"tokenweave.mode": "fuse"})(*mlp_inputs(8))
    assert tw_compile.reports()[-1].mode == "fuse"


# --- what is not for it ----------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.weight = nn.Linear(H, H, bias=False), nn.Parameter(torch.rand(H))

    def forward(self, x, residual):
        return hf_norm(residual + all_reduce(self.up(x)), self.weight)


def test_a_graph_that_needs_gradients_is_inductors(world, messages):
    model, inputs = Small(), (values(8, H), values(8, H))
    compiled(model)(*inputs).sin().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(*inputs).sin().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert tw_compile.reports() == []
    assert messages() == ["a graph needs gradients: tokenweave leaves it to Inductor. For inference, run under torch.no_grad()"]


def test_that_is_said_once(world, quick, messages):
    for _ in range(2):
        torch._dynamo.reset()
        compiled(Small())(values(8, H), values(8, H))
    assert len(messages()) == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_for_us(world, quick, context):
    with context():
        compiled(Small(), options={"tokenweave.mode": "weave"})(values(8, H), values(8, H))
    assert tw_compile.reports()[-1].mode == "weave"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off_inside(world, quick, context):
    if context is torch.inference_mode and torch.__version__ < "2.13":
        pytest.skip("PyTorch 2.11 and 2.12 do not trace into it, for Inductor either")
    model, inputs = Small(), (values(8, H), values(8, H))

    def inside(*inputs):
        with context():
            return model(*inputs)

    for number, function in enumerate((inside, context()(model)), 1):
        result = compiled(function, options={"tokenweave.mode": "weave"})(*inputs)
        torch.testing.assert_close(result, model(*inputs).detach(), rtol=1e-4, atol=1e-5)
        assert not result.requires_grad and [report.mode for report in tw_compile.reports()] == ["weave"] * number


def test_a_model_without_parameters_that_need_gradients_is_for_us(world, quick):
    compiled(Small().requires_grad_(False), options={"tokenweave.mode": "weave"})(values(8, H), values(8, H))
    assert tw_compile.reports()[-1].mode == "weave"


def test_a_model_that_was_never_made_parallel_works_with_a_warning(messages):
    """Without any process group."""
    model, ids = whole(1), torch.randint(0, VOCAB, (1, 16))
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(ids), model(ids), rtol=0.05, atol=0.05)
    (report,) = tw_compile.reports()
    assert (report.mode, report.sites, report.refusals) == ("off", [], [])
    (message,) = messages()
    assert "it contains no all-reduce" in message and message.startswith("nothing to fuse or weave in a graph: ")


def test_a_graph_of_refusals_only_works_with_a_warning(world, quick, messages):
    compiled(lambda x: all_reduce(x).sin())(values(8, H))
    (report,) = tw_compile.reports()
    assert (report.mode, len(report.sites), len(report.refusals)) == ("off", 0, 1)
    assert messages() == ["nothing to fuse or weave in a graph: none of its all-reduces can be fused"]


def test_a_graph_of_refusals_only_is_an_error_with_the_reasons_where_forced(world, quick):
    reason = "(?s)none of its all-reduces can be fused.*the reduced value is the input of aten.sin.default"
    with pytest.raises(Exception, match=reason) as raised:
        compiled(lambda x: all_reduce(x).sin(), options={"tokenweave.mode": "fuse"})(values(8, H))
    assert isinstance(raised.value.inner_exception, tw_compile.TokenWeaveError)


def test_messages_name_refused_reduce_scatters(world, quick, messages):
    def scatter(x):
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 2, dist.group.WORLD.group_name))

    compiled(lambda x: scatter(x).sin())(values(8, H))
    compiled(lambda x: scatter(x).sin() + all_reduce(x[:4]).sin())(values(8, H))
    assert [message.split(": ")[1] for message in messages()] == [
        "none of its reduce-scatters can be fused", "none of its all-reduces and reduce-scatters can be fused",
    ]  # fmt: skip


def test_mode_off_only_reports(world, quick, messages):
    options = {"tokenweave.mode": "off"}
    compiled(mlp, options=options)(*mlp_inputs(8))
    (report,) = tw_compile.reports()
    assert (report.mode, len(report.sites), report.reasons, report.transport) == ("off", 2, ["mode is off"], "")
    assert messages() == []


def test_small_graphs_are_fused_by_default(world, quick, unexpanded):
    compiled(mlp)(*mlp_inputs(8))
    (report,) = tw_compile.reports()
    assert (report.mode, report.transport) == ("fuse", "process_group")
    assert report.reasons[0] == "not woven: fewer than 1024 tokens"


def test_a_split_of_a_dynamic_length(world, quick, unexpanded):
    """It may leave one token, and where it leaves none that is an error of ours if it is forced."""

    def run(tokens, **options):
        torch._dynamo.reset()
        x, residual, *_ = inputs = mlp_inputs(tokens)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(residual, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(mlp, options={"tokenweave.split": 7, **options})(*inputs), mlp(*inputs))
        return tw_compile.reports()[-1].mode

    with pytest.raises(Exception, match="split=7 leaves nothing for the second half") as raised:
        run(7, **{"tokenweave.mode": "weave"})
    assert isinstance(raised.value.inner_exception, tw_compile.TokenWeaveError)
    assert run(8, **{"tokenweave.mode": "weave"}) == "weave"
    assert run(9, **{"tokenweave.mode": "weave"}) == "weave"
    assert run(7, **{"tokenweave.min_tokens": 2}) == "fuse"


def test_a_branch_with_a_site_inside(world, quick):
    def block(x, r, w):
        return torch.cond(x.sum() > 0, lambda x, r: hf_norm(r + all_reduce(x), w), lambda x, r: r.sin(), (x, r))

    inputs = values(8, H).abs(), values(8, H), values(H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(block)(*inputs), block(*inputs))
    (report,) = tw_compile.reports()
    (refusal,) = report.refusals
    assert not report.sites and refusal.reason.endswith(", the graph of a higher-order op")


@pytest.mark.parametrize("mode", ["auto", "fuse", "weave"])
def test_graphs_of_higher_order_ops_are_not_ours(world, quick, messages, mode):
    def block(x, r, w):
        return hf_norm(r + all_reduce(torch.cond(x.sum() > 0, torch.cos, torch.sin, (x,))), w)

    inputs = values(8, H), values(8, H), values(H)
    with torch.no_grad():
        torch.testing.assert_close(compiled(block, options={"tokenweave.mode": mode})(*inputs), block(*inputs))
    (report,) = tw_compile.reports()
    assert len(report.sites) == 1 and not messages()


def test_a_graph_break_gives_a_report_for_each_graph(world, quick):
    def two(x, residual, weight, up, down):
        x = mlp(x, residual, weight, up, down)
        torch._dynamo.graph_break()
        return mlp(x, residual, weight, up, down)

    compiled(two)(*mlp_inputs(8))
    assert [len(report.sites) for report in tw_compile.reports()] == [2, 2]


# --- Inductor's own --------------------------------------------------------------------------------------------------


def test_modes_of_torch_compile_are_taken(world, unexpanded):
    for mode in ("default", "reduce-overhead", "max-autotune-no-cudagraphs"):
        torch._dynamo.reset()
        compiled(Small().requires_grad_(False), mode=mode)(values(8, H), values(8, H))
        assert tw_compile.reports()[-1].mode == "fuse"


def test_max_autotune_is_taken(world, quick, unexpanded):
    compiled(mlp, mode="max-autotune")(*mlp_inputs(8))
    assert tw_compile.reports()[-1].mode == "fuse"


def test_an_unknown_mode_is_inductors_error(world, quick):
    with pytest.raises(Exception, match="Unrecognized mode=fast"):
        compiled(mlp, mode="fast")(*mlp_inputs(8))


def test_inductors_options_reach_it(world, monkeypatch):
    seen = []

    def spy(gm, inputs, inner_compile, config_patches):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", spy)
    compiled(mlp, options={"max_autotune": True, "tokenweave.mode": "fuse", "triton.cudagraphs": False})(*mlp_inputs(8))
    assert seen[0]["max_autotune"] is True and seen[0]["triton.cudagraphs"] is False
    assert not any("tokenweave" in name for name in seen[0])


def test_an_unknown_option_of_inductor_is_its_error(world, quick):
    with pytest.raises(Exception, match="Unexpected optimization option max_autotun"):
        compiled(mlp, options={"max_autotun": True})(*mlp_inputs(8))


def test_a_bad_value_of_inductors_option_is_its_error(world, quick):
    with pytest.raises(Exception, match="Unexpected type of attr max_autotune"):
        compiled(mlp, options={"max_autotune": "yes"})(*mlp_inputs(8))


def test_a_pass_of_the_user_still_runs_and_sees_our_graph(world, quick):
    seen = []
    options = {"tokenweave.mode": "weave", "post_grad_custom_pre_pass": lambda graph: seen.append([n.target for n in graph.nodes])}
    compiled(mlp, options=options)(*mlp_inputs(8))
    (targets,) = seen
    assert targets.count(ops.start) == 4


def test_a_pass_that_the_user_configured_globally_still_runs(world, quick):
    seen = []
    with torch._inductor.config.patch(post_grad_custom_pre_pass=seen.append):
        compiled(mlp)(*mlp_inputs(8))
    assert len(seen) == 1


def pointwise_block(x, residual, weight):
    """Halves of one shape, with nothing but pointwise work between sites: what Inductor's scheduler would like to fuse."""
    for function in (torch.sin, torch.cos, torch.tanh):  # so that no layers are equal, and the code has all calls in order
        residual = residual + all_reduce(x)
        x = function(hf_norm(residual, weight))
    return x


def code_of(function, *inputs):
    with torch.no_grad():
        _, (code,) = torch._inductor.utils.run_and_get_code(compiled(function, options={"tokenweave.mode": "weave"}), *inputs)
    return code


def test_the_order_survives_inductors_code_generation(world, unexpanded):
    code = code_of(pointwise_block, values(64, H), values(64, H), values(H))
    order = re.findall(r"= tokenweave\.(\w+)", code)
    assert order == ["start", "start", "wait", "start", "wait", "start", "wait", "start", "wait", "start", "wait", "wait"]
    # By the functions themselves: not once through PyTorch's dispatcher, which takes longer than what they do.
    assert "from tw_compile.ops import direct as tokenweave\n" in code and not re.search(r"torch\.ops\.tokenweave[\w.]*\(", code)


def test_the_order_over_the_process_group_survives_it_too(world):
    code = code_of(pointwise_block, values(64, H), values(64, H), values(H))
    order = re.findall(r"torch\.ops\._c10d_functional\.(\w+)\.default\(", code)
    a, w = "all_reduce_", "wait_tensor"
    assert order == [a, a, w, a, w, a, w, a, w, a, w, w]
    assert "tokenweave" not in code
