"""A process of its own that compiles one block for sizes on both sides of the threshold, and says what happened, as JSON.

    compile_once.py OPTIONS CONSTANT     the options as JSON; a constant of the graph
"""

import json
import sys

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

if __name__ == "__main__":
    from test_split import mlp, mlp_inputs

    import tw_compile
    from tw_compile import backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    constant = float(sys.argv[2])
    compiled = torch.compile(lambda x, *rest: mlp(x * constant, *rest), backend=backend.tokenweave, options=json.loads(sys.argv[1]))
    torch.manual_seed(0)
    sums = []
    for tokens in (48, 16, 64):
        x, residual, *weights = mlp_inputs(tokens)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(residual, 0)
        sums.append(compiled(x, residual, *weights).sum().item())
    said = {
        "reports": [report.to_dict() for report in tw_compile.reports()],
        "graph hits": counters["inductor"]["fxgraph_cache_hit"],
        "autograd hits": counters["aot_autograd"]["autograd_cache_hit"],
        "sums": sums,
    }
    print(json.dumps(said))
