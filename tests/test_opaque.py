"""A Llama with an engine's opaque paged attention (benchmarks/opaque.py) on two ranks: attention cut, and attention whole."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from graphs import without_codegen

import tw_compile
from tw_compile import backend

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

LAYERS, TOKENS = 3, 40
# (tokens in the cache, new tokens) of each request of a step
REQUESTS = {"one": None, "several": [(0, 9), (7, 1), (3, 21), (12, 1), (0, 8)]}


def forward(requests, refused):
    """On a rank: (is it the same as eager, is eager the same as the model without a cache, report)."""
    import opaque
    from variants import llama

    torch._dynamo.reset()
    config = replace(llama.SIZES["tiny"], layers=LAYERS)
    models = []
    for kind in (llama.Llama, opaque.Llama):
        with torch.device("meta"):
            model = kind(config, dist.group.WORLD).eval().requires_grad_(False)
        llama.fill(model, config, torch.device("cpu"), None)
        models.append(model)
    ids = torch.randint(config.vocab, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(old, old + new) for old, new in requests or [(0, TOKENS)]])
    results, (plain, model) = [], models
    opaque.state.refused = refused
    try:
        with torch.no_grad(), without_codegen():
            for is_compiled in (False, True):
                torch.manual_seed(1)
                opaque.allocate(model, config, 320, requests)
                for cache in opaque.state.caches.values():
                    cache.normal_()  # what earlier steps have written
                options = {"tokenweave.mode": "weave"}
                run = torch.compile(model, backend=backend.tokenweave, dynamic=True, options=options) if is_compiled else model
                results.append((*run(ids, positions), *opaque.state.caches.values()))
            expected = plain(ids)[0]
    finally:
        opaque.state.refused = ""
    same = all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*results))
    return same, torch.allclose(results[0][0], expected, rtol=1e-4, atol=1e-5), tw_compile.reports()[-1]


@pytest.mark.slow
@pytest.mark.one_in(3)
@pytest.mark.parametrize("requests, refused", [("one", ""), ("several", ""), ("several", "its backend is not known")])
def test_opaque_attention(ranks, requests, refused):
    for same, without_cache, report in ranks(forward, REQUESTS[requests], refused):
        assert same and without_cache == (requests == "one") and report.alike == 2  # a name is an operand of a layer
        assert (report.mode, len(report.sites), len(report.refusals)) == ("weave", 2 * LAYERS + 1, 0)
        assert [(each.op, each.reason) for each in report.joins] == LAYERS * [
            (f"opaque.{op}.default", refused) for op in ("update", "attend") if refused
        ]
