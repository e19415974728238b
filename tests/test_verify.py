"""verify: a graph as it is beside what it is rewritten to, site by site."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import VOCAB, parallel
from sites import H, all_reduce, hf_norm, values
from test_split import mlp, mlp_inputs

import tw_compile
from tw_compile.site import Site
from tw_compile.transports.process_group import ProcessGroup

WEAVE = {"tokenweave.mode": "weave"}


def test_what_is_right_is_the_same_but_for_rounding(world):
    found = tw_compile.verify(mlp, *mlp_inputs(8), options=WEAVE)
    assert found.ok and not found.first
    assert [difference.relative < 1e-6 for difference in found.differences] == [True, True]
    assert found.outputs < 1e-6
    lines = str(found).splitlines()
    assert lines[0] == "tokenweave: the same but for rounding" and len(lines) == 4
    assert " woven  8×16 float32  " in lines[1] and lines[-1].endswith("of what the graphs return and write")


def test_of_a_model_without_sites_nothing_is_compared(world):
    result = tw_compile.verify(lambda x: x + 1, values(8))
    assert result.ok and str(result).startswith("tokenweave: nothing was compared, as no graph has a site.")


def test_a_wrong_rule_is_found_with_the_op(world, monkeypatch):
    """One that says what holds of sizes and not of values."""
    from tw_compile.passes.rules import token_axis

    @torch.library.custom_op("tests::centred", mutates_args=())
    def centred(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)

    centred.register_fake(torch.empty_like)
    monkeypatch.setitem(token_axis._RULES, torch.ops.tests.centred.default, lambda node, axes: tw_compile.Split(axes[node.args[0]]))

    def function(x, residual, weight):
        residual = residual + all_reduce(x)
        return hf_norm(residual + all_reduce(torch.ops.tests.centred(hf_norm(residual, weight)) * 3), weight)

    found = tw_compile.verify(function, values(64, H), values(64, H), values(H), options=WEAVE)
    assert not found.ok and found.first.startswith("tests.centred.default, relative difference ")
    assert "NOT THE SAME: tests.centred.default" in str(found)
    right, wrong = (difference.relative for difference in found.differences)
    assert right < 1e-6 and wrong > 1e-3


def test_what_is_written_to_is_written_once(world):
    def function(x, residual, weight, cache):
        cache.add_(1)
        residual = residual + all_reduce(x)
        return hf_norm(residual, weight) + cache[:, :1]

    cache = torch.zeros(8, 4)
    found = tw_compile.verify(function, values(8, H), values(8, H), values(H), cache)
    assert found.ok and torch.equal(cache, torch.ones(8, 4))


def test_both_graphs_draw_the_same_random_numbers(world):
    def function(x, residual, weight):
        residual = residual + all_reduce(x)
        y = F.dropout(hf_norm(residual, weight), 0.5, training=True) + torch.rand(H)
        return hf_norm(residual + all_reduce(y * 3), weight)

    found = tw_compile.verify(function, values(8, H), values(8, H), values(H), options=WEAVE)
    assert found.ok, found


def on_ranks(wrong):
    ids = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(1))
    if not wrong:
        found = tw_compile.verify(parallel("functional", 1, dtype=torch.float32), ids, options=WEAVE)
        return found.ok, len(found.differences), max(difference.relative for difference in found.differences)
    with pytest.MonkeyPatch.context() as patch:
        fused = ProcessGroup.fused

        def off(self, site, in_workspace):
            norm, residual = fused(self, site, in_workspace)
            return (norm * 1.1 if dist.get_rank() == 1 and Site._make(site).number == 1 else norm), residual

        patch.setattr(ProcessGroup, "fused", off)
        found = tw_compile.verify(parallel("functional", 1, dtype=torch.float32), ids, options={"tokenweave.mode": "fuse"})
        return found.ok, len(found.differences), found.first


def test_on_ranks(ranks):
    for ok, count, worst in ranks(on_ranks, False):
        assert ok and count == 3 and worst < 1e-5


def test_a_kernel_that_is_wrong_on_one_rank_is_found_on_all(ranks):
    first, second = ranks(on_ranks, True)
    assert not first[0] and not second[0]
