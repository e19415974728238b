"""A 2-D mesh on four real ranks: the all-reduces of the tensor-parallel groups are sites, those of the others are not."""

import pytest
import torch
import torch.distributed._functional_collectives as funcol
from graphs import without_codegen
from models import VOCAB, parallel, whole
from torch.distributed.device_mesh import init_device_mesh

import tw_compile
from tw_compile import backend


def forward():
    """On a rank: a forward pass over a mesh of 2 (data) × 2 (tensor), and the mean of the logits over the data ranks."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, exact = parallel("dtensor", dtype=torch.float32, mesh=mesh["tensor"]), whole(dtype=torch.float32)
    ids = torch.randint(0, VOCAB, (4, 16), generator=torch.Generator().manual_seed(2))
    own = ids.chunk(2)[mesh["data"].get_local_rank()]

    def mean_of_logits(ids):
        return funcol.all_reduce(model(ids), "avg", mesh["data"])

    with torch.no_grad(), without_codegen():
        compiled = torch.compile(mean_of_logits, backend=backend.tokenweave, options={"tokenweave.mode": "weave"})
        out, expected = compiled(own), exact(ids).unflatten(0, (2, 2)).mean(0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    return tw_compile.reports()[-1], mesh["tensor"].get_group().group_name


@pytest.mark.slow
def test_only_the_tensor_parallel_group_is_ours(four_ranks):
    for report, group in four_ranks(forward):
        assert report.mode == "weave" and not report.joins
        assert len(report.sites) == 5 and {site.group for site in report.sites} == {group}
        assert [refusal.reason for refusal in report.refusals] == ["reduce op 'avg', not 'sum'"]
