"""What Symmetric promises of its memory, as far as it can be seen without a GPU."""

from types import SimpleNamespace

import torch

from tw_compile.transports.symmetric.launch import Call
from tw_compile.transports.symmetric.tuning import LEAST_ROWS, by_rule


def call(rows, shape):
    workspace = SimpleNamespace(
        activations=torch.zeros(64, 16, dtype=torch.bfloat16),
        carried=torch.zeros(64, 16),
        whole_residual=torch.zeros(64, 16, dtype=torch.bfloat16),
        arguments=SimpleNamespace(set=None),
        max_ctas=16,
        tuning=by_rule(2),
    )
    return workspace, Call(SimpleNamespace(rank=0, world=2, side=0), workspace, torch.Size(shape), rows, 0, 0)


def test_no_result_shares_the_storage_of_an_input():
    """torch refuses that from 2.12 on. Each site takes the residual that the one before returned."""
    for mode in (False, True):
        with torch.inference_mode(mode):
            workspace, site = call(40, (1, 40, 16))
            before = site.carried()
            for _ in range(3):
                after = site.carried()
                assert not torch._C._any_output_is_alias_to_input_or_output((site.partials, before), {}, (site.norm, after))
                before = after
            assert site.partials.data_ptr() == site.norm.data_ptr() == workspace.activations.data_ptr()
            assert before.data_ptr() == workspace.carried.data_ptr()
            assert not any(t.is_inference() for t in (site.partials, site.norm, before))
            assert all(t.stride() == (640, 16, 1) for t in (site.partials, site.norm, before))


def test_grid():
    """Never more CTAs than rows of the rank that has most, nor than flags; a row each for few tokens."""
    assert [call(40, (40, 16))[1].grid(ctas, 8) for ctas in (0, 4, 8)] == [8, 4, 8]
    assert [call(LEAST_ROWS, (LEAST_ROWS, 16))[1].grid(ctas, 32) for ctas in (0, 3)] == [16, 3]
    assert [call(5, (5, 16))[1].grid(ctas, 8) for ctas in (0, 3)] == [5, 3]
    try:
        call(40, (40, 16))[1].grid(17, 8)
    except RuntimeError as error:
        assert "17 CTAs do not fit" in str(error)
    else:
        raise AssertionError("a grid larger than the signal pad was accepted")


def test_a_grid_is_whole_clusters_if_there_is_room():
    assert [call(40, (40, 16))[1].grid(ctas, 32, cluster=2) for ctas in (0, 3, 4, 8)] == [16, 4, 4, 8]
    assert call(5, (5, 16))[1].grid(3, 32, cluster=1) == 3
