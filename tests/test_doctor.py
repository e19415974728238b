"""tw-compile doctor: a line for whatever it looks at, on any machine, and what to do where something is missing."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tw_compile import cli, doctor
from tw_compile.doctor import MISSING, NOTE, OK
from tw_compile.transports.symmetric import host, nvrtc, support

ROOT = Path(__file__).parent.parent
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0\t\tN/A
GPU1\tNV18\t X \tNV18\tSYS\t0-31\t0\t\tN/A
GPU2\tSYS\tNV18\t X \tSYS\t32-63\t1\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X

Legend:

  X    = Self
"""


def found(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture
def gpus(monkeypatch):
    """A machine with so many GPUs, of a kind that has all. Functions of torch and of ours may be replaced on top."""

    def machine(number, smi=TOPOLOGY, **changes):
        properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150e9)
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: number, "get_device_properties": lambda index: properties,
            "get_device_capability": lambda index: (9, 0), "can_device_access_peer": lambda index, other: True,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, changes.get(name, value))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(doctor.compat, "missing_on_gpus", list)
        monkeypatch.setattr(doctor, "_smi", lambda *arguments: smi if "topo" in arguments else "580.1\n580.1\n")
        monkeypatch.setattr(host, "missing", lambda: changes.get("host"))
        monkeypatch.setattr(nvrtc, "missing", lambda: changes.get("nvrtc"))
        monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
        monkeypatch.setattr(support, "has_multicast", lambda index: changes.get("multicast", False))
        return found(doctor.examine())

    return machine


def test_a_machine_without_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_smi", lambda *arguments: None)
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "process_group for a group on the CPU\n" in said and "not peer: it needs NVIDIA GPUs" in said
    assert said.endswith("nothing that is needed is missing\n")


def test_one_gpu(gpus):
    seen = gpus(1)
    assert "none for one GPU" in seen["transport"].text and "links" not in seen
    assert seen["GPUs"].text == "1 × NVIDIA H200 (9.0, 150 GB)" and MISSING not in {f.status for f in seen.values()}


def test_gpus_that_have_all(gpus):
    seen = gpus(3, multicast=True)
    assert (seen["links"].text, seen["peer access"].status) == ("pairs of GPUs: 2 by NVLink (NV18), 1 by PCIe (SYS)", OK)
    assert seen["transport"].text == "multimem or peer, whichever is faster, for a group of 3 GPUs"
    assert seen["driver"].text == "NVIDIA 580.1" and MISSING not in {f.status for f in seen.values()}


def test_why_not_a_better_transport(gpus):
    seen = gpus(2)
    assert seen["transport"].text.splitlines() == [
        "peer for a group of 2 GPUs",
        "not multimem: there is no NVLink multicast here, or it is switched off",
    ]
    seen = gpus(2, can_device_access_peer=lambda index, other: False)
    assert "not peer: GPU 0 cannot reach the memory of GPU 1" in seen["transport"].text
    assert seen["transport"].status == seen["peer access"].status == NOTE


@pytest.mark.parametrize(
    "name, reason, advice", [("host", "there is no C compiler", "install gcc"), ("nvrtc", "no NVRTC", "pip install")]
)
def test_what_is_missing_comes_with_what_to_do(gpus, name, reason, advice, monkeypatch, capsys):
    seen = gpus(2, **{name: reason})
    (missing,) = [finding for finding in seen.values() if finding.status == MISSING]
    assert missing.text == reason and advice in missing.advice
    assert seen["transport"].text.startswith("process_group") and f"not peer: {reason}" in seen["transport"].text
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert f"-> {missing.advice}" in said and said.endswith(f"missing: {missing.name}\n")


def test_a_driver_for_which_this_pytorch_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_smi", lambda *arguments: "580.1\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = found(doctor.examine())["driver"]
    assert driver.status == MISSING and "PyTorch sees no GPU" in driver.text


def test_gpus_that_are_hidden_are_no_fault(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_smi", lambda *arguments: "580.1\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    driver = found(doctor.examine())["driver"]
    assert driver.status == doctor.NOTE and "CUDA_VISIBLE_DEVICES is empty" in driver.text


def test_a_probe_that_fails_is_a_line(monkeypatch):
    before = doctor.examine()

    def fail():
        raise OSError("the bus is gone")
        yield

    monkeypatch.setattr(doctor, "_PROBES", dict.fromkeys(doctor._PROBES, fail))
    after = doctor.examine()
    assert len(after) == len(doctor._PROBES) <= len(before)
    assert {finding.text for finding in after} == {"the check failed: OSError: the bus is gone"}


def findings(monkeypatch, **environment):
    """The findings with these variables, and without others of the package."""
    for name in ("TW_COMPILE_MODE", "TW_COMPILE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return doctor.examine()


def environment(monkeypatch, **variables):
    return [(f.status, f.text) for f in findings(monkeypatch, **variables) if f.name == "environment"]


def test_the_kill_switch(monkeypatch, capsys):
    assert environment(monkeypatch) == [(OK, "TW_COMPILE_MODE is not set")]
    assert environment(monkeypatch, TW_COMPILE_MODE="off") == [(NOTE, "TW_COMPILE_MODE is off: every graph is left to Inductor")]
    assert environment(monkeypatch, TW_COMPILE_MODE="fuse") == [(NOTE, "TW_COMPILE_MODE is fuse: no graph is woven")]
    ((status, text),) = environment(monkeypatch, TW_COMPILE_MODE="bogus")
    assert status == MISSING and text.startswith("the environment variable TW_COMPILE_MODE is 'bogus'; it takes 'off' or 'fuse'")
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "-> unset TW_COMPILE_MODE on all ranks" in said and "environment" in said.splitlines()[-1]


@pytest.mark.parametrize(
    "name, value, other, effect",
    [
        ("TW_COMPILE_HOST", "a", "", "ranks with another name are taken to be on another host"),
        ("TORCH_COMPILE_DISABLE", "1", "0", "torch.compile compiles nothing"),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1", "0", "transport multimem is not available"),
        ("NCCL_P2P_DISABLE", "1", "0", "NCCL's links are slower, so that another transport may be faster, and other plans are used"),
        ("VLLM_PLUGINS", "", "lora,tokenweave", "vLLM does not load the plug-in tokenweave"),
    ],
)
def test_a_variable_that_changes_what_the_package_does(monkeypatch, name, value, other, effect):
    assert (NOTE, f"{name}={value}: {effect}") in environment(monkeypatch, **{name: value})
    assert not [text for _, text in environment(monkeypatch, **{name: other}) if effect in text]


def test_a_variable_that_nothing_reads(monkeypatch):
    said = environment(monkeypatch, TW_COMPILE_CACHEDIR="/tmp", TW_COMPILE_CACHE_DIR="/tmp")
    wanted = "TW_COMPILE_CACHEDIR has no effect; tw_compile reads TW_COMPILE_MODE, TW_COMPILE_CACHE_DIR, TW_COMPILE_HOST"
    assert said[1:] == [(NOTE, wanted)]


def test_caches_that_cannot_be_made(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    seen = found(findings(monkeypatch, TW_COMPILE_CACHE_DIR=file / "cache", TORCHINDUCTOR_CACHE_DIR="/proc/x"))
    ours, inductors = seen["cache"], seen["Inductor's cache"]
    assert ours.status == NOTE and "cannot be written: Not a directory" in ours.text and "TW_COMPILE_CACHE_DIR" in ours.advice
    assert inductors.status == MISSING and "TORCHINDUCTOR_CACHE_DIR" in inductors.advice
    seen = found(findings(monkeypatch, TW_COMPILE_CACHE_DIR=tmp_path / "new", TORCHINDUCTOR_CACHE_DIR=tmp_path / "other"))
    assert seen["cache"].status == seen["Inductor's cache"].status == OK and "0 plans, 0 kernels" in seen["cache"].text


def test_links_that_nvidia_smi_does_not_tell(gpus):
    for smi in (None, "", "no devices were found"):
        assert gpus(2, smi)["links"].status == NOTE


def test_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctors"])
    assert end.value.code == 2 and "invalid choice" in capsys.readouterr().err


def torchrun(ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "tw_compile", "doctor"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_ranks():
    done = torchrun(2)
    installed = bool(importlib.metadata.entry_points(group="torch_dynamo_backends", name="tokenweave"))
    assert done.returncode == (0 if installed else 1), done.stderr
    assert done.stdout.count("self-test passed") >= 1 and "GB/s on the wire" in done.stdout
    assert done.stdout.splitlines()[-1] == ("nothing that is needed is missing" if installed else "missing: tw_compile")
    assert done.stdout.count("Inductor's cache") == 1, "rank 0 alone prints"


@pytest.mark.gpu
def test_ranks_on_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    done = torchrun(2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("self-test passed") == 2
