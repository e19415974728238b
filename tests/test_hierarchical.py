"""A group across hosts: four ranks, which are named to be on two hosts of two."""

import pytest
import torch
import torch.distributed as dist
from graphs import without_codegen
from test_low_bit_ranks import CPU, ERRORS, Block, H

import tw_compile
from tw_compile import TokenWeaveError, backend, context
from tw_compile.site import WITHOUT_NORM, Site, add_norm
from tw_compile.transports import choose, hierarchical, link


def named(patch, hosts):
    patch.setenv(link.HOST_NAME, hosts[dist.get_rank()])
    patch.setattr(choose, "chosen", {})
    patch.setattr(hierarchical, "_levels", KNOWN.setdefault(hosts, {}))


KNOWN = {}  # hosts -> the groups of a rank, which are made once


def chain(hosts, bits, shape, dtype, center, how):
    """Four sites in a row on a rank: (norms and the last residual, the largest relative error of the norms, the transport's name)."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name
    with pytest.MonkeyPatch.context() as patch:
        named(patch, hosts)
        transport = hierarchical.Hierarchical(group, CPU, bits)
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    weight, shift = draw(1, H), draw(2, H) if center else None
    numerics = [(weight, None, shift, 1e-5, 1.0, 0.0, center)] * 3 + [(None, None, None, WITHOUT_NORM, 1.0, 0.0, False)]
    xs = [[draw(10 * i + r, *shape, H).to(dtype) for r in range(world)] for i in range(1, 5)]
    residual = right = draw(3, *shape, H).to(dtype)
    norms, errors = [], []
    with transport.call():
        for i, x in enumerate(xs):
            carried = i < 2  # the last ones are whole
            site = Site(x[rank], residual, *numerics[i], 0, i % 2, i, carried, carried)
            if how == "fuse":
                norm, residual = transport.fused(site, False)
            else:
                transport.start(site)
                norm, residual = transport.wait(i % 2, False)
            wanted, right = add_norm(sum(each.double() for each in x).float(), right, *numerics[i])
            norms.append(norm)
            errors.append(((norm.float() - wanted).norm() / wanted.norm().clamp_min(1e-9)).item())
    return [*norms, residual], max(errors), transport.name


@pytest.mark.one_in(5)
@pytest.mark.parametrize("hosts, bits, shape, dtype, center, how", [
    ("aabb", 16, (2, 17), torch.bfloat16, False, "fuse"), ("abab", 16, (5,), torch.float32, True, "weave"),
    ("aabb", 16, (1,), torch.float16, False, "weave"), ("abab", 16, (64,), torch.bfloat16, False, "weave"),
    ("aabb", 8, (33,), torch.bfloat16, True, "weave"), ("abab", 6, (2, 8), torch.bfloat16, False, "fuse"),
    ("aabb", 4, (3,), torch.bfloat16, False, "fuse"), ("aabb", 8, (0,), torch.bfloat16, False, "weave"),
])  # fmt: skip
def test_sites(four_ranks, hosts, bits, shape, dtype, center, how):
    """Also fewer tokens than ranks, and none."""
    first, *others = four_ranks(chain, hosts, bits, shape, dtype, center, how)
    results, error, name = first
    assert name == ("hierarchical" if bits == 16 else f"hierarchical:{bits}")
    assert error <= (ERRORS[bits] if bits < 16 else 1e-5 if dtype == torch.float32 else 0.01)
    assert all(result.dtype == dtype and result.shape == (*shape, H) for result in results)
    for theirs, _, _ in others:
        assert all(map(torch.equal, results, theirs)), "the ranks have the same bits"


def forward(hosts, options):
    """On a rank: (the results of a model, their error, the report)."""
    torch._dynamo.reset()
    model, whole = Block(dist.get_rank(), dist.get_world_size()).bfloat16(), Block().double()
    x = torch.randn(1, 40, H, generator=torch.Generator().manual_seed(1)).bfloat16()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), without_codegen():
        context._contexts.clear()
        named(patch, hosts)
        out = torch.compile(model, backend=backend.tokenweave, options=options)(x)
        right = whole(x.double())
    return out, ((out.double() - right).norm() / right.norm()).item(), tw_compile.reports()[-1]


@pytest.mark.slow
@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode, bits", [("weave", "auto"), ("auto", 8)])
def test_a_model(four_ranks, mode, bits):
    options = {"tokenweave.mode": mode, "tokenweave.transport": "hierarchical", "tokenweave.wire": bits}
    (out, error, report), *others = four_ranks(forward, "aabb", options)
    assert report.transport == ("hierarchical" if bits == "auto" else "hierarchical:8")
    assert report.mode == ("weave" if mode == "weave" else "fuse") and not report.refusals
    assert error < (0.01 if bits == "auto" else ERRORS[8])
    assert all(torch.equal(out, theirs) for theirs, _, _ in others), "the ranks have the same bits"


def chosen(hosts, requested):
    with pytest.MonkeyPatch.context() as patch:
        named(patch, hosts)
        try:
            transport, why_not = choose.choose(requested, dist.group.WORLD.group_name, CPU)
        except TokenWeaveError as error:
            return str(error)
        return transport.name, why_not


def test_groups_that_have_no_hierarchy(four_ranks):
    for hosts, reason in (
        ("aaaa", "all ranks of the group are on one host"),
        ("abcd", "the group has one rank on each of its hosts"),
        ("aaab", "the group has different numbers of ranks on its hosts: 3 + 1"),
    ):
        said = f"option 'tokenweave.transport' is 'hierarchical', which is not possible here: hierarchical: {reason}"
        assert four_ranks(chosen, hosts, "hierarchical") == [said] * 4


def test_nothing_is_measured_on_a_cpu(four_ranks):
    why = "multimem: it needs NVIDIA GPUs; peer: it needs NVIDIA GPUs"
    assert four_ranks(chosen, "aabb", "auto") == [("process_group", why)] * 4


def test_a_group_of_two_has_none(world):
    with pytest.raises(TokenWeaveError, match="hierarchical: it needs two hosts with two ranks each, and the group has 2 ranks"):
        choose.choose("hierarchical", world.group_name, CPU)


# --- on GPUs: which transport it is compared with ---------------------------------------------------------------------


def agreed(hosts):
    """What all ranks of GPUs could use, and why not the others."""
    with pytest.MonkeyPatch.context() as patch:
        named(patch, hosts)
        return choose._agree(dist.group.WORLD.group_name, ["peer", "hierarchical", "process_group"], {})


def test_it_is_a_candidate_where_a_group_spans_hosts(four_ranks):
    apart = "the ranks of the group are not all on one host: rank 2 is not where rank 0 is"
    assert four_ranks(agreed, "aabb") == [(["hierarchical", "process_group"], {"peer": apart})] * 4
    assert four_ranks(agreed, "aaaa") == [(["peer", "process_group"], {})] * 4
    usable, reasons = four_ranks(agreed, "aaab")[0]
    assert usable == ["process_group"] and [*reasons] == ["peer", "hierarchical"]
