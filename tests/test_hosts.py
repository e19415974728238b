"""Two hosts: two agents of torchrun on this machine, with a rank each, which are named."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_nodes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
                "--master-addr", "127.0.0.1", "--master-port", str(port), str(ROOT / "tests" / "hosts.py"),
            ],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        done = [agent.communicate(timeout=200) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], done
    said = sorted(json.loads(line) for out, _ in done for line in out.splitlines() if line.startswith("["))
    apart = "the ranks of the group are not all on one host: rank 1 is not where rank 0 is"
    why_not = f"multimem: {apart}; peer: {apart}"
    assert [rank for rank, *_ in said] == [0, 1]
    for _, name, reason, mode, transport, reasons, same, _ in said:
        assert (name, reason) == ("process_group", why_not)
        assert (mode, transport, reasons, same) == ("weave", "process_group", [why_not], True)
    assert said[0][-1] == said[1][-1], "the ranks have the same bits"
