"""Where an all-reduce has its group from: a name in the graph, or with ``compile_on_one_rank`` a mesh or group that the graph is given."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.config as distributed_config
from graphs import rewrite, without_codegen
from models import VOCAB, parallel
from sites import H, hf_norm, values
from torch.distributed.device_mesh import init_device_mesh

import tw_compile
from tw_compile import backend

pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.skipif(
        not hasattr(distributed_config, "patch") or torch.__version__ < "2.13", reason="Dynamo does not trace all forms before 2.13"
    ),
]


def over_a_mesh(x, mesh):
    return funcol.all_reduce(x, "sum", mesh)


def over_a_dimension(x, mesh):
    return funcol.all_reduce(x, "sum", (mesh, 0))


def in_place(x, mesh):
    x = x.clone()
    dist.all_reduce(x)
    return x


def in_place_over_a_mesh(x, mesh):
    x = x.clone()
    dist.all_reduce(x, group=mesh.get_group())
    return x


FORMS = pytest.mark.parametrize("reduce", [over_a_mesh, over_a_dimension, in_place, in_place_over_a_mesh])


@pytest.fixture
def on_one_rank():
    with distributed_config.patch(compile_on_one_rank=True):
        yield


def two_sites(reduce):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))

    def function(x, residual, weight):
        residual = residual + reduce(x, mesh)
        return hf_norm(residual + reduce(hf_norm(residual, weight) * 2.0, mesh), weight)

    return function, (values(8, H), values(8, H), values(H))


@FORMS
def test_the_group_of_all_ranks_is_a_site(reduce, on_one_rank):
    function, inputs = two_sites(reduce)
    rewritten = rewrite(function, *inputs, mode="weave")
    assert [site.group for site in rewritten.report.sites] == [dist.group.WORLD.group_name] * 2
    rewritten.check()


@FORMS
def test_a_smaller_group_is_refused(reduce, on_one_rank, monkeypatch):
    function, inputs = two_sites(reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2 if group else 4)
    report = rewrite(function, *inputs).report
    assert [refusal.reason for refusal in report.refusals] == [
        "compile_on_one_rank: its group has only some of the ranks, and its name differs between ranks"
    ] * 2


@pytest.mark.one_in(3)
@pytest.mark.parametrize("style, sites", [("dtensor", 5), ("dtensor_sequence", 0)])
@pytest.mark.parametrize("mode", ["auto", "off"])
def test_dtensor(style, sites, mode, on_one_rank):
    model, ids = parallel(style, dtype=torch.float32), torch.randint(VOCAB // 2, (1, 16))
    options = {"tokenweave.mode": mode, "tokenweave.min_tokens": 4}
    with without_codegen(), torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend.tokenweave, options=options)(ids), model(ids), rtol=1e-4, atol=1e-4)
    report = tw_compile.reports()[-1]
    assert (len(report.sites), len(report.refusals)) == (sites, 5 - sites)
