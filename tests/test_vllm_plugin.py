"""What the plug-in for vLLM does with its configuration and its ops: ``make test-vllm``. Elsewhere these tests skip themselves."""

import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph

from tw_compile.compat import auto_functionalized
from tw_compile.passes.rules.token_axis import split_rule

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


def test_another_version_is_told_once(caplog, monkeypatch):
    import vllm
    from vllm.config import CompilationConfig

    from tw_compile.integrations.vllm import plugin

    with caplog.at_level(logging.WARNING, logger="tw_compile"):
        plugin._options(CompilationConfig())
        assert not caplog.records
        monkeypatch.setattr(vllm, "__version__", "0.99.1")
        for _ in range(2):
            assert plugin._options(CompilationConfig(inductor_compile_config={"tokenweave.min_tokens": 9, "dce": True})) == {
                "tokenweave.cuda_graphs": False, "tokenweave.min_tokens": 9
            }  # fmt: skip
    assert len(caplog.records) == 1 and "was tested with vLLM 0.32, and this is 0.99.1" in caplog.text


@pytest.mark.parametrize("name, reason", [("moe_forward", "vLLM's experts take"), ("unified_mla_attention_with_output", "MLA")])
def test_what_runs_on_all_tokens(name, reason):
    import vllm.model_executor.layers.attention.mla_attention
    import vllm.model_executor.layers.fused_moe.runner.moe_runner  # noqa: F401  # they define the ops

    graph, op = Graph(), getattr(torch.ops.vllm, name).default
    assert reason in split_rule(graph.call_function(op), {})
    assert reason in split_rule(graph.call_function(auto_functionalized, (op,)), {})
