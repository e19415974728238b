"""What the plug-in for vLLM does with its configuration and its ops: ``make test-vllm``. Elsewhere these tests skip themselves."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph

from tw_compile import backend
from tw_compile.compat import auto_functionalized
from tw_compile.options import TokenWeaveError
from tw_compile.passes.rules.token_axis import split_rule
from tw_compile.transports import agree

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM, which make test-vllm installs"),
]


@pytest.fixture(scope="module", autouse=True)
def registered():
    from vllm import plugins

    plugins.load_general_plugins()


def checked(mode, becomes, backend="tokenweave"):
    """The compilation mode of a configuration that was checked, where vLLM's platform changes it."""
    from vllm.config import CompilationMode

    from tw_compile.integrations.vllm import plugin

    def check(vllm_config):
        vllm_config.compilation_config.mode = CompilationMode[becomes]

    config = SimpleNamespace(compilation_config=SimpleNamespace(mode=CompilationMode[mode], backend=backend))
    plugin._checking(check)(None, config)
    return config.compilation_config.mode.name


def test_vllm_compile_is_refused():
    with pytest.raises(ValueError, match="needs the mode DYNAMO_TRACE_ONCE"):
        checked("VLLM_COMPILE", "VLLM_COMPILE")
    assert checked("VLLM_COMPILE", "VLLM_COMPILE", "inductor") == "VLLM_COMPILE"


def test_a_warning_where_vllm_compiles_nothing(caplog):
    with caplog.at_level(logging.WARNING, logger="tw_compile"):
        checked("DYNAMO_TRACE_ONCE", "DYNAMO_TRACE_ONCE")
        checked("NONE", "NONE", "eager")
        assert not caplog.records
        checked("DYNAMO_TRACE_ONCE", "NONE")
    assert "vLLM compiles nothing with these settings (compilation mode NONE)" in caplog.text


@pytest.mark.parametrize(
    "backend, given, custom_ops, asked",
    [
        ("inductor", [], ["none"], "inductor"), ("tokenweave", [], ["none"], "inductor"), ("eager", [], ["all"], "eager"),
        ("tokenweave", ["all"], ["all"], "inductor"), ("tokenweave", ["+silu_and_mul"], ["+silu_and_mul", "none"], "inductor"),
    ],
)  # fmt: skip
def test_vllm_chooses_ops_as_for_inductor(backend, given, custom_ops, asked, monkeypatch):
    """Which of its own kernels are in the graph, and which kernels norms are."""
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig
    from vllm.platforms import current_platform

    from tw_compile.integrations.vllm import plugin

    seen, platform = [], type(current_platform)
    usual = platform.get_default_ir_op_priority.__func__(platform, VllmConfig())

    def priority(vllm_config):
        seen.append(vllm_config.compilation_config.backend)
        return usual

    monkeypatch.setattr(platform, "get_default_ir_op_priority", classmethod(plugin._of_inductor(priority)))
    mode = CompilationMode.DYNAMO_TRACE_ONCE
    config = VllmConfig(compilation_config=CompilationConfig(mode=mode, backend=backend, custom_ops=[*given])).compilation_config
    assert (config.custom_ops, config.backend, {*seen}) == (custom_ops, backend, {asked})


def configured(longest=64, **compilation):
    from vllm.config import CompilationConfig

    scheduler = SimpleNamespace(max_num_batched_tokens=longest)
    return SimpleNamespace(
        compilation_config=CompilationConfig(**compilation), scheduler_config=scheduler, kv_transfer_config=None,
        attention_config=SimpleNamespace(use_non_causal=False), model_config=SimpleNamespace(rswa_window=None),
    )  # fmt: skip


def test_another_version_is_a_warning_once(caplog, monkeypatch):
    import vllm

    from tw_compile.integrations.vllm import plugin

    with caplog.at_level(logging.WARNING, logger="tw_compile"):
        plugin._options(configured())
        assert not caplog.records
        monkeypatch.setattr(vllm, "__version__", "0.99.1")
        for _ in range(2):
            assert plugin._options(configured(inductor_compile_config={"tokenweave.min_tokens": 9, "dce": True})) == {
                "tokenweave.cuda_graphs": False, "tokenweave.min_tokens": 9
            }  # fmt: skip
    assert len(caplog.records) == 1 and "was tested with vLLM 0.32, and this is 0.99.1" in caplog.text


@pytest.mark.parametrize("mode, longest, captured", [("FULL", 512, True), ("FULL", 2048, False), ("FULL_DECODE_ONLY", 512, False)])
def test_long_steps_run_in_cuda_graphs_only_if_vllm_captures_them(mode, longest, captured):
    from tw_compile.integrations.vllm import plugin

    config = configured(longest, cudagraph_mode=mode, max_cudagraph_capture_size=512)
    assert plugin._options(config) == {"tokenweave.cuda_graphs": captured}
    assert config.compilation_config.cudagraph_num_of_warmups >= 1


def test_the_profiling_run_has_a_step_of_each_form():
    from tw_compile.integrations.vllm import plugin

    class Runner:
        vllm_config, steps = configured(backend="tokenweave"), []

        def _dummy_run(self, num_tokens, is_profile=False, skip_attn=False):
            self.steps.append((num_tokens, is_profile, skip_attn))
            return num_tokens

    for _ in range(2):
        plugin._profile_all_forms(Runner)
    assert Runner()._dummy_run(2048, is_profile=True, skip_attn=True) == 2048
    assert Runner()._dummy_run(8) == 8
    assert Runner.steps == [(2048, True, True), (255, True, True), (2, True, True), (8, False, False)]


@pytest.mark.parametrize(
    "config, field, given, reason",
    [
        ("", "kv_transfer_config", object(), "a KV connector sends"),
        ("attention_config", "use_non_causal", True, "attention of this model is not causal in all steps"),
        ("model_config", "rswa_window", 128, "attention with a window and the whole prompt (R-SWA)"),
    ],
)
def test_attention_of_a_whole_step_where_the_configuration_needs_it(monkeypatch, config, field, given, reason):
    from vllm.config import CompilationMode

    from tw_compile.integrations.vllm import plugin
    from tw_compile.passes.rules import token_axis

    monkeypatch.setattr(token_axis, "_RULES", dict(token_axis._RULES))
    all_of_it = configured(backend="tokenweave", mode=CompilationMode.DYNAMO_TRACE_ONCE)
    rules = dict(token_axis._RULES)
    all_of_it.compilation_config.init_backend(all_of_it)
    assert rules == token_axis._RULES
    setattr(getattr(all_of_it, config) if config else all_of_it, field, given)
    compiler = all_of_it.compilation_config.init_backend(all_of_it)
    assert compiler.func is backend.tokenweave and compiler.keywords["options"] == {"tokenweave.cuda_graphs": False}
    for op in plugin._attention():
        assert split_rule(Graph().call_function(op), {}).startswith(reason)


def test_a_rank_without_the_plugin_is_named(monkeypatch):
    from vllm.distributed import parallel_state

    from tw_compile.integrations.vllm import plugin

    def exchange(group, what, message, timeout_s):
        raise RuntimeError(f"rank 1 of group {group} did not come to {what} within {timeout_s:g} s")

    monkeypatch.setattr(agree, "exchange", exchange)
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(device_group=SimpleNamespace(group_name="tp")))
    with pytest.raises(TokenWeaveError, match="rank 1 of group tp did not come to the start .* within 120 s. If it has no plug-in of tw_c"):
        plugin._meet_the_others()


@pytest.mark.parametrize("name, reason", [("moe_forward", "vLLM's experts take"), ("unified_mla_attention_with_output", "MLA")])
def test_what_runs_on_all_tokens(name, reason):
    import vllm.model_executor.layers.attention.mla_attention
    import vllm.model_executor.layers.fused_moe.runner.moe_runner  # noqa: F401  # they define the ops

    graph, op = Graph(), getattr(torch.ops.vllm, name).default
    assert reason in split_rule(graph.call_function(op), {})
    assert reason in split_rule(graph.call_function(auto_functionalized, (op,)), {})
