"""unshard: a reduce-scatter, an add and norm of a shard and an all-gather are the site that an all-reduce begins."""

import expecttest
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from graphs import capture, rewrite, text, without_codegen
from models import all_gather, parallel
from sites import NORMS, H, hf_norm, torch_norm, values
from test_ranks import check, error_of, run  # noqa: F401  # run is a fixture
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import tw_compile
from tw_compile import backend, ops
from tw_compile.passes import find, unshard
from tw_compile.passes.find import Match
from tw_compile.passes.graph_utils import arguments, c10d

pytestmark = pytest.mark.usefixtures("world")

SCATTER, GATHER = c10d.reduce_scatter_tensor.default, c10d.all_gather_into_tensor.default


def scatter(x, dim=0, op="sum", group=None):
    return funcol.reduce_scatter_tensor(x, op, dim, group or dist.group.WORLD)


def gather(x, dim=0, group=None):
    return all_gather(x, dim, group or dist.group.WORLD)


def two_sites(x, weight, up, norm=torch_norm, dim=0):
    residual = scatter(x, dim)
    residual = residual + scatter(gather(norm(residual, weight), dim) @ up, dim)
    return gather(norm(residual, weight), dim)


def inputs(*shape, dtype=torch.float32):
    return values(*shape, H, dtype=dtype), values(H, dtype=dtype), values(H, H, dtype=dtype)




# --- what becomes a site ---------------------------------------------------------------------------------------------


class Snapshot(expecttest.TestCase):
    def test_two_sites(self):
        graph = capture(two_sites, *inputs(8))
        self.assertExpectedInline(text(graph, "x weight up"), """\
%0 = _c10d_functional.reduce_scatter_tensor(x, sum, 2, 0) : f32[4, 16]
%1 = _c10d_functional.wait_tensor(%0) : f32[4, 16]
%2 = aten.pow.Tensor_Scalar(%1, 2) : f32[4, 16]
%3 = aten.mean.dim(%2, [1], True) : f32[4, 1]
%4 = aten.add.Scalar(%3, 1e-05) : f32[4, 1]
%5 = aten.rsqrt(%4) : f32[4, 1]
%6 = aten.mul.Tensor(%1, %5) : f32[4, 16]
%7 = aten.mul.Tensor(%6, weight) : f32[4, 16]
%8 = _c10d_functional.all_gather_into_tensor(%7, 2, 0) : f32[8, 16]
%9 = _c10d_functional.wait_tensor(%8) : f32[8, 16]
%10 = aten.mm(%9, up) : f32[8, 16]
%11 = _c10d_functional.reduce_scatter_tensor(%10, sum, 2, 0) : f32[4, 16]
%12 = _c10d_functional.wait_tensor(%11) : f32[4, 16]
%13 = aten.add.Tensor(%1, %12) : f32[4, 16]
%14 = aten.pow.Tensor_Scalar(%13, 2) : f32[4, 16]
%15 = aten.mean.dim(%14, [1], True) : f32[4, 1]
%16 = aten.add.Scalar(%15, 1e-05) : f32[4, 1]
%17 = aten.rsqrt(%16) : f32[4, 1]
%18 = aten.mul.Tensor(%13, %17) : f32[4, 16]
%19 = aten.mul.Tensor(%18, weight) : f32[4, 16]
%20 = _c10d_functional.all_gather_into_tensor(%19, 2, 0) : f32[8, 16]
%21 = _c10d_functional.wait_tensor(%20) : f32[8, 16]
return %21
""")
        new, refusals = unshard(graph)
        assert not refusals
        self.assertExpectedInline(text(new, "x weight up"), """\
%0 = _c10d_functional.all_reduce(x, sum, 0) : f32[8, 16]
%1 = _c10d_functional.wait_tensor(%0) : f32[8, 16]
%2 = aten.pow.Tensor_Scalar(%1, 2) : f32[8, 16]
%3 = aten.mean.dim(%2, [1], True) : f32[8, 1]
%4 = aten.add.Scalar(%3, 1e-05) : f32[8, 1]
%5 = aten.rsqrt(%4) : f32[8, 1]
%6 = aten.mul.Tensor(%1, %5) : f32[8, 16]
%7 = aten.mul.Tensor(%6, weight) : f32[8, 16]
%8 = aten.mm(%7, up) : f32[8, 16]
%9 = _c10d_functional.all_reduce(%8, sum, 0) : f32[8, 16]
%10 = _c10d_functional.wait_tensor(%9) : f32[8, 16]
%11 = aten.add.Tensor(%1, %10) : f32[8, 16]
%12 = aten.pow.Tensor_Scalar(%11, 2) : f32[8, 16]
%13 = aten.mean.dim(%12, [1], True) : f32[8, 1]
%14 = aten.add.Scalar(%13, 1e-05) : f32[8, 1]
%15 = aten.rsqrt(%14) : f32[8, 1]
%16 = aten.mul.Tensor(%11, %15) : f32[8, 16]
%17 = aten.mul.Tensor(%16, weight) : f32[8, 16]
return %17
""")

    def test_a_shard_that_comes_from_elsewhere_and_one_that_goes_elsewhere(self):
        def block(x, residual, weight):
            residual = residual + scatter(x, 1)
            return gather(hf_norm(residual, weight), 1), residual

        graph, _ = unshard(capture(block, values(3, 8, H), values(3, 4, H), values(H)))
        self.assertExpectedInline(text(graph, "x residual weight"), """\
%0 = _c10d_functional.all_gather_into_tensor(residual, 2, 0) : f32[6, 4, 16]
%1 = _c10d_functional.wait_tensor(%0) : f32[6, 4, 16]
%2 = aten.split.Tensor(%1, 3) : (f32[3, 4, 16], f32[3, 4, 16])
%3 = getitem(%2, 0) : f32[3, 4, 16]
%4 = getitem(%2, 1) : f32[3, 4, 16]
%5 = aten.cat([%3, %4], 1) : f32[3, 8, 16]
%6 = _c10d_functional.all_reduce(x, sum, 0) : f32[3, 8, 16]
%7 = _c10d_functional.wait_tensor(%6) : f32[3, 8, 16]
%8 = aten.add.Tensor(%5, %7) : f32[3, 8, 16]
%9 = aten.pow.Tensor_Scalar(%8, 2) : f32[3, 8, 16]
%10 = aten.mean.dim(%9, [-1], True) : f32[3, 8, 1]
%11 = aten.add.Tensor(%10, 1e-05) : f32[3, 8, 1]
%12 = aten.rsqrt(%11) : f32[3, 8, 1]
%13 = aten.mul.Tensor(%8, %12) : f32[3, 8, 16]
%14 = aten.mul.Tensor(weight, %13) : f32[3, 8, 16]
%15 = aten.slice.Tensor(%8, 1, 0, 4) : f32[3, 4, 16]
return %14, %15
""")


def sites_in(function, *inputs, dynamic=False):
    """(number of sites, why other reduce-scatters are none, the new graph). That each is one or the other is part of it."""
    graph = capture(function, *inputs, dynamic=dynamic)
    names = " ".join(f"i{i}" for i in range(9))
    before = text(graph, names)
    new, refusals = unshard(graph)
    assert text(graph, names) == before, "unshard changes nothing"
    found = find(new)
    assert all(isinstance(f, Match) for f in found)
    left = [str(node) for node in new.find_nodes(op="call_function", target=SCATTER)]
    assert left == [refusal.all_reduce for refusal in refusals if refusal.all_reduce in left]
    return len(found), [refusal.reason for refusal in refusals], new


def count(graph, op):
    return len(graph.find_nodes(op="call_function", target=op))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("shape, dim", [((8,), 0), ((1, 8), 1), ((3, 8), 1), ((8, 3), 0)], ids=str)
def test_sites_in_every_layout(shape, dim, dynamic):
    def block(*inputs):
        return two_sites(*inputs, norm=hf_norm, dim=dim)

    found, refusals, new = sites_in(block, *inputs(*shape, dtype=torch.bfloat16), dynamic=dynamic)
    assert (found, refusals, count(new, GATHER)) == (2, [], 0)


def test_a_norm_that_is_gathered_more_than_once():
    def block(x, weight, up):
        normed = torch_norm(scatter(x, 1), weight)
        return gather(normed, 1) @ up, gather(normed, 1) + 1

    found, refusals, new = sites_in(block, *inputs(3, 8))
    assert (found, refusals, count(new, GATHER)) == (1, [], 0)


def test_a_reshape_a_bias_and_a_factor_in_a_shard():
    def block(x, bias, residual, weight):
        residual = residual + (scatter(x).view(1, 4, H) + bias) * 0.5
        return gather(hf_norm(residual, weight).view(4, H))

    found, refusals, new = sites_in(block, values(8, H), values(H), values(1, 4, H), values(H))
    assert (found, refusals, count(new, GATHER)) == (1, [], 1)  # the residual


def test_parts_that_are_slices():
    def block(x, weight):
        parts = torch.cat((x[:, :4], x[:, 4:]))
        both = gather(hf_norm(scatter(parts), weight))
        return torch.cat((both[:3], both[3:]), 1)

    graph = sites_in(block, values(3, 8, H), values(H))[2]
    assert [count(graph, op) for op in (SCATTER, GATHER, torch.ops.aten.cat.default)] == [0, 0, 0]


def test_collectives_in_place():
    def block(x, residual, weight):
        shard, whole = torch.empty_like(residual), torch.empty_like(x)
        dist.reduce_scatter_tensor(shard, x)
        dist.all_gather_into_tensor(whole, hf_norm(residual + shard, weight))
        return whole

    assert sites_in(block, values(8, H), values(4, H), values(H))[:2] == (1, [])


def test_a_site_after_one_that_is_refused():
    def block(x, y, weight):
        residual = scatter(x)
        residual = residual + scatter(y * hf_norm(residual, weight).sum())
        return gather(hf_norm(residual, weight))

    found, refusals, new = sites_in(block, values(8, H), values(8, H), values(H))
    assert (found, refusals) == (1, ["no all-gather of the norm follows"])
    assert count(new, SCATTER) == count(new, GATHER) == 1  # the residual


# --- what does not ---------------------------------------------------------------------------------------------------


def refused(reason, function, *inputs):
    assert sites_in(function, *inputs)[:2] == (0, [reason])


def test_refused_other_reduce_op():
    refused("reduce op 'avg', not 'sum'", lambda x, w: gather(hf_norm(scatter(x, op="avg"), w)), values(8, H), values(H))


def test_refused_no_norm():
    refused("no RMSNorm or LayerNorm follows", lambda x, r: gather(r + scatter(x)), values(8, H), values(4, H))


def test_refused_a_norm_that_stays_a_shard():
    refused("no all-gather of the norm follows", lambda x, w: hf_norm(scatter(x), w), values(8, H), values(H))


def test_refused_a_norm_that_is_changed_before_it_is_gathered():
    refused("no all-gather of the norm follows", lambda x, w: gather(hf_norm(scatter(x), w).relu()), values(8, H), values(H))


@pytest.mark.parametrize("to", [0, 2])
def test_refused_gathered_along_another_dimension(to):
    refused(
        "the norm is not gathered along the dimension that is scattered, 1",
        lambda x, w: gather(hf_norm(scatter(x, 1), w), to),
        values(3, 8, H), values(H),
    )  # fmt: skip


def test_refused_gathered_over_another_group():
    other = dist.new_group([0, 1])
    refused(
        f"the sum is scattered over group {dist.group.WORLD.group_name}, the norm gathered over group {other.group_name}",
        lambda x, w: gather(hf_norm(scatter(x), w), group=other),
        values(8, H), values(H),
    )  # fmt: skip


def test_refused_parts_of_rows():
    refused(
        "it scatters dimension 1, which the norm reduces",
        lambda x, w: gather(hf_norm(scatter(x, 1), w), 1),
        values(8, 2 * H), values(H),
    )  # fmt: skip


def test_refused_a_reshape_that_mixes_the_rows_of_ranks():
    refused(
        "aten.reshape.default is between reduce-scatter and all-gather: its token-axis rule does not cover this use",
        lambda x, w: gather(hf_norm(scatter(x, 1).view(12, H), w)),
        values(3, 8, H), values(H),
    )  # fmt: skip


def test_refused_first_of_one_norm():
    def block(x, y, w):
        return gather(hf_norm(scatter(x) + scatter(y), w))

    found, refusals, _ = sites_in(block, values(8, H), values(8, H), values(H))
    assert (found, refusals) == (1, ["its residual add or norm depends on reduce_scatter_tensor_1, a later collective"])


def test_refused_several_at_once():
    def block(x, y, weight):
        shards = funcol.reduce_scatter_tensor_coalesced([x, y], "sum", [0, 0], dist.group.WORLD)
        return gather(hf_norm(shards[0] + shards[1], weight))

    refused("reduce_scatter_tensor_coalesced reduces several tensors at once", block, values(8, H), values(8, H), values(H))


def test_refused_inside_a_branch():
    def block(x, weight):
        return torch.cond(x.sum() > 0, lambda x: gather(hf_norm(scatter(x), weight)), lambda x: x.sin(), (x,))

    found, (reason,), _ = sites_in(block, values(8, H), values(H))
    assert found == 0 and reason.startswith("inside ") and reason.endswith(", the graph of a higher-order op")


@pytest.mark.parametrize("dim", [0, 1])
def test_refused_rows_that_do_not_divide_by_the_ranks(dim):
    """On this rank, the first, nothing is to be seen of it in what follows the reduce-scatter. On the last one there is."""
    mesh = init_device_mesh("cpu", (2,))

    def block(x, weight):
        shard = DTensor.from_local(x, mesh, [Partial()]).redistribute(mesh, [Shard(dim)])
        normed = DTensor.from_local(hf_norm(shard.to_local(), weight), mesh, [Shard(dim)], shape=x.shape, stride=x.stride())
        return normed.redistribute(mesh, [Replicate()]).to_local()

    shape = [3, 3, H]
    shape[dim] = 7
    refused("its number of rows is not a multiple of the number of ranks, 2", block, values(*shape), values(H))


# --- what is done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "fuse", "weave"])
def test_a_block_in_every_mode(mode):
    new = rewrite(two_sites, *inputs(8), mode=mode)
    assert new.report.mode == mode and len(new.report.sites) == 2 and not new.report.joins
    counts = {"off": [0, 0, 2], "fuse": [2, 0, 0], "weave": [0, 4, 0]}
    assert [new.count(op) for op in (ops.fused, ops.start, SCATTER)] == counts[mode]
    if mode == "off":
        assert text(new.after, "x weight up") == text(new.before, "x weight up")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("style, batch, dynamic", [("dtensor_sequence", 1, False), ("functional_sequence", 4, True)])
def test_the_residual_stays_with_its_ranks(style, batch, dynamic):
    """From site to site it is in the workspace, each rank having its own rows: the layout that the model asked for."""
    ids = torch.zeros(batch, 8, dtype=torch.long)
    new = rewrite(parallel(style, 1), ids, mode="weave", symmetric=True, dynamic=dynamic)
    waits = new.after.find_nodes(op="call_function", target=ops.wait)
    assert len(waits) == 2 * 3 and not new.report.joins and not new.report.refusals
    assert all(arguments(node)["sharded_residual"] for node in waits)


# --- on real ranks ---------------------------------------------------------------------------------------------------


def many_uses(x, residual, weight, up, norm, dim):
    """Two sites, the first with a residual from elsewhere; totals and norms also go elsewhere, as shards."""
    first = residual + scatter(x, dim)
    normed = norm(first, weight)
    second = first + scatter(gather(normed, dim) @ up, dim)
    return gather(norm(second, weight), dim), gather(normed, dim).sin(), first.cos(), second, normed


def compare(mode, norm, dynamic):
    """On a rank: the block in every layout, compiled and not. Returns (mode, sites, refusals) of each, and the wholes."""
    done, wholes = [], []
    for batch in (), (1,), (3,):
        torch._dynamo.reset()
        dim, world = len(batch), dist.get_world_size()
        torch.manual_seed(9)
        weight, up = values(H), values(H, H)
        torch.manual_seed(dist.get_rank())

        def block(*inputs):
            return many_uses(*inputs, norm=NORMS[norm], dim=dim)

        with torch.no_grad(), without_codegen():
            compiled = torch.compile(block, backend=backend.tokenweave, dynamic=dynamic, options={"tokenweave.mode": mode})
            given = values(*batch, 4 * world, H), values(*batch, 4, H), weight, up
            for tensor in given:
                torch._dynamo.mark_static(tensor, tensor.dim() - 1)
            out = compiled(*given)
            torch.testing.assert_close(out, block(*given), rtol=1e-4, atol=1e-4)
        report = tw_compile.reports()[-1]
        done.append((report.mode, len(report.sites), len(report.refusals)))
        wholes.append(out[0])
    return done, wholes


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode, norm, dynamic", [("weave", "hf", False), ("weave", "torch", True), ("fuse", "torch", False)])
def test_blocks_on_two_ranks(ranks, mode, norm, dynamic):
    (done, wholes), (_, others) = ranks(compare, mode, norm, dynamic)
    assert done == [(mode, 2, 0)] * 3
    torch.testing.assert_close(wholes, others, rtol=0, atol=0)


@pytest.mark.full
def test_blocks_on_four_ranks(four_ranks):
    assert [done for done, _ in four_ranks(compare, "weave", "torch", False)] == [[("weave", 2, 0)] * 3] * 4


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm, batch", [("hf", 1), ("torch", 4)])
def test_llama(run, norm, batch):  # noqa: F811
    check(run, "dtensor_sequence", norm, False, batch, codegen=False)


@pytest.mark.full
def test_llama_fused_only(run):  # noqa: F811
    (error, out, report, order), (_, other, _, _) = run("dtensor_sequence", "hf", False, 1, False, "fuse")
    assert (report.mode, len(report.sites), report.refusals, order) == ("fuse", 5, [], "")
    assert error <= 1.1 * error_of(run, "dtensor_sequence", "hf", False, 1, False, "off")
    assert torch.equal(out, other)
