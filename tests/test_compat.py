"""PyTorch as it may become: names that are missing cost the backend, not a crash."""

import ast
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.distributed_c10d

from tw_compile import compat

ROOT = Path(compat.__file__).parent.parent


def read_anew():
    """The module, as it is where it is imported now."""
    spec = importlib.util.spec_from_file_location("compat_anew", compat.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_is_missing():
    assert compat.missing() == []


@pytest.mark.parametrize(
    "owner, name",
    [
        (torch._inductor.ir, "InvokeSubgraph"),
        (torch._inductor.config, "reorder_for_locality"),
        (torch.distributed.distributed_c10d, "_get_process_group_store"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_missing_name(owner, name, monkeypatch):
    path = f"{owner.__name__}.{name}"
    if owner is torch._inductor.config:
        original = type(owner).__getattr__
        monkeypatch.setattr(type(owner), "__getattr__", lambda config, asked: original(config, None if asked == name else asked))
    else:
        monkeypatch.delattr(owner, name)
    assert read_anew().missing() == [path]


def test_what_stands_for_a_missing_name(monkeypatch):
    """Modules that import it can be imported; a call raises an error that names what is missing."""
    monkeypatch.delattr(torch._inductor.utils, "BoxedBool")
    absent = read_anew().BoxedBool

    class Pass(absent):
        pass

    with pytest.raises(RuntimeError, match=r"PyTorch .* has no torch\._inductor\.utils\.BoxedBool; .* tested with 2"):
        Pass()
    with pytest.raises(RuntimeError, match=r"BoxedBool\.uuid"):
        absent.uuid()


@pytest.mark.parametrize(
    "version, warns",
    [("2.10.1", True), ("2.11.0+cu130", False), ("2.14.1", False), ("2.15.0a0+git1234", True), ("3.0", True)],
)
def test_versions_that_were_not_tested(version, warns, monkeypatch, caplog):
    anew = read_anew()
    monkeypatch.setattr(torch, "__version__", version)
    with caplog.at_level(logging.WARNING, logger="tw_compile"):
        anew.warn_if_untested()
        anew.warn_if_untested()
    assert len(caplog.records) == warns
    assert all(f"PyTorch {compat.TESTED[0]} to {compat.TESTED[1]}, and this is {version}" in r.getMessage() for r in caplog.records)


def test_the_package_without_some_names():
    """All of it can be imported."""
    code = """
import torch._inductor.compile_fx, torch._inductor.cudagraph_trees, torch._inductor.fx_passes.post_grad
import torch.distributed.distributed_c10d as c10d
del torch._inductor.ir.FallbackKernel, torch._inductor.fx_passes.post_grad.reorder_for_locality, c10d._get_process_group_store
import tw_compile
print(*tw_compile.compat.missing())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {
        "torch.distributed.distributed_c10d._get_process_group_store",
        "torch._inductor.ir.FallbackKernel",
        "torch._inductor.fx_passes.post_grad.reorder_for_locality",
    }


def test_the_package_without_symmetric_memory():
    """Where PyTorch has no symmetric memory, sites run over the process group, and the reason is said."""
    code = """
import os, torch, torch.distributed as dist, torch.distributed._symmetric_memory as symmetric_memory
del torch._C._distributed_c10d._SymmetricMemory, symmetric_memory.rendezvous
import tw_compile
from tw_compile import doctor
from tw_compile.transports import choose
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
group, device = dist.group.WORLD.group_name, torch.device("cuda", 0)
torch.version.cuda = "13.0"
assert tw_compile.compat.missing() == []
for name in ("multimem", "peer"):
    print(choose.unavailable(name, group, device))
    assert doctor._why_not(name, 2) == choose.unavailable(name, group, device)
assert choose.unavailable("process_group", group, device) is None
assert choose.unavailable("peer", group, torch.device("cpu")) == "it needs NVIDIA GPUs"
assert choose.candidates("auto", group, device)[0] == ["process_group"]
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert line.startswith(f"PyTorch {torch.__version__} lacks names that it needs (")
        assert "torch._C._distributed_c10d._SymmetricMemory" in line and "torch.distributed._symmetric_memory.rendezvous" in line
    assert len(done.stdout.splitlines()) == 2


def test_no_private_name_is_used_elsewhere():
    # What is registered under torch.ops is known by these names, and torch._dynamo.reset is what users call, too.
    private = re.compile(r"^torch\.(?!ops\b|_dynamo$|_dynamo\.reset)(\w+\.)*(_[a-zA-Z]|distributed_c10d|experimental)")
    found = [
        f"{path.name}:{node.lineno}: {said}"
        for path in sorted((ROOT / "tw_compile").rglob("*.py"))
        if path.name != "compat.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Attribute))
        if private.search(said := ast.unparse(node).replace(" import ", ".").removeprefix("from ").removeprefix("import "))
    ]
    assert not found, "\n".join(found)
