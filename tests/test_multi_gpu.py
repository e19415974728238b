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


@pytest.mark.parametrize("check", ("agreement", "repeats", "stress", "graphs", "transports", "models"))
def test_on_all_gpus(check):
    ranks = max(n for n in (2, 4, 8) if n <= torch.cuda.device_count())
    script = Path(__file__).parent / "multi_gpu.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script), check]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
