"""What a rank of ``torchrun --nnodes 2`` sees of the other host: see test_hosts.py.

The environment claims that both ranks are on one host. Prints the reports and the results as JSON, each rank a line.
"""

import json
import os

import torch
import torch.distributed as dist
from graphs import without_codegen
from test_low_bit_ranks import CPU, Block, H
from test_transport import Stand

import tw_compile
from tw_compile import backend
from tw_compile.transports import choose, link


def main():
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    os.environ[link.HOST_NAME] = f"host {os.environ['GROUP_RANK']}"
    dist.init_process_group("gloo")
    group, candidates = dist.group.WORLD.group_name, choose.candidates
    choose.candidates = lambda *asked: choose._agree(group, *candidates(*asked))  # on a CPU there is nothing to agree on
    choose.Symmetric = Stand  # says that it could
    transport, why_not = choose.choose("auto", group, CPU)
    x = torch.randn(8, H, generator=torch.Generator().manual_seed(1))
    model, whole = Block(dist.get_rank(), dist.get_world_size()), Block()
    with torch.no_grad(), without_codegen():
        out = torch.compile(model, backend=backend.tokenweave, options={"tokenweave.mode": "weave"})(x)
    (report,) = tw_compile.reports()
    same = torch.allclose(out, whole(x), rtol=1e-4, atol=1e-4)
    said = [transport.name, why_not, report.mode, report.transport, report.reasons, same, out.sum().item()]
    print(json.dumps([dist.get_rank(), *said]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
