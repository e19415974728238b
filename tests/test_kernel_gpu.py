"""The kernels, and Symmetric around them, on one GPU.

One process plays all ranks: W Symmetric objects, each with a stream and a side stream of its own, over plain CUDA memory in
place of symmetric memory. The kernels see what they would see on W GPUs, but for the distances. All CTAs of all ranks
must be resident at the same time, hence few CTAs; nothing may wait for the GPU between the launches of one call.
"""

import os

# Before CUDA starts: fewer hardware queues than streams would let one rank's kernel wait behind another's.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import concurrent.futures
import contextlib
import functools
import itertools
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed._symmetric_memory as symm_mem

from tw_compile import files
from tw_compile.quantise import quantised, read
from tw_compile.site import WITHOUT_NORM, Planned, Site
from tw_compile.transports import agree
from tw_compile.transports.symmetric import gemms, nvrtc, transport
from tw_compile.transports.symmetric.arguments import macros
from tw_compile.transports.symmetric.layout import Layout, own_rows
from tw_compile.transports.symmetric.transport import Symmetric
from tw_compile.transports.symmetric.tuning import by_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(nvrtc.missing() is not None, reason=f"no NVRTC: {nvrtc.missing()}"),
]

TOKENS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 100, 257, 1024)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = [  # dtype, hidden, ranks: each is two kernels to compile
    *((BF16, 8192, world) for world in (2, 3, 4, 5, 8)),
    *((BF16, hidden, 8) for hidden in (8, 64, 4096, 5120, 16384, 32768)),
    *((FP16, 8, 2), (FP16, 5120, 3), (FP16, 4096, 4), (FP16, 32768, 2)),
    *((FP32, 64, 5), (FP32, 4096, 4), (FP32, 8192, 8), (FP32, 32768, 2)),
]
LAYER_NORM_SIZES = [  # some of them
    *((BF16, 8192, world) for world in (2, 8)),
    *((BF16, hidden, 8) for hidden in (64, 5120, 32768)),
    *((FP16, 5120, 3), (FP32, 4096, 4), (FP32, 32768, 2)),
]
QUANTISED_SIZES = [(BF16, 8192, 2, False), (BF16, 5120, 8, False), (FP16, 5120, 3, True), (BF16, 32768, 8, False)]
CTAS = 4


def site(shift=None, eps=1e-5, scale=1.0, offset=0.0, center=False):
    """What an op takes between ``bias`` and ``ctas``."""
    return shift, eps, scale, offset, center


def output_of(quantise):
    return read(quantise).output if quantise else ""


class Ranks:
    """W ranks in one process."""

    def __init__(self, world: int, timeout_s: float = 20.0):
        self.world, self.timeout_s = world, timeout_s
        self.here = 0  # the rank whose code runs
        self.banks = []  # of each symmetric allocation: (memories, pads) of all ranks
        self.allocated = [0] * world
        with self.stand_ins():
            self.ranks = [
                Symmetric(str(rank), torch.device("cuda", torch.cuda.current_device()), False, timeout_s, by_rule(world))
                for rank in range(world)
            ]
        self.streams = streams()[:world]

    @contextlib.contextmanager
    def stand_ins(self):
        """In place of the process group and of symmetric memory."""

        def group(name):
            return types.SimpleNamespace(rank=lambda: int(name), size=lambda: self.world)

        def empty(size, dtype, device):
            number, self.allocated[self.here] = self.allocated[self.here], self.allocated[self.here] + 1
            if number == len(self.banks):
                memories = [torch.full((size,), 255, dtype=dtype, device=device) for _ in range(self.world)]
                pads = [torch.zeros(symm_mem.get_signal_pad_size(), dtype=torch.uint8, device=device) for _ in memories]
                self.banks.append((memories, pads))
            return self.banks[number][0][self.here]

        def rendezvous(memory, name):
            memories, pads = next(bank for bank in self.banks if bank[0][int(name)] is memory)
            return types.SimpleNamespace(
                rank=int(name),
                world_size=self.world,
                multicast_ptr=0,
                buffer_ptrs=[m.data_ptr() for m in memories],
                signal_pad_ptrs=[p.data_ptr() for p in pads],
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transport, "resolve_process_group", group)
            patch.setattr(agree, "exchange", lambda group, what, message, timeout_s: [message] * self.world)
            patch.setattr(symm_mem, "empty", empty)
            patch.setattr(symm_mem, "rendezvous", rendezvous)
            yield

    def each(self, do, begin=True, end=True):
        """do(Symmetric, rank) for every rank on its stream; the results, in order.

        begin, end: the ranks' streams begin after what the caller's stream has done, and it goes on after them.
        """
        caller, results = torch.cuda.current_stream(), []
        with self.stand_ins():
            for rank, (transport, stream) in enumerate(zip(self.ranks, self.streams)):
                self.here = rank
                if begin:
                    stream.wait_stream(caller)
                with torch.cuda.stream(stream):
                    results.append(do(transport, rank))
        if end:
            for stream in self.streams:
                caller.wait_stream(stream)
        return results

    def workspaces(self, dtype, hidden, rows, slot=2, center=False, output=""):
        """Make sure of workspaces and kernels, so that nothing is allocated or loaded while a kernel waits for another."""
        self.each(lambda s, rank: s.prepare([Planned(slot, dtype, (rows, hidden), center, output)]))

    def poison(self):
        """NaN over everything but the epochs."""
        torch.cuda.synchronize()
        for sites in self.ranks:
            for workspace in sites._workspaces.values():
                workspace.memory[: workspace.bytes - 4 * workspace.max_ctas].fill_(255)

    def fused(
        self, x, residual, weight, bias, sharded_residual=False, in_workspace=False, ctas=CTAS, slot=2, quantise="", static_scale=None,
        **numerics,
    ):
        """x: [W, T, H]; numerics: what ``site`` takes. Returns [(norm, residual)] of all ranks, and with quantise what that adds."""
        shift, *rest = site(**numerics)
        self.workspaces(x.dtype, x.shape[-1], x[0].numel() // x.shape[-1], slot, rest[-1], output_of(quantise))
        given = residual, weight, bias, shift, *rest, ctas, slot, 0, sharded_residual, sharded_residual, quantise, static_scale
        return self.each(lambda s, rank: s.fused(Site(x[rank], *given), in_workspace))

    def overlapped(
        self, x, residual, weight, bias, sharded_residual=False, in_workspace=False, ctas=CTAS, slot=0, quantise="", static_scale=None,
        **numerics,
    ):
        shift, *rest = site(**numerics)
        self.workspaces(x.dtype, x.shape[-1], x[0].numel() // x.shape[-1], slot, rest[-1], output_of(quantise))
        given = residual, weight, bias, shift, *rest, ctas, slot, 0, sharded_residual, sharded_residual, quantise, static_scale
        self.each(lambda s, rank: s.start(Site(x[rank], *given)))
        return self.each(lambda s, rank: s.wait(slot, in_workspace))


@functools.cache
def streams():
    return [torch.cuda.Stream() for _ in range(8)]


def reserve_memory():
    """Let the allocator hold enough for each stream: a cudaMalloc might wait for a kernel that waits for one not yet launched."""
    for stream in streams():
        with torch.cuda.stream(stream):
            small = [torch.empty(1 << 20, dtype=torch.uint8, device="cuda") for _ in range(256)]
            large = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        del small, large


_worlds = {}


def ranks(world) -> Ranks:
    if world not in _worlds:
        _worlds[world] = Ranks(world)
    return _worlds[world]


def layout(dtype, hidden, world, center):
    limit = torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin
    return Layout.of(hidden, dtype.itemsize, world, "peer", center, limit)


@pytest.fixture(scope="module", autouse=True)
def prepared():
    """All kernels, compiled in parallel."""
    arch = nvrtc.architecture(torch.cuda.get_device_capability())
    jobs = [
        (kernel, arch, macros(dtype, hidden, world, rank, "peer", center, layout(dtype, hidden, world, center)))
        for center, sizes in ((False, SIZES), (True, LAYER_NORM_SIZES))
        for (dtype, hidden, world), kernel in itertools.product(sizes, ("two_shot", "one_shot"))
        for rank in range(world)
    ]
    jobs += [
        (kernel, arch, macros(dtype, hidden, world, rank, "peer", center, layout(dtype, hidden, world, center), output))
        for (dtype, hidden, world, center), output in itertools.product(QUANTISED_SIZES, ("fp8", "int8", "fp8_128", "int8_128"))
        for kernel, rank in itertools.product(("two_shot", "one_shot"), range(world))
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: nvrtc.cubin(*job), jobs))
    yield
    _worlds.clear()
    torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def reserved(prepared):
    reserve_memory()


def data(dtype, hidden, world, rows=max(TOKENS), seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")  # noqa: E731
    return {
        "x": draw(world, rows, hidden).to(dtype),
        "residual": draw(rows, hidden).to(dtype),
        "weight": draw(hidden).to(dtype),
        "float_weight": draw(hidden),
        "bias": draw(hidden).to(dtype),
        "shift": draw(hidden).to(dtype),
        "float_shift": draw(hidden),
    }


def expected(x, residual, weight, bias, shift=None, eps=1e-5, scale=1.0, offset=0.0, center=False):
    """In float64, unrounded."""
    r = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
    for partial in x:
        r += partial.double()
    if bias is not None:
        r += bias.double()
    r *= scale
    if residual is not None:
        r += residual.double()
    row = r - r.mean(-1, keepdim=True) if center else r
    norm = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
    norm = norm if weight is None else norm * (weight.double() + offset)
    return norm if shift is None else norm + shift.double(), r


def assert_close(got, wanted):
    """Correct to one rounding, and to what float32 sums of a few values lose."""
    half_ulp = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-20}[got.dtype]
    error = (got.double() - wanted).abs()
    assert bool((error <= 1.02 * half_ulp * wanted.abs() + 1e-5).all()), f"worst error {error.max().item():.3e}"


def assert_carried_or_whole(residual, wanted, carried, rank, world, itemsize):
    """Rounded and whole; or in float32, own rows in front where the kernel is two-shot."""
    rows = len(wanted)
    if not carried:
        assert_close(residual, wanted)
        return
    begin, end = own_rows(rank, world, rows) if by_rule(world).kernel_of(rows) == "two_shot" else (0, rows)
    assert residual.shape == wanted.shape
    # The front halves of all 16-byte vectors of a row come first, where these have 16-bit elements.
    in_order = residual.unflatten(-1, (4 // itemsize, -1, 4)).transpose(-2, -3).flatten(-3)
    assert_close(in_order[: end - begin], wanted[begin:end])


def assert_same(a, b):
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype, hidden, world", SIZES, ids=str)
def test_numbers(dtype, hidden, world):
    check_numbers(dtype, hidden, world, False)


@pytest.mark.parametrize("dtype, hidden, world", LAYER_NORM_SIZES, ids=str)
def test_numbers_of_a_layer_norm(dtype, hidden, world):
    check_numbers(dtype, hidden, world, True)


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
def test_a_site_without_a_norm(dtype):
    """At the end of a layer that is compiled alone: the residual in the dtype of the model, the same bits on all ranks."""
    group, d = ranks(2), data(dtype, 5120, 2)
    for rows in (1, 31, 100):
        _, r = expected(d["x"][:, :rows], d["residual"][:rows], None, None)
        for run in (group.fused, group.overlapped):
            group.workspaces(dtype, 5120, rows, 2 if run == group.fused else 0, False)
            group.poison()
            results = run(d["x"][:, :rows], d["residual"][:rows], None, None, eps=WITHOUT_NORM)
            assert_close(results[0][0], r)
            assert_same(results[0][0], results[0][1])
            assert_same(results[0][0], results[1][0])


@pytest.mark.parametrize("dtype, world", ((BF16, 2), (FP16, 3)), ids=str)
def test_a_whole_residual_in_float32(dtype, world):
    """Of a model whose layers are in 16 bits and whose residual is not: it is not rounded."""
    group, d = ranks(world), data(dtype, 5120, world)
    wide = torch.randn(max(TOKENS), 5120, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    for rows in (1, 31, 100, 257):
        x, residual = d["x"][:, :rows], wide[:rows]
        norm, r = expected(x, residual, d["weight"], None)
        for run in (group.fused, group.overlapped):
            group.workspaces(dtype, 5120, rows, 2 if run == group.fused else 0)
            group.poison()
            for rank, (norm_of_rank, residual_of_rank) in enumerate(run(x, residual, d["weight"], None, sharded_residual=True)):
                assert_close(norm_of_rank, norm)
                assert_carried_or_whole(residual_of_rank, r, True, rank, world, dtype.itemsize)


def check_numbers(dtype, hidden, world, center):
    """Every token count, the options in turn, against float64; over poisoned memory."""
    group, d = ranks(world), data(dtype, hidden, world)
    for i, rows in enumerate(TOKENS):
        residual = d["residual"][:rows] if i % 4 != 3 else None
        weight = (d["weight"], d["float_weight"], None)[i % 3]
        bias = d["bias"] if i % 5 == 2 else None
        options = dict(scale=(1.0, 0.25)[i // 2 % 2], offset=(0.0, 1.0)[i % 2], center=center)
        if center:
            options["shift"] = (d["shift"], d["shift"], d["float_shift"], None)[i % 4]
        sharded_residual, in_workspace = i % 3 == 0, i % 2 == 0
        x = d["x"][:, :rows]
        norm, r = expected(x, residual, weight, bias, **options)
        for run in (group.fused, group.overlapped):
            group.workspaces(dtype, hidden, rows, 2 if run == group.fused else 0, center)
            group.poison()
            results = run(x, residual, weight, bias, **options, sharded_residual=sharded_residual, in_workspace=in_workspace)
            assert_close(results[0][0], norm)
            for rank, (norm_of_rank, residual_of_rank) in enumerate(results):
                assert_same(norm_of_rank, results[0][0])
                assert_carried_or_whole(residual_of_rank, r, sharded_residual, rank, world, dtype.itemsize)
                if not sharded_residual:
                    assert_same(residual_of_rank, results[0][1])


QUANTISATIONS = (
    "fp8 1 divide 1 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 0", "fp8 1 divide 0 0.0 1e-12 448.0 0.0 -448.0 448.0 0.0 0",
    "fp8 1 divide 0 0.0 0.0 448.0 0.0 -448.0 448.0 1.0 0",
    "fp8 0 divide 0 0.0 0.0 1.0 0.0 -448.0 448.0 0.0 0", "fp8 0 multiply 0 0.0 0.0 1.0 0.0 -448.0 448.0 0.0 0",
    "int8 1 inverse 1 0.0 0.0 127.5 1.1920928955078125e-07 -128.0 127.0 0.0 0", "int8 1 divide 0 1e-6 0.0 127.0 0.0 -127.0 127.0 0.0 0",
    "fp8 1 divide 1 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 128", "fp8 1 inverse 0 0.0 1e-4 448.0 0.0 -448.0 448.0 0.0 128",
    "int8 1 divide 0 1e-6 0.0 127.0 0.0 -127.0 127.0 0.0 128",
)  # fmt: skip


@pytest.mark.parametrize("dtype, hidden, world, center", QUANTISED_SIZES, ids=str)
def test_a_norm_is_quantised(dtype, hidden, world, center):
    """To the bits of the eager reference of the norm that the kernels make without it, on all ranks; over poisoned memory."""
    group, d, scale = ranks(world), data(dtype, hidden, world), torch.tensor(0.013, device="cuda")
    numerics = dict(center=center, shift=d["shift"] if center else None)
    d["x"][:, 0], d["residual"][0] = 0, 0
    d["x"][:, 1, :128], d["residual"][1, :128] = 0, 0  # a group of zeros
    for i, rows in enumerate((1, 2, 31, 32, 100, 257, 1024)):
        given = d["x"][:, :rows], d["residual"][:rows], d["weight"], None
        norm, _ = group.fused(*given, **numerics)[0]
        norm = norm.clone()
        for j, text in enumerate(QUANTISATIONS):
            quantise, in_workspace = f"{text} {i % 2}", (i + j) % 2 == 0
            q, scales = quantised(norm, read(quantise), scale)
            for run in (group.fused, group.overlapped):
                group.poison()
                results = run(*given, True, in_workspace, quantise=quantise, static_scale=scale, **numerics)
                for kept, _, ours, *of_rows in results:
                    assert_same(ours, q)
                    assert not of_rows or torch.equal(of_rows[0], scales)
                    assert kept.shape == (norm.shape if i % 2 else (0,)) and torch.equal(kept, norm if i % 2 else kept)
                    assert center or not ours[0].float().any(), "a row of zeros"


@pytest.mark.parametrize(
    "dtype, hidden, world, center",
    [
        *((BF16, 8192, 8, False), (BF16, 5120, 8, False), (FP16, 5120, 3, False), (FP32, 64, 5, False)),
        *((BF16, 8192, 8, True), (FP32, 32768, 2, True)),
    ],
    ids=str,
)
def test_bits_of_a_row_depend_on_its_data_alone(dtype, hidden, world, center):
    """Not on the batch, the kernel, the number of CTAs, or the run."""
    group, d = ranks(world), data(dtype, hidden, world)
    norms = dict(shift=d["shift"], center=True) if center else {}
    norm, residual = group.fused(d["x"], d["residual"], d["weight"], d["bias"], **norms)[0]
    for begin, rows, ctas in [(0, 1, 0), (5, 31, 8), (5, 32, 1), (5, 32, 4), (40, 33, 2), (511, 257, 3), (0, 1024, 5)]:
        end = begin + rows
        for _ in range(3):
            for result in group.fused(
                d["x"][:, begin:end], d["residual"][begin:end], d["weight"], d["bias"], ctas=ctas, **norms
            ):
                assert_same(result[0], norm[begin:end])
                assert_same(result[1], residual[begin:end])


@pytest.mark.parametrize("world", (2, 3, 8))
def test_200_calls_back_to_back(world):
    """On the same buffers with changing data and sizes, and no host synchronisation."""
    group, hidden, dtype = ranks(world), 8192, BF16
    sets = [data(dtype, hidden, world, rows=64, seed=seed) for seed in range(4)]
    sizes = [(7 * i * i + 3 * i) % 64 + 1 for i in range(200)]
    wanted = [group.fused(d["x"], d["residual"], d["weight"], None)[0][0].clone() for d in sets]
    for rows in (1, 64):
        group.workspaces(dtype, hidden, rows)
    torch.cuda.synchronize()
    results = []
    for i, rows in enumerate(sizes):
        d = sets[i % len(sets)]
        results.append(
            group.each(
                lambda s, rank: s.fused(
                    Site(d["x"][rank, :rows], d["residual"][:rows], d["weight"], None, *site(), 2, 2, i), False
                )[0],
                begin=False,
                end=False,
            )
        )
    torch.cuda.synchronize()
    for i, rows in enumerate(sizes):
        for norm in results[i]:
            assert_same(norm, wanted[i % len(sets)][:rows])


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
@pytest.mark.parametrize("rows", (5, 31, 32, 100, 127))
def test_carried_residual_through_consecutive_sites(dtype, rows):
    """As a woven model has it: the GEMM writes the workspace, the residual stays in it unrounded, the last site makes it whole."""
    world, hidden = 4, 8192
    group, d = ranks(world), data(dtype, hidden, world, rows)
    a = torch.randn(world, rows, 64, device="cuda").to(dtype)
    b = (torch.randn(world, 64, hidden, device="cuda") / 8).to(dtype)
    group.workspaces(dtype, hidden, rows, 0)
    total, residuals = d["residual"].double(), [d["residual"]] * world
    for number, carry in enumerate((True, True, True, False)):
        xs = group.each(lambda s, rank: s.linear(a[rank], b[rank], None, 0))
        partials = torch.stack(xs)
        norm, total = expected(partials, total, d["weight"], None)
        group.each(lambda s, rank: s.start(Site(xs[rank], residuals[rank], d["weight"], None, *site(), CTAS, 0, number, carry, carry)))
        results = group.each(lambda s, rank: s.wait(0, True))
        residuals = [result[1] for result in results]
        for rank, (norm_of_rank, residual) in enumerate(results):
            assert_close(norm_of_rank, norm)
            assert_carried_or_whole(residual, total, carry, rank, world, dtype.itemsize)
            assert_same(norm_of_rank, results[0][0])


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
@pytest.mark.parametrize("rows", (1, 100))
def test_a_gemm_adds_in_the_workspace_to_the_one_before(dtype, rows):
    """As of attention and MLP of one norm: the second writes where the first has written."""
    world, hidden = 4, 8192
    group, d = ranks(world), data(dtype, hidden, world, rows)
    a, c = (torch.randn(world, rows, 64, device="cuda").to(dtype) for _ in range(2))
    b, e = ((torch.randn(world, 64, hidden, device="cuda") / 8).to(dtype) for _ in range(2))
    group.workspaces(dtype, hidden, rows, 0)
    first = group.each(lambda s, rank: s.linear(a[rank], b[rank], None, 0))
    wanted = torch.stack([torch.addmm(first[rank].clone(), c[rank], e[rank]) for rank in range(world)])
    second = group.each(lambda s, rank: s.linear(c[rank], e[rank], first[rank], 0))
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(first, second))
    torch.testing.assert_close(torch.stack(second), wanted)
    norm, _ = expected(wanted, d["residual"].double(), d["weight"], None)
    group.each(lambda s, rank: s.start(Site(second[rank], d["residual"], d["weight"], None, *site(), CTAS, 0, 0, False, False)))
    for norm_of_rank, _ in group.each(lambda s, rank: s.wait(0, True)):
        assert_close(norm_of_rank, norm)


@pytest.mark.parametrize("rows", (5, 100))
def test_both_norms_carry_their_residual_through_one_slot(rows):
    """A model may have both: their kernels work on the same workspace."""
    world, hidden = 2, 8192
    group, d = ranks(world), data(BF16, hidden, world, rows)
    for center in (False, True):
        group.workspaces(BF16, hidden, rows, 0, center)
    total, residuals = d["residual"].double(), [d["residual"]] * world
    for number, center in enumerate((False, True, True, False)):
        norms = dict(shift=d["shift"], center=True) if center else {}
        carry = number < 3
        norm, total = expected(d["x"], total, d["weight"], None, **norms)
        here = CTAS, 0, number, carry, carry
        group.each(lambda s, rank: s.start(Site(d["x"][rank], residuals[rank], d["weight"], None, *site(**norms), *here)))
        results = group.each(lambda s, rank: s.wait(0, False))
        residuals = [result[1] for result in results]
        for rank, (norm_of_rank, residual) in enumerate(results):
            assert_close(norm_of_rank, norm)
            assert_carried_or_whole(residual, total, carry, rank, world, BF16.itemsize)


def test_a_capture_loads_no_kernel():
    """The workspace is there, but so far without LayerNorms."""
    group, x = ranks(4), torch.zeros(40, 4096, dtype=FP16, device="cuda")
    group.workspaces(FP16, 4096, 40)
    with pytest.raises(RuntimeError, match="the kernels for a LayerNorm"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        group.ranks[0].fused(Site(x, None, None, None, *site(center=True), 0, 2), False)


@pytest.mark.parametrize("rows", (5, 100))
def test_cuda_graphs(rows):
    """Captured once on every rank, replayed with other data."""
    world, hidden = 2, 8192
    group, d = ranks(world), data(BF16, hidden, world, rows)
    x = d["x"].clone()
    group.overlapped(x, d["residual"], d["weight"], None, slot=1)
    graphs, outputs = [], []
    with group.stand_ins():
        for rank, s in enumerate(group.ranks):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=group.streams[rank]):
                for _ in range(3):
                    s.start(Site(x[rank], d["residual"], d["weight"], None, *site(), CTAS, 1, 0, False, False))
                    output = s.wait(1, False)
            graphs.append(graph)
            outputs.append(output)
    reserve_memory()  # the captures gave it back
    for seed in range(3):
        x.copy_(data(BF16, hidden, world, rows, seed)["x"])
        wanted = group.fused(x, d["residual"], d["weight"], None)
        group.each(lambda s, rank: graphs[rank].replay())
        torch.cuda.synchronize()
        for output in outputs:
            assert_same(output[0], wanted[0][0])
            assert_same(output[1], wanted[0][1])


def test_any_strides_and_alignment():
    world, hidden, rows = 2, 8192, 40
    group, d = ranks(world), data(BF16, hidden, world, rows)
    for rows in (3, 40):
        x, residual = d["x"][:, :rows], d["residual"][:rows]
        wanted = group.fused(x, residual, d["weight"], None)
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        shifted = torch.cat([d["weight"][:1], d["weight"]])[1:]
        results = group.fused(strided, residual.t().contiguous().t(), shifted, None)
        batched = group.fused(x.view(world, 1, rows, hidden), residual.view(1, rows, hidden), d["weight"], None)
        for rank in range(world):
            assert_same(results[rank][0], wanted[0][0])
            assert_same(batched[rank][0][0], wanted[0][0])
            assert batched[rank][0].shape == batched[rank][1].shape == (1, rows, hidden)


@pytest.mark.parametrize("sharded_residual", (False, True), ids=("whole", "sharded_residual"))
def test_no_tokens(sharded_residual):
    group = ranks(2)
    x = torch.empty(2, 0, 8192, dtype=BF16, device="cuda")
    for norm, residual in (*group.fused(x, None, None, None, sharded_residual), *group.overlapped(x, None, None, None, sharded_residual)):
        assert norm.shape == residual.shape == (0, 8192) and residual.dtype == (FP32 if sharded_residual else BF16)
    a, b = torch.empty(0, 64, dtype=BF16, device="cuda"), torch.empty(64, 8192, dtype=BF16, device="cuda")
    assert all(x.shape == (0, 8192) for x in group.each(lambda s, rank: s.linear(a, b, None, 0)))


def test_an_empty_half():
    """Beside one that is not."""
    group, d, rows = ranks(2), data(BF16, 8192, 2, 40), 40
    group.workspaces(BF16, 8192, rows, 0)
    for x, slot in ((d["x"], 0), (d["x"][:, :0], 1)):
        residual = d["residual"][: x.shape[1]]
        group.each(lambda s, rank: s.start(Site(x[rank], residual, d["weight"], None, *site(), CTAS, slot, 0, False, False)))
    empty, full = (group.each(lambda s, rank: s.wait(slot, False)) for slot in (1, 0))
    assert all(t.shape == (0, 8192) for result in empty for t in result)
    assert_close(full[0][0], expected(d["x"], d["residual"], d["weight"], None)[0])


@pytest.mark.parametrize("rows", (5, 100))
def test_calls_from_two_streams(rows):
    """100 from each, which share a workspace: a GEMM writes it, and others read it behind the site. None has another's values."""
    world, hidden = 2, 8192
    group, d = ranks(world), [data(BF16, hidden, world, rows, seed) for seed in range(2)]
    a = torch.randn(2, world, rows, 64, device="cuda").to(BF16)
    b, c = (torch.randn(64, hidden, device="cuda") / 8).to(BF16), (torch.randn(hidden, 64, device="cuda") / 64).to(BF16)
    for slot in range(2):
        group.workspaces(BF16, hidden, rows, slot)
    # All GEMMs first without kernels that wait: what is loaded or allocated for them would wait for these.
    for stream, ctas in itertools.product(streams()[: 2 * world], (0, CTAS)):
        torch.cuda.synchronize()
        carveout = ctas and gemms.reserve_sms(ctas)
        with torch.cuda.stream(stream):
            norm, out = a[0, 0] @ b, torch.empty(rows, hidden, dtype=BF16, device="cuda")
            torch.mm(norm @ c, b, out=out)
            [t.clone() for t in (norm, out)]
        if carveout:
            gemms.release_sms()
    torch.cuda.synchronize()

    def graph(s, rank, which):
        with s.call():
            outputs = []
            for slot in range(2):
                x = s.linear(a[which, rank], b, None, slot)
                s.start(Site(x, d[which]["residual"], d[which]["weight"], None, *site(), CTAS, slot, 0, True, True))
            for slot in range(2):
                norm, residual = s.wait(slot, True)
                s.start(Site(s.linear(norm @ c, b, None, slot), residual, d[which]["weight"], None, *site(), CTAS, slot, 1, False, False))
            for slot in range(2):
                outputs += s.wait(slot, True)
            return [outputs[0] @ c, outputs[1], outputs[2] @ c, outputs[3]]

    wanted = []
    for which in range(2):
        wanted.append(group.each(lambda s, rank: graph(s, rank, which)))
        torch.cuda.synchronize()
    results = []
    for i in range(200):
        pair = streams()[i % 2 * world :][:world]
        with group.stand_ins():
            for rank, s in enumerate(group.ranks):
                with torch.cuda.stream(pair[rank]):
                    results.append((graph(s, rank, i % 2), wanted[i % 2][rank]))
    torch.cuda.synchronize()
    wrong = sum(any(not torch.equal(x, y) for x, y in zip(got, right)) for got, right in results)
    assert wrong == 0, f"{wrong} of {len(results)}"


def test_a_capture_between_calls_on_two_streams():
    """What is captured does not wait for what is not, and the other way round."""
    world, rows = 2, 40
    group, d = ranks(world), data(BF16, 8192, world, rows)
    wanted = group.overlapped(d["x"], d["residual"], d["weight"], None, slot=1)
    torch.cuda.synchronize()
    graphs, outputs = [], []
    with group.stand_ins():
        for rank, s in enumerate(group.ranks):
            with torch.cuda.stream(streams()[4 + rank]):  # in front of the capture, on another stream
                s.fused(Site(d["x"][rank, :0], None, None, None, *site(), CTAS, 1, 0, False, False), False)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=group.streams[rank]), s.call():
                s.start(Site(d["x"][rank], d["residual"], d["weight"], None, *site(), CTAS, 1, 0, False, False))
                outputs.append(s.wait(1, False))
            graphs.append(graph)
    reserve_memory()
    for _ in range(3):
        group.each(lambda s, rank: graphs[rank].replay())
        torch.cuda.synchronize()
        with group.stand_ins():
            results = []
            for rank, s in enumerate(group.ranks):
                with torch.cuda.stream(streams()[4 + rank]), s.call():
                    s.start(Site(d["x"][rank], d["residual"], d["weight"], None, *site(), CTAS, 1, 0, False, False))
                    results.append(s.wait(1, False))
        torch.cuda.synchronize()
        for got in (*outputs, *results):
            assert_same(got[0], wanted[0][0]), assert_same(got[1], wanted[0][1])


def test_an_exception_between_start_and_wait_leaves_nothing_behind():
    world, rows = 2, 40
    group, d = ranks(world), data(BF16, 8192, 2, rows)
    group.workspaces(BF16, 8192, rows, 0)
    carveout = lambda: (torch._C._get_blas_preferred_backend(), torch._C._get_sm_carveout_experimental())  # noqa: E731
    before, during = carveout(), []

    def fail(s, rank):
        with contextlib.suppress(ZeroDivisionError), s.call():
            s.start(Site(d["x"][rank], None, None, None, *site(), CTAS, 0, 0, False, False))
            during.append(carveout())
            raise ZeroDivisionError

    group.each(fail)
    assert carveout() == before and all(now[1] == CTAS for now in during)
    results = group.overlapped(d["x"], d["residual"], d["weight"], None)
    assert_close(results[0][0], expected(d["x"], d["residual"], d["weight"], None)[0])


def test_a_cubin_that_does_not_load_is_made_anew():
    s = ranks(2).ranks[0]
    wanted = macros(BF16, 8192, 2, 0, "peer", False, layout(BF16, 8192, 2, False))
    command = nvrtc.options(nvrtc.architecture(torch.cuda.get_device_capability()), wanted)
    path = files.path("two_shot", nvrtc._cache_key("two_shot", command), "cubin")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], files._sealed(b"no cubin")):
        path.write_bytes(damaged)
        assert s._kernel("two_shot", BF16, 8192, False, "").packed(1, 0)
        assert path.read_bytes() == whole


def test_a_start_without_wait_is_forgotten():
    world, rows = 2, 40
    group, d = ranks(world), data(BF16, 8192, 2, rows)
    group.workspaces(BF16, 8192, rows, 0)
    group.each(lambda s, rank: s.start(Site(d["x"][rank], None, None, None, *site(), CTAS, 0, 0, False, False)))
    results = group.overlapped(d["x"], d["residual"], d["weight"], None)
    assert_close(results[0][0], expected(d["x"], d["residual"], d["weight"], None)[0])
    with pytest.raises(RuntimeError, match="wait for slot . without a start"):
        group.each(lambda s, rank: s.wait(0, False))


def test_what_it_refuses():
    group = ranks(2)
    x = torch.zeros(2, 40, 8192, dtype=BF16, device="cuda")
    group.workspaces(BF16, 8192, 40)
    for match, change in [
        ("residual is", dict(residual=torch.zeros(40, 8192, dtype=FP16, device="cuda"))),
        ("weight is", dict(weight=torch.zeros(8192, dtype=FP16, device="cuda"))),
        ("bias is", dict(bias=torch.zeros(8192, device="cuda"))),
        ("shift is", dict(shift=torch.zeros(8192, dtype=FP16, device="cuda"), center=True)),
        ("only a LayerNorm has a shift", dict(shift=torch.zeros(8192, dtype=BF16, device="cuda"))),
        ("signal pad", dict(ctas=100_000)),
        ("residual is", dict(residual=torch.zeros(40, 8192, dtype=FP16, device="cuda"), sharded_residual=True)),
    ]:
        with pytest.raises(RuntimeError, match=match):
            group.fused(x, **{"residual": None, "weight": None, "bias": None, **change})
    with pytest.raises(RuntimeError, match="multiples of 8"):
        group.fused(x[..., :12], None, None, None)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run this size once without capture"), group.stand_ins(), torch.cuda.graph(graph):
        group.ranks[0].fused(
            Site(torch.zeros(40, 8192, dtype=BF16, device="cuda"), None, None, None, *site(), 0, 7), False
        )


LOST = """
import sys, torch
from tests.test_kernel_gpu import Ranks, BF16, Site, site
group = Ranks(2, timeout_s=0.3)
rows, sites = zip(*(map(int, word.split("@")) for word in sys.argv[1:]))  # of each rank that comes
group.workspaces(BF16, 8192, rows[0])
x = torch.zeros(64, 8192, dtype=BF16, device="cuda")
def call(rank):
    with torch.cuda.stream(group.streams[rank]):
        group.ranks[rank].fused(Site(x[:rows[rank]], None, None, None, *site(), 0, 2, sites[rank], True, True), True)
with group.stand_ins():
    for rank in range(len(rows)):
        call(rank)
    try:
        torch.cuda.synchronize()
        print("no error")
    except RuntimeError:
        call(0)
"""


def lost(*rows, sites=(11, 11)):
    """What a process says at its end whose CUDA context is lost."""
    words = [f"{n}@{at}" for n, at in zip(rows, sites)]
    done = subprocess.run([sys.executable, "-c", LOST, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.mark.parametrize("rows", (2, 31, 40))
def test_a_lost_rank_is_named(rows):
    message = lost(rows)
    assert "rank 0 waited 0.3 s for rank 1 to begin the all-reduce of site 11" in message, message[-2000:]


@pytest.mark.parametrize("rows", [(2, 3), (40, 39), (64, 63)], ids=str)
def test_another_number_of_tokens_is_noticed(rows):
    """One process plays both ranks: the first kernel that notices ends both."""
    message = lost(*rows)
    assert "another number of tokens" in message and "site 11" in message, message[-2000:]


@pytest.mark.parametrize("rows", (3, 40))
def test_another_site_is_noticed(rows):
    message = lost(rows, rows, sites=(3, 5))
    here = f"is at the all-reduce of site {{}} with {rows} tokens, but rank {{}} is at that of site {{}} with {rows} tokens"
    assert f"rank 0 {here.format(3, 1, 5)}" in message or f"rank 1 {here.format(5, 0, 3)}" in message, message[-2000:]
