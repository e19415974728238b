"""The wire in 8, 6 or 4 bits between real ranks: its error, its bits, and when 16 bits are sent."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import without_codegen

import tw_compile
from tw_compile import TokenWeaveError, backend, context
from tw_compile.site import Site, add_norm
from tw_compile.transports import choose, link
from tw_compile.transports.low_bit import codec, threshold
from tw_compile.transports.low_bit.transport import LowBit

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import accuracy

CPU, H, INNER, LAYERS = torch.device("cpu"), 128, 64, 2
# Largest relative error of the norms behind three sites.
ERRORS = {8: 0.02, 6: 0.15, 4: 0.2}


def chain(bits, shape, dtype, center, how):
    """Three sites in a row on a rank: (norms, the last residual, the same in float64, the largest relative error of the norms)."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD.group_name
    transport, _ = choose.choose(f"process_group:{bits}", group, CPU)
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    weight, shift = draw(1, H), draw(2, H) if center else None
    numerics = weight, None, shift, 1e-5, 1.0, 0.0, center
    xs = [[draw(10 * i + r, *shape, H).to(dtype) for r in range(world)] for i in (1, 2, 3)]
    residual = right = draw(3, *shape, H).to(dtype)
    norms, errors = [], []
    with transport.call():
        for i, x in enumerate(xs):
            carried = i < 2
            site = Site(x[rank], residual, *numerics, 0, i % 2, i, carried, carried)
            if how == "fuse":
                norm, residual = transport.fused(site, False)
            else:
                transport.start(site)
                norm, residual = transport.wait(i % 2, False)
            wanted, right = add_norm(sum(each.double() for each in x).float(), right, *numerics)
            norms.append(norm)
            errors.append(((norm.float() - wanted).norm() / wanted.norm().clamp_min(1e-9)).item())
    return norms, residual, right, max(errors)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("bits, shape, dtype, center, how", [
    (8, (2, 17), torch.bfloat16, False, "fuse"), (8, (5,), torch.float32, True, "weave"), (8, (33,), torch.float16, False, "fuse"),
    (6, (3, 7), torch.bfloat16, True, "fuse"), (4, (19,), torch.bfloat16, False, "weave"), (4, (1,), torch.bfloat16, False, "fuse"),
    (8, (1, 3), torch.bfloat16, False, "weave"), (4, (0,), torch.bfloat16, False, "weave"),
])  # fmt: skip
@pytest.mark.parametrize("world", (2, 4))
def test_sites(request, bits, shape, dtype, center, how, world):
    """Also fewer tokens than ranks, and none."""
    results = request.getfixturevalue("ranks" if world == 2 else "four_ranks")(chain, bits, shape, dtype, center, how)
    for norms, residual, right, error in results:
        assert error <= ERRORS[bits]
        assert residual.dtype == dtype, "the last one is whole"
        for ours, theirs in zip([*norms, residual], [*results[0][0], results[0][1]]):
            assert torch.equal(ours, theirs), "the ranks have the same bits"
        if residual.numel():
            assert (residual.float() - right).norm() / right.norm() < ERRORS[bits]


def test_more_bits_are_more_exact(ranks):
    errors = {bits: ranks(chain, bits, (64,), torch.bfloat16, False, "fuse")[0][3] for bits in (4, 6, 8)}
    assert 3 * errors[8] < errors[6] < 0.6 * errors[4]


def of_the_benchmark(bits):
    """Whether a site of benchmarks/accuracy.py, which computes all ranks in one process, is that of the ranks."""
    transport, _ = choose.choose(f"process_group:{bits}", dist.group.WORLD.group_name, CPU)
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    xs, residual, weight = [draw(i, 5, H).bfloat16() for i in range(dist.get_world_size())], draw(8, 5, H).bfloat16(), draw(9, H)
    ours, _ = transport.fused(Site(xs[dist.get_rank()], residual, weight, fp32_residual=True, sharded_residual=True), False)
    return torch.equal(ours, accuracy.of_wire(bits)(xs, residual, weight)[0])


def test_whole_numbers_are_closer_than_e4m3():
    """Why a wire of 8 bits has whole numbers: the errors of normal values, and with a large value in each group."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    spiked = x.clone()
    spiked[:, ::128] *= 10
    for values, times in ((x, 3), (spiked, 1)):
        packed = torch.empty_like(values)
        codec.unpack(codec.pack(values, len(values), 8), packed, 8)
        assert (accuracy.in_fp8(values) - values).norm() > times * (packed - values).norm() > 0


def test_the_benchmark_of_accuracy_computes_what_ranks_do(ranks):
    for bits in (8, 6, 4):
        assert ranks(of_the_benchmark, bits) == [True, True]


def not_finite(bits):
    """A NaN of one rank, and an infinity of another: whether the norm is NaN, by token."""
    transport, _ = choose.choose(f"process_group:{bits}", dist.group.WORLD.group_name, CPU)
    x = torch.ones(6, H, dtype=torch.bfloat16)
    x[1 if dist.get_rank() else 4, 7] = torch.nan if dist.get_rank() else torch.inf
    return transport.fused(Site(x), False)[0].isnan().all(-1).tolist()


@pytest.mark.parametrize("bits", (8, 4))
def test_a_row_that_is_not_finite_is_nan_on_all_ranks(ranks, bits):
    assert ranks(not_finite, bits) == [[False, True, False, False, True, False]] * 2


def self_tested(bits, wrong):
    """What the self-test says. wrong: whether rank 1 unpacks wrongly"""
    unpack = codec.unpack
    with pytest.MonkeyPatch.context() as patch:
        if wrong and dist.get_rank() == 1:
            patch.setattr(codec, "unpack", lambda packed, out, bits: unpack(packed.roll(1, -1), out, bits))
        return choose.self_tested(f"process_group:{bits}", dist.group.WORLD.group_name, CPU)[1]


def test_the_self_test_of_a_wire(ranks):
    assert ranks(self_tested, 4, False) == [None, None]
    for said in ranks(self_tested, 4, True):
        assert said.startswith("its self-test failed: the ") and said.endswith((" on rank 0", " on rank 1"))


# --- through the backend ----------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Layers of a row-parallel MLP; a whole one where ``ranks`` is None."""

    def __init__(self, rank=None, ranks=None, hidden=H, norm=F.rms_norm):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.hidden, self.norm, self.group = hidden, norm, dist.group.WORLD if ranks else None
        for i in range(LAYERS):
            up, down = (torch.randn(*shape, generator=generator) / shape[1] ** 0.5 for shape in ((INNER, hidden), (hidden, INNER)))
            part = slice(None) if ranks is None else slice(rank * INNER // ranks, (rank + 1) * INNER // ranks)
            self.register_buffer(f"up{i}", up[part].contiguous())
            self.register_buffer(f"down{i}", down[:, part].contiguous())

    def forward(self, x):
        norm = self.norm(x, (self.hidden,))
        for i in range(LAYERS):
            y = F.linear(F.silu(F.linear(norm, getattr(self, f"up{i}"))), getattr(self, f"down{i}"))
            if self.group is not None:
                dist.all_reduce(y, group=self.group)
            x = x + y
            norm = self.norm(x, (self.hidden,))
        return norm


def forward(options, sizes, hidden=H, dtype=torch.bfloat16, least=0):
    """On a rank: the results for each size, the largest error, and the reports. least: ``LowBit.least_bytes``"""
    torch._dynamo.reset()
    before = len(tw_compile.reports())
    if least:
        context.of(dist.group.WORLD.group_name)  # else made by the first compilation, which drops older transports of the group's name
        choose.choose(f"auto:{options['tokenweave.wire']}", dist.group.WORLD.group_name, CPU)[0].least_bytes = least
    rank, world = dist.get_rank(), dist.get_world_size()
    model, whole = Block(rank, world, hidden).to(dtype), Block(hidden=hidden).double()
    results, errors = [], []
    with torch.no_grad(), without_codegen():
        compiled = torch.compile(model, backend=backend.tokenweave, options=options, dynamic=len(sizes) > 1)
        for shape in sizes:
            x = torch.randn(*shape, hidden, generator=torch.Generator().manual_seed(shape[-1])).to(dtype)
            results.append(compiled(x))
            right = whole(x.double())
            errors.append(((results[-1].double() - right).norm() / right.norm()).item())
    choose.chosen.clear()
    return results, max(errors), tw_compile.reports()[before:]


@pytest.mark.parametrize("mode, bits", [("fuse", 8), ("weave", 6)])
def test_a_model(ranks, mode, bits):
    first, second = ranks(forward, {"tokenweave.mode": mode, "tokenweave.wire": bits}, [(1, 40)])
    (results, error, (report,)), (others, _, _) = first, second
    assert (report.mode, report.transport, report.packed) == (mode, f"process_group:{bits}", LAYERS)
    assert not report.refusals and not report.joins
    assert error < ERRORS[bits]
    assert torch.equal(results[0], others[0]), "the ranks have the same bits"


def test_the_report(ranks):
    (_, _, (report,)), _ = ranks(forward, {"tokenweave.wire": 4, "tokenweave.mode": "fuse"}, [(1, 40)])
    assert_expected_inline("\n".join(str(report).splitlines()[:3]), """\
tokenweave: fuse (requested: mode=fuse, wire=4), transport process_group:4
  2 sites, 0 refused, 0 unsplit ops
  wire: 4 bits, 0.2 KB from each rank for a token; 0.5 with 16, 0.3 with 8, 0.2 with 6""")


def test_small_calls_are_sent_in_16_bits(ranks):
    """The threshold is no guard of Dynamo's. Below it the graph has PyTorch's own all-reduces."""
    sizes, options = [(1, 48), (1, 31), (1, 7), (1, 32)], {"tokenweave.wire": 8, "tokenweave.mode": "fuse"}
    results = ranks(forward, options, sizes, H, torch.bfloat16, 32 * H * 2)
    for outputs, error, reports in results:
        assert [report.packed for report in reports] == [LAYERS, 0]
        assert "16 bits: 8 bits are faster here from 8 KB of partial sums on" in reports[1].reasons
        assert error < ERRORS[8]
        assert all(map(torch.equal, outputs, results[0][0]))


@pytest.mark.parametrize("hidden, dtype, bits, reason", [
    (192, torch.bfloat16, 8, "16 bits: a hidden size of 192 is not a multiple of 128"),
    (128, torch.float32, 4, "32 bits: a float32 model is not sent in 4 bits: use a wire of 8, or a model in bfloat16"),
])  # fmt: skip
def test_a_site_that_is_sent_in_16_bits_says_why(ranks, hidden, dtype, bits, reason):
    for _, error, (report,) in ranks(forward, {"tokenweave.wire": bits}, [(1, 8)], hidden, dtype):
        assert report.packed == 0 and reason in report.reasons and error < 0.01


def differ():
    try:
        forward({"tokenweave.wire": (8, 4)[dist.get_rank()]}, [(1, 8)])
    except Exception as error:
        return str(error)


def test_ranks_with_different_wires(ranks):
    for message in ranks(differ):
        assert "have different options: rank 0: wire=8; rank 1: wire=4" in message


@pytest.mark.parametrize("wire", (5, 7, "8", 8.0, True, None), ids=repr)
def test_a_bad_wire(wire):
    with pytest.raises(TokenWeaveError) as raised:
        backend.parse({"tokenweave.wire": wire})
    assert str(raised.value) == f"option 'tokenweave.wire' is {wire!r}; it takes one of 'auto', 16, 8, 6, 4"


def test_a_wire_over_peer_memory():
    with pytest.raises(TokenWeaveError, match="wire' is 8, but 'tokenweave.transport' is 'peer', which sends values in the model's dtype"):
        backend.parse({"tokenweave.wire": 8, "tokenweave.transport": "peer"})
    backend.parse({"tokenweave.wire": 16, "tokenweave.transport": "peer"})


# --- the threshold and the link ---------------------------------------------------------------------------------------


def test_the_threshold_is_where_it_is_always_faster():
    sizes = len(threshold.TOKENS)
    whole = [float(n) for n in threshold.TOKENS]
    assert threshold.by_times(whole, [0.5 * n for n in whole]) == threshold.TOKENS[0] * 8192
    assert threshold.by_times(whole, [*whole[:-1], 0.5 * whole[-1]]) == threshold.TOKENS[-1] * 8192
    assert threshold.by_times(whole, [0.5 * whole[0], *whole[1:]]) is None
    assert threshold.by_times(whole, [0.99 * n for n in whole]) is None, f"noise, at all {sizes} sizes"


def settled(seconds, kept, folder, poor=()):
    """The threshold that the ranks settle on, from these times and records. poor: ranks without memory"""
    rank, group = dist.get_rank(), dist.group.WORLD.group_name
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TW_COMPILE_CACHE_DIR", f"{folder}/{rank}")
        patch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        of = lambda transport, weight, tokens, *_: seconds[rank][isinstance(transport, LowBit)] * tokens  # noqa: E731
        patch.setattr(threshold, "seconds_of_call", of)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: ((1 << 20 if rank in poor else 1 << 40), 1 << 40))
        transport = LowBit(group, CPU, 8)
        if kept[rank]:
            key = {"transport": transport.name, "wire": 8, "link": "slow", "gpu": "GPU", "ranks": 2, "version": threshold.agree.version()}
            threshold.records.write("wire", key, kept[rank])
        return threshold.least_bytes(transport, "slow")


def test_the_slowest_rank_decides_the_threshold(ranks, tmp_path):
    nothing = (None, None)
    assert ranks(settled, [(1.0, 0.5), (1.0, 0.6)], nothing, f"{tmp_path}/a") == [threshold.TOKENS[0] * 8192] * 2
    assert ranks(settled, [(1.0, 0.5), (1.0, 1.1)], nothing, f"{tmp_path}/b") == [None, None]
    for kept in (({"least_bytes": 4096}, None), (None, {"least_bytes": 4096}), ({"least_bytes": "x"}, {"least_bytes": 4096})):
        assert ranks(settled, [(1.0, 1.1)] * 2, kept, f"{tmp_path}/{kept}") == [4096, 4096]


def test_a_rank_without_memory_leaves_the_threshold_to_a_rule(ranks, tmp_path):
    assert ranks(settled, [(1.0, 0.5)] * 2, (None, None), str(tmp_path), [1]) == [threshold.RULE] * 2


def test_a_link_in_words():
    seconds = 2 * 3 / 4 * link.BYTES / 27e9
    assert link.in_words(["a"] * 4, [seconds / 2, seconds, seconds, seconds]) == "4 ranks, 16 to 64 GB/s"
    assert link.in_words(["a", "a", "b", "b"], [seconds] * 4) == "2+2 ranks, 16 to 64 GB/s"
    assert [link.speed(n * 1e9) for n in (0.3, 2, 350)] == ["0.25 to 1 GB/s", "1 to 4 GB/s", "256 to 1024 GB/s"]
