"""What is logged: TORCH_LOGS="tokenweave", the artifacts of TORCH_TRACE, and the one message that autotuning takes time."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import without_codegen
from test_split import mlp, mlp_inputs

from tw_compile import logs

ROOT = Path(__file__).parent.parent
# The package is imported when Dynamo looks the backend up, as after an installation.
COMPILE = """
import sys, torch, torch._dynamo, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
from sites import all_reduce, hf_norm, values
assert not any(name.startswith("tw_compile") for name in sys.modules)
backend = lambda *args, **kwargs: __import__("tw_compile.backend").backend.tokenweave(*args, **kwargs)
f = lambda x, w: hf_norm(all_reduce(x), w)
with torch.no_grad():
    torch.compile(f, backend=backend, options={"tokenweave.mode": "fuse"})(values(8, 64), values(64))
"""


def run(code, **environment):
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.full
def test_reports():
    said = run(COMPILE, TORCH_LOGS="dynamo, tokenweave")
    assert said.count("tokenweave_report of graph 0/0:") == said.count("1 site, 0 refused") == 1
    assert "tokenweave_before" not in said


@pytest.mark.slow
def test_graphs_and_what_tlparse_reads(tmp_path):
    said = run(COMPILE, TORCH_LOGS="+tokenweave", TORCH_TRACE=str(tmp_path))
    (path,) = tmp_path.iterdir()
    trace = path.read_text()
    for name in ("report", "before", "after"):
        assert said.count(f"tokenweave_{name} of graph 0/0:") == 1
        assert trace.count(f'"name": "tokenweave_{name}", "encoding": "string"') == 1
    assert "torch.ops.tokenweave.fused" in trace and "1 site, 0 refused" in trace


@pytest.mark.full
def test_set_logs_knows_the_name():
    set_logs = 'import tw_compile; torch._logging.set_logs(modules={"tokenweave": 20})'
    assert "tokenweave_report of graph" in run(COMPILE.replace("with torch", f"{set_logs}\nwith torch"))


def test_an_artifact_of_a_form_that_a_later_call_compiles(world, unexpanded, monkeypatch):
    """It belongs to the graph that was compiled at first."""
    seen = []
    monkeypatch.setattr(logs, "artifact", lambda name, text, of, level=0: seen.append((name, str(of))))
    run = torch.compile(mlp, backend="tokenweave", options={"tokenweave.min_tokens": 32})
    with without_codegen():
        for tokens in (8, 64):
            x, residual, *weights = mlp_inputs(tokens)
            for given in (x, residual):
                torch._dynamo.mark_dynamic(given, 0)
            run(x, residual, *weights)
    assert seen == [(name, "0/0") for _ in range(2) for name in ("before", "after", "report")]


def test_it_says_once_and_on_rank_0_only_that_it_tunes(world, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path))
    for rank, times in ((1, 0), (0, 1)):
        logs.say_that_it_autotunes.cache_clear()
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        with caplog.at_level(logging.WARNING, logger="tw_compile"):
            logs.say_that_it_autotunes()
            logs.say_that_it_autotunes()
        assert len(caplog.records) == times
    assert f"is cached in {tmp_path}" in caplog.text
