"""The backend on the GPUs of this machine, over NVLink peer memory, with 70B shapes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(900),
]


RANKS = max((n for n in (2, 4, 8) if n <= torch.cuda.device_count()), default=0)


def run(script, *arguments, launcher=()):
    script = Path(__file__).with_name(script)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *launcher, str(script), *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    "check",
    (
        "agreement", "repeats", "stress", "tuning", "graphs", "caches", "regions", "transports", "wire", "hierarchical", "streams",
        "threads", "state", "empty", "together", "opaque", "models",
    ),
)  # fmt: skip
def test_on_all_gpus(check):
    run("multi_gpu.py", check, launcher=("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"))


def test_failures():
    run("multi_gpu_failures.py", str(RANKS))
