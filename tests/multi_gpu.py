"""What each rank of test_multi_gpu.py runs: a Llama of 70B shapes with four layers, on real GPUs.

    torchrun --nproc-per-node 2 tests/multi_gpu.py [names of checks]

With more ranks than GPUs, ranks share GPUs: slow, as their kernels take turns, but eight ranks can be checked on four GPUs.
The process group is gloo then, since NCCL does not take two ranks of one GPU.
"""

import concurrent.futures
import contextlib
import gc
import itertools
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

import tw_compile
from tw_compile.site import Planned, Site
from tw_compile.transports import choose, link
from tw_compile.transports.low_bit import threshold
from tw_compile.transports.symmetric import tuning
from tw_compile.transports.symmetric.transport import Symmetric
from tw_compile.transports.symmetric.tuning import LEAST_ROWS, Tuning
from tw_compile.transports.together import WorkspaceError

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("examples", "benchmarks")]
import llama  # noqa: E402
import opaque  # noqa: E402

LAYERS, SIZES = 4, (512, 1000, 2048, 4096, 8192)
EVENTS = []


class Inputs:
    """The inputs of calls at 8192, the same on all ranks, and what is right. Calls take some of the rows.

    Consecutive calls are to take different ones, lest what is left of one call passes for the result of the next.
    """

    ROWS = 1024

    def __init__(self, device):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(device, torch.bfloat16)  # noqa: E731
        parts = draw(dist.get_world_size(), self.ROWS, 8192)
        self.x, self.residual, self.weight = parts[dist.get_rank()].clone(), draw(self.ROWS, 8192), draw(8192)
        total = sum(part.double() for part in parts) + self.residual.double()
        self.right = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * self.weight.double(), total

    def arguments(self, begin, rows):
        """What a site takes up to ``ctas``."""
        own = slice(begin, begin + rows)
        return self.x[own], self.residual[own], self.weight, None, None, 1e-5, 1.0, 0.0, False

    def is_right(self, results, begin):
        """Are norm and residual correct to one rounding, and to what float32 sums of a few values lose?"""
        pairs = [(got, right[begin : begin + len(got)]) for got, right in zip(results, self.right)]
        return all(((got - right).abs() <= 1.02 * 2.0**-8 * right.abs() + 1e-5).all() for got, right in pairs)


def start():
    """Join the other ranks. Returns this rank's device."""
    gpus, here = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if here <= gpus:
        return llama.start()[0]
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    llama.say(f"{here} ranks on {gpus} GPUs")
    return device


def log_events():
    """Keep what is executed, in order: S and W with the half."""
    for name in ("start", "wait"):
        original = getattr(Symmetric, name)

        def logged(self, *args, original=original, letter=name[0].upper()):
            EVENTS.append(f"{letter}{Site._make(args[0]).slot if isinstance(args[0], tuple) else args[0]}")
            return original(self, *args)

        setattr(Symmetric, name, logged)


def build(device, dtype=torch.bfloat16, size="70B", layers=LAYERS, group=None):
    config = replace(llama.SIZES[size], layers=layers)
    with torch.device("meta"):
        model = llama.Llama(config, group or dist.group.WORLD).to(dtype).eval()
    llama.fill(model, config, device, None)  # the angles of the rotary embedding stay in float32
    return model, config


def exact_of(model):
    """A Llama of LAYERS layers of 70B shapes in float64, with the rounded weights of this one, so that only the arithmetic differs."""
    exact, _ = build(model.norm.weight.device, torch.float64)
    for mine, theirs in zip(exact.parameters(), model.parameters(), strict=True):
        mine.copy_(theirs)
    return exact


def compiled(model, backend="tokenweave", dynamic=True, **options):
    if backend == "tokenweave":
        options = {"tokenweave.min_tokens": 1024, **options}  # whatever is faster here, it is to be woven
    return torch.compile(model, backend=backend, options=options, dynamic=dynamic)


def inputs(config, device, tokens, batch=1, seed=0):
    generator = torch.Generator().manual_seed(1000 * tokens + seed)
    return torch.randint(config.vocab, (batch, tokens), generator=generator).to(device)


def try_model(model, path, name, batch, device):
    import zoo

    codegen = batch == 1 and name in ("Llama", "Gemma 3", "Mixtral")  # it takes long, and is the same for others
    result = zoo.forward(path, batch, 64, dtype=torch.bfloat16, codegen=codegen, device=device)
    (report,) = result.reports
    unsplit, refused = dict(Counter(each.op for each in report.joins)), [refusal.reason for refusal in report.refusals]
    llama.say(f"models: {name}, batch {batch}: {report.mode}, {len(report.sites)} sites, unsplit {unsplit}, refused {refused}, "
              f"error {result.error:.2e}, eager's {result.eager_error:.2e}")  # fmt: skip
    zoo.check_report(result, model, batch)
    assert report.transport == "peer"
    # A token whose best experts are nearly equal may go to another one than in eager mode, and there to another one than in float64.
    assert result.error <= (1.5 if model.unsplit else 1.1) * result.eager_error < (0.07 if model.unsplit else 0.03)


def error(result, right):
    return ((result.double() - right).norm() / right.norm()).item()


def check_agreement(device):
    """Sites, order and error for each size, against float64 and Inductor; and the same bits on every rank."""
    model, config = build(device)
    exact = exact_of(model)
    runs = {"inductor": compiled(model, "inductor"), "weave": compiled(model, **{"tokenweave.min_tokens": 512})}
    for batch, tokens in [(1, t) for t in SIZES] + [(4, 512)]:
        ids = inputs(config, device, tokens, batch)
        right = exact(ids)[0]
        errors = {}
        for name, run in runs.items():
            run(ids)  # with whatever is tuned first
            EVENTS.clear()
            hidden = run(ids)[0]
            errors[name] = error(hidden, right)
        sites = 2 * LAYERS + 1
        expected = "S0 S1 " + "W0 S0 W1 S1 " * (sites - 1) + "W0 W1"
        assert " ".join(EVENTS) == expected, EVENTS
        report = tw_compile.reports()[-1]
        assert (report.mode, report.transport, len(report.sites), report.refusals, report.joins) == (
            "weave",
            "peer",
            sites,
            [],
            [],
        ), report
        llama.say(f"agreement {batch}×{tokens}: " + ", ".join(f"{n} {e:.3e}" for n, e in errors.items()))
        assert errors["weave"] <= 1.1 * errors["inductor"], errors
        copies = [torch.empty_like(hidden) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, hidden)
        assert all(torch.equal(copies[0], other) for other in copies), "the ranks have different bits"
        del right, hidden, copies
        gc.collect(), torch.cuda.empty_cache()


def check_repeats(device, passes=1000):
    """Changing token counts, pass after pass: the bits of the first pass with that input, and no memory growth."""
    model, config = build(device)
    run = compiled(model)
    counts = (1, 3, 16, 31, 33, 129, 500, 1024, 1025, 1500, 2048, 4100)
    batches = [inputs(config, device, tokens) for tokens in counts]
    first = [run(ids)[0].clone() for ids in batches]
    order = torch.randint(len(counts), (passes,), generator=torch.Generator().manual_seed(7)).tolist()
    wrong = torch.zeros((), device=device)
    for step, i in enumerate(order):
        wrong += (run(batches[i])[0] != first[i]).any()
        if step == passes // 10:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0]
    assert wrong.item() == 0, f"{int(wrong.item())} of {passes} passes differ from the first bits"
    assert after[0] <= before[0] and after[1] <= before[1] and after[2] >= before[2] - (8 << 20), (before, after)
    llama.say(f"repeats: {passes} passes over {len(counts)} sizes, same bits; memory {before} -> {after}")


def check_stress(device, calls=1_000_000):
    """Both kernels in any order, each rank delayed otherwise: every call has the bits of the first, which are right everywhere.

    That is the first call of all: the bits of a row depend on its data alone.
    """
    sizes = [*range(1, 65)] * 2 + [32] * 16 + [65, 100, 128, 200, 256, 257, 500, 512]  # 32: two_shot in the workspace of one_shot
    symmetric, site = Symmetric(dist.group.WORLD.group_name, device, False, timeout_s=60.0), Inputs(device)
    plan, delays = random.Random(0), random.Random(1 + dist.get_rank())  # the ranks differ in delays, and in nothing else
    wrong, made = torch.zeros((), dtype=torch.int64, device=device), 0

    def draw(sizes):
        rows = plan.choice(sizes)
        return plan.randrange(site.ROWS - rows + 1), rows

    def delay():
        torch.cuda._sleep(int(10 ** delays.uniform(0, 5)))  # cycles: up to 50 µs, but mostly less than a kernel takes

    def compare(results, begin):
        for result, bits in zip(results, first):
            wrong.add_((result.view(torch.int64) != bits[begin : begin + len(result)].view(torch.int64)).any())

    def fused(begin, rows, slot, ctas, in_workspace):
        delay()
        compare(symmetric.fused(Site(*site.arguments(begin, rows), ctas, slot), in_workspace), begin)

    def overlapped(begins, rows, ctas, in_workspace):
        """Both slots, as a woven model has them."""
        for slot in (0, 1):
            delay()
            symmetric.start(Site(*site.arguments(begins[slot], rows[slot]), ctas, slot))
        for slot in (0, 1):
            delay()
            compare(symmetric.wait(slot, in_workspace), begins[slot])

    def capture(calls, sizes, grids):
        graph, captured = torch.cuda.CUDAGraph(), 0
        with torch.cuda.graph(graph):
            while captured < calls:
                ctas, in_workspace = plan.choice(grids), plan.random() < 0.5
                if plan.random() < 0.8:
                    fused(*draw(sizes), plan.randrange(2), ctas, in_workspace)
                    captured += 1
                else:
                    overlapped(*zip(draw(sizes), draw(sizes)), ctas, in_workspace)
                    captured += 2
        return graph, captured

    first = symmetric.fused(Site(*site.arguments(0, site.ROWS), 0, 0, 0, False, False), False)
    assert site.is_right(first, 0)
    for bits in first:
        copies = [torch.empty_like(bits) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, bits)
        assert all(torch.equal(copies[0], other) for other in copies), "the ranks have different bits"
    for rows in sorted(set(sizes)):
        for slot in (0, 1):
            fused(site.ROWS - rows, rows, slot, 0, False)
        overlapped((rows, site.ROWS - rows), (rows, rows), 0, True)
    assert wrong.item() == 0, "calls of other sizes differ from the first bits"
    graphs = [capture(500, sizes, (0, 1, 2, 3, 5, 8, 16, 32)) for _ in range(8)]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while made < calls:
        graph, captured = plan.choice(graphs)
        graph.replay()
        made += captured
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    assert wrong.item() == 0, f"{wrong.item()} of {2 * made} tensors differ from the first bits"
    dist.barrier()  # nobody gives memory back that others still use
    llama.say(f"stress: {made} calls of 1 to {max(sizes)} rows in {len(graphs)} graphs, {seconds:.0f} s, same bits")


def check_tuning(device):
    """Measured once and kept, the same on all ranks; and the same bits on both sides of all that it decides."""
    group, world, site, slot = dist.group.WORLD.group_name, dist.get_world_size(), Inputs(device), 2
    measured, really = [], tuning._times

    def times(*args):
        measured.append(really(*args))
        return measured[-1]

    def of_all(mine):
        everybody = [None] * world
        dist.all_gather_object(everybody, mine)
        return everybody

    def call(symmetric, begin, rows):
        return symmetric.fused(Site(*site.arguments(begin, rows), 0, slot), False)

    def tuned():
        """A Symmetric as in a new process, and its tuning."""
        tuning._measured.clear()
        symmetric = Symmetric(group, device, False, timeout_s=60.0)
        call(symmetric, 0, 1)
        return symmetric, symmetric._workspace(slot, torch.bfloat16, 8192, 1).tuning

    def same_bits(results, begin):
        pairs = [(got, bits[begin : begin + len(got)]) for got, bits in zip(results, first)]
        return all(torch.equal(got.view(torch.int64), bits.view(torch.int64)) for got, bits in pairs)

    of_all(None)  # NCCL takes its memory
    with (
        tempfile.TemporaryDirectory() as folder,  # of this rank alone
        mock.patch.dict(os.environ, TW_COMPILE_CACHE_DIR=folder),
        mock.patch.object(tuning, "_times", times),
    ):
        torch.cuda.synchronize()
        free, random_state, begin = torch.cuda.mem_get_info()[0], torch.cuda.get_rng_state(device), time.perf_counter()
        with torch.inference_mode():
            symmetric, choice = tuned()
        seconds, taken = time.perf_counter() - begin, free - torch.cuda.mem_get_info()[0]
        assert torch.equal(torch.cuda.get_rng_state(device), random_state)
        assert taken < 100 << 20, f"{taken} bytes are gone, where the instruments have 200 MB"
        slowest = {variant: max(theirs[variant] for theirs in of_all(measured[0])) for variant in measured[0]}
        assert of_all(choice) == [tuning.by_times(world, slowest)] * world

        def again():
            _, choice = tuned()
            return of_all((choice, len(measured)))

        assert again() == [(choice, 1)] * world, "not taken from the disk"
        (path,) = Path(folder).glob("tuning-*.json")
        if dist.get_rank() == 0:
            path.unlink()
        assert again() == [(choice, 1)] * world, "not taken from the other ranks"
        path.unlink(missing_ok=True)
        assert {count for _, count in again()} == {2}, "taken from nowhere"
    tuning._measured.clear()

    first = call(symmetric, 0, site.ROWS)
    assert site.is_right(first, 0)
    forced = [Tuning(LEAST_ROWS - 1, ((1, 8),)), *(Tuning(0, ((1, ctas),)) for ctas in tuning.CTAS)]
    forced = [Symmetric(group, device, False, 60.0, which) for which in forced]
    switches = [choice.one_shot_rows + 1, LEAST_ROWS, *(rows for rows, _ in choice.ctas[1:])]
    for rows in sorted({1, site.ROWS - 1, *(n for least in switches for n in (least - 1, least) if 0 < n < site.ROWS)}):
        for i, which in enumerate((symmetric, *forced)):
            begin = i * (site.ROWS - rows) // len(forced)
            assert same_bits(call(which, begin, rows), begin), (rows, which.tuning)
        ran, one_shot, *two_shot = [
            which._call(slot, torch.bfloat16, torch.Size((rows, 8192))).kernel for which in (symmetric, *forced)
        ]
        assert (ran, one_shot) == (choice.kernel_of(rows), "one_shot" if rows < LEAST_ROWS else "two_shot")
        assert set(two_shot) == {"two_shot"}
    dist.barrier()  # nobody gives memory back that others still use
    for (kernel, tokens, ctas), at_worst in slowest.items():
        llama.say(f"tuning: {kernel}, {tokens} tokens, {ctas} CTAs: {1e6 * at_worst:.2f} µs")
    llama.say(f"tuning: {choice} in {seconds:.1f} s with compiling, {taken >> 20} MB; same on all ranks, from disk, and same bits")


def check_graphs(device):
    """CUDA graphs replay with new inputs: mode="reduce-overhead", and a capture of the user's own."""
    model, config = build(device)
    plain = compiled(model)
    graphed = compiled(model, **{"triton.cudagraphs": True})
    for tokens in (64, 2048):
        for seed in range(6):
            ids = inputs(config, device, tokens, seed=seed)
            assert torch.equal(graphed(ids)[0], plain(ids)[0]), (tokens, seed)
        static = inputs(config, device, tokens)
        plain(static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = plain(static)[0]
        for seed in range(3):
            static.copy_(inputs(config, device, tokens, seed=seed))
            graph.replay()
            assert torch.equal(captured, plain(static)[0]), (tokens, seed)
    llama.say("graphs: reduce-overhead and a capture of one's own replay with new inputs")


def decode_steps(device, layers=LAYERS, **options):
    """What ten steps give, and the KV caches that they write to."""
    import decode

    torch.manual_seed(0)
    model, config = decode.build("70B", layers, device, 4, 64)
    run = compiled(model, options.pop("backend", "tokenweave"), options.pop("dynamic", True), **options)
    hidden = []
    for position in range(40, 50):
        ids = inputs(config, device, 1, batch=4, seed=position)
        hidden.append(run(ids, torch.full((4,), position, device=device))[0].clone())
    return torch.stack(hidden), [model.get_buffer(name) for name, _ in model.named_buffers() if "cache" in name]


def check_caches(device):
    """Decode steps whose layers are compiled as one write to the KV caches: the same bits in CUDA graphs, and what Inductor writes."""
    plain, caches = decode_steps(device)
    assert tw_compile.reports()[-1].alike == LAYERS - 1, tw_compile.reports()[-1]
    for options in {"triton.cudagraphs": True}, {"max_autotune": True, "triton.cudagraphs": True}, {"backend": "inductor"}:
        torch._dynamo.reset()
        hidden, others = decode_steps(device, **options)
        pairs = [(hidden, plain), *zip(others, caches)]
        same, worst = all(torch.equal(a, b) for a, b in pairs), max(error(a, b.double()) for a, b in pairs)
        llama.say(f"caches: {options}: {'the same bits' if same else f'relative difference {worst:.1e}'}")
        assert same if options == {"triton.cudagraphs": True} else worst < 2e-2


def check_regions(device):
    """Layers marked to be compiled once give the bits of those that are not, in CUDA graphs too, and write the same to caches.

    Three layers, the least of which some are alike, and one number of tokens: PyTorch 2.11 traces regions slowly.
    """
    import decode

    mark = lambda kind: mock.patch.object(kind, "forward", torch.compiler.nested_compile_region(kind.forward))  # noqa: E731
    layers = 3
    model, config = build(device, layers=layers)
    ids = [inputs(config, device, 2048, seed=seed) for seed in range(3)]
    run = compiled(model, dynamic=False)
    plain, (hidden, caches) = [run(i)[0] for i in ids], decode_steps(device, layers, dynamic=False)
    torch._dynamo.reset()
    with mark(llama.Layer), mark(decode.CachedAttention):
        run = compiled(model, dynamic=False, **{"triton.cudagraphs": True})
        for _ in range(2):  # captured, and replayed
            assert all(torch.equal(run(i)[0], expected) for i, expected in zip(ids, plain))
        report = tw_compile.reports()[-1]
        assert report.mode == "weave" and len(report.sites) == 2 * layers + 1 and report.alike, report
        marked, others = decode_steps(device, layers, dynamic=False, **{"triton.cudagraphs": True})
        assert torch.equal(marked, hidden) and all(map(torch.equal, others, caches))
    llama.say("regions: the same bits as without, woven and fused, in CUDA graphs, and in the caches")


def check_transports(device):
    """The process group gives the same model, and multimem is refused with its reason where there is no multicast."""
    model, config = build(device)
    ids = inputs(config, device, 2048)
    peer, group = compiled(model), compiled(model, **{"tokenweave.transport": "process_group"})
    a, b = peer(ids)[0], group(ids)[0]
    assert tw_compile.reports()[-1].transport == "process_group"
    assert error(b, a.double()) < 4e-2, error(b, a.double())  # each is off by 0.03 from float64
    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") == "1":
        try:
            compiled(model, **{"tokenweave.transport": "multimem"})(ids)
        except Exception as refused:
            assert "multimem" in str(refused), refused
            llama.say("transports: multimem refused:", str(refused).splitlines()[0][:300])
        else:
            raise AssertionError("multimem was not refused")


def check_wire(device):
    """A wire of 8, 6 and 4 bits, woven and fused, in CUDA graphs: its error beside 16 bits, and the same bits on all ranks in every run.

    With random weights errors grow from layer to layer; what has nothing to do with the right values has an error of 1.4.
    """
    model, config = build(device, layers=2)
    ids = inputs(config, device, 2048)
    usual = compiled(model, **{"tokenweave.transport": "process_group"})(ids)[0].double()
    for bits, limit in ((8, 0.1), (6, 0.7), (4, 0.9)):
        transport, why_not = choose.choose(f"process_group:{bits}", dist.group.WORLD.group_name, device)
        llama.say(f"wire: {bits} bits as measured: {getattr(transport, 'least_bytes', why_not)}")
        choose.forget(dist.group.WORLD.group_name)
        for mode in ("weave", "fuse"):
            torch._dynamo.reset()
            options = {
                "tokenweave.transport": "process_group",
                "tokenweave.wire": bits,
                "tokenweave.mode": mode,
                "triton.cudagraphs": True,
            }
            with mock.patch.object(threshold, "least_bytes", return_value=1):  # whatever is faster here
                run = compiled(model, **options)
                results = [run(ids)[0].clone() for _ in range(4)]
            report = tw_compile.reports()[-1]
            assert (report.mode, report.transport, report.packed) == (mode, f"process_group:{bits}", len(report.sites)), report
            everybodys = [torch.empty_like(results[0]) for _ in range(dist.get_world_size())]
            dist.all_gather(everybodys, results[0])
            assert all(torch.equal(each, results[0]) for each in [*results, *everybodys])
            llama.say(f"wire: {bits} bits, {mode}: {error(results[0], usual):.3f} from 16 bits")
            assert error(results[0], usual) < limit


def carveout():
    """The BLAS library and the SM carveout of GEMMs, for the whole process."""
    return torch._C._get_blas_preferred_backend(), torch._C._get_sm_carveout_experimental()


def wrong_of(calls):
    """How many of (result, right) differ."""
    torch.cuda.synchronize()
    return sum(not torch.equal(result, right) for result, right in calls)


def check_streams(device, calls=100):
    """One compiled model, called from two streams in turn, without a stop: the bits of calls from one; in CUDA graphs, too."""
    model, config = build(device, size="8B")
    ids = [inputs(config, device, 2048, seed=seed) for seed in range(2)]
    for mode, graphs in itertools.product(("fuse", "weave"), (False, True)):
        torch._dynamo.reset()
        run = compiled(model, dynamic=False, **{"tokenweave.mode": mode, "tokenweave.timeout": 20, "triton.cudagraphs": graphs})
        right = [[run(i)[0].clone() for _ in range(3)][-1] for i in ids]
        torch.cuda.synchronize()
        streams, done = [torch.cuda.Stream(device) for _ in ids], []
        for _ in range(calls):
            for stream, i, wanted in zip(streams, ids, right):
                with torch.cuda.stream(stream):
                    done.append((run(i)[0].clone(), wanted))
        wrong = wrong_of(done)
        llama.say(f"streams: {mode}{', CUDA graphs' * graphs}: {wrong} wrong of {len(done)}")
        assert wrong == 0
    assert tw_compile.reports()[-1].transport == "peer"


def in_turn(device, *does):
    """``calls`` of each, in threads and on streams of their own; in the order of the threads, which is that of all ranks."""
    turns, turn = threading.Condition(), [0]

    def work(n):
        torch.cuda.set_device(device)
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(device)):
            done = []
            for mine in range(n, len(does) * THREADED_CALLS, len(does)):
                with turns:
                    assert turns.wait_for(lambda: turn[0] == mine, timeout=60)
                try:
                    done.append(does[n]())
                finally:
                    with turns:
                        turn[0] += 1
                        turns.notify_all()
            return done

    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(len(does)) as pool:
        return [pair for future in [pool.submit(work, n) for n in range(len(does))] for pair in future.result()]


THREADED_CALLS = 50


def check_threads(device):
    """Two threads with one model, with two, and with two that have a group of their own, each on a stream of its own."""
    before, groups = carveout(), [dist.group.WORLD, dist.group.WORLD, dist.new_group(range(dist.get_world_size()))]
    models = [build(device, size="8B", layers=2, group=group) for group in groups]
    for mode in ("fuse", "weave"):
        torch._dynamo.reset()
        ids = [inputs(models[0][1], device, 2048, seed=seed) for seed in range(2)]
        options = {"tokenweave.mode": mode, "tokenweave.timeout": 20}
        runs = [compiled(model, dynamic=False, **options) for model, _ in models]
        for which in ((0, 0), (0, 1), (0, 2)):
            right = [[runs[n](i)[0].clone() for n, i in zip(which, ids)] for _ in range(2)][-1]
            does = [lambda n=n, i=i, r=r: (runs[n](i)[0].clone(), r) for n, i, r in zip(which, ids, right)]
            done = in_turn(device, *does)
            wrong, kind = wrong_of(done), {0: "one model", 1: "two models", 2: "two groups"}[which[1]]
            llama.say(f"threads: {mode}, {kind}: {wrong} wrong of {len(done)}")
            assert wrong == 0
    assert carveout() == before


def check_state(device):
    """What a failed run leaves behind: nothing. And two groups woven into each other."""
    site, before = Inputs(device), carveout()
    groups = [dist.group.WORLD.group_name, dist.new_group(range(dist.get_world_size())).group_name]
    one, other = (Symmetric(group, device, False, 60.0, tuning.by_rule(dist.get_world_size())) for group in groups)
    for symmetric in (one, other):
        symmetric.prepare([Planned(slot, torch.bfloat16, (512, 8192), False) for slot in range(2)])
    try:
        with one.call(), other.call():
            one.start(Site(*site.arguments(0, 512), 4, 0))
            other.start(Site(*site.arguments(100, 512), 8, 1))
            assert carveout()[1] == 4
            raise KeyError
    except KeyError:
        assert carveout() == before
    for begin in (0, 200):
        one.start(Site(*site.arguments(begin, 512), 4, 0, 1))
        other.start(Site(*site.arguments(begin + 300, 512), 8, 0, 1))
        assert site.is_right(one.wait(0, True), begin) and carveout() != before
        assert site.is_right(other.wait(0, True), begin + 300)
        assert carveout() == before
    dist.barrier()
    llama.say("state: nothing is left behind by an exception, nor by two groups")


class Sublayers(torch.nn.Module):
    """Two MLPs of 8B shapes with their norms and residuals, and a last norm. Without attention, which has kernels that refuse no tokens."""

    def __init__(self):
        super().__init__()
        config = llama.SIZES["8B"]
        self.norms = torch.nn.ModuleList(llama.RMSNorm(config.hidden, config.eps) for _ in range(3))
        self.mlps = torch.nn.ModuleList(llama.MLP(config, dist.group.WORLD) for _ in range(2))
        for norm in self.norms:
            torch.nn.init.ones_(norm.weight)

    def forward(self, x):
        for norm, mlp in zip(self.norms, self.mlps):
            x = x + mlp(norm(x))
        return self.norms[2](x)


def check_empty(device):
    """No tokens, on every transport; compiled, and by hand."""
    torch.manual_seed(0)
    with device:
        model, x = Sublayers().to(torch.bfloat16), torch.randn(1, 64, llama.SIZES["8B"].hidden, dtype=torch.bfloat16)
    for name in ("peer", "process_group"):
        torch._dynamo.reset()
        run = compiled(model, **{"tokenweave.transport": name, "tokenweave.min_tokens": 32})
        hidden = run(x)
        assert tw_compile.reports()[-1].mode == "weave"
        assert run(x[:, :0]).shape == (1, 0, x.shape[-1]) and torch.equal(run(x), hidden)
        transport, _ = choose.choose(name, dist.group.WORLD.group_name, device)
        none, site = hidden[0, :0], (None, None, None, None, 1e-5, 1.0, 0.0, False)
        for fp32_residual in (False, True):
            transport.start(Site(none, *site, 8, 0, 0, fp32_residual, fp32_residual))
            pairs = transport.wait(0, True), transport.fused(Site(none, *site, 0, 2, 0, fp32_residual, fp32_residual), False)
            assert all(t.shape == none.shape for pair in pairs for t in pair)
    torch.cuda.synchronize()
    llama.say("empty: no tokens are none, on all transports")


def check_together(device):
    """What a rank cannot make no rank makes: a transport, or a workspace later on; and how much memory there is then."""
    group, rank = dist.group.WORLD.group_name, dist.get_rank()
    calls = [Planned(n, torch.bfloat16, (512 << n, 8192), n == 2) for n in range(3)]
    fails = RuntimeError("made to fail")

    def raises(*args, **kwargs):
        raise fails

    def on_rank_1(owner, name, do):
        with mock.patch.object(owner, name, raises) if rank == 1 else contextlib.nullcontext():
            return do()

    def settle(requested):
        choose.chosen.clear()
        return choose.choose(requested, group, device)

    for owner, name in ((Symmetric, "_kernel"), (symm_mem, "empty"), (Symmetric, "__init__")):
        transport, why_not = on_rank_1(owner, name, lambda: settle("auto"))
        assert transport.name == "process_group" and "made to fail" in why_not and "on rank 1" in why_not, why_not
    begin = time.perf_counter()
    transport, why_not = settle("auto")
    llama.say(f"together: {transport.name} after a self-test and a comparison of {time.perf_counter() - begin:.1f} s; {why_not}")
    assert transport.name == "peer"
    torch.cuda.synchronize()
    free, held = torch.cuda.mem_get_info()[0], transport.workspace_bytes()
    for owner, name in ((symm_mem, "empty"), (Symmetric, "_kernel")):
        try:
            on_rank_1(owner, name, lambda: transport.prepare(calls))
        except WorkspaceError as error:
            assert "failed on rank 1" in str(error) and "made to fail" in str(error), error
        else:
            raise AssertionError("it was made")
        assert transport.workspace_bytes() == held
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20), "memory is not given back"
    transport.prepare(calls)
    assert choose.workspace_bytes() == {device: transport.workspace_bytes()} and transport.workspace_bytes() > held
    site = Inputs(device)
    assert site.is_right(transport.fused(Site(*site.arguments(0, 512), 0, 0), False), 0)
    choose.chosen.clear()
    dist.barrier()
    llama.say("together: all ranks, or none")


def check_opaque(device):
    """Packed tokens and opaque paged attention, cut and whole, also under a CUDA graph: the error against float64 is that of eager."""
    config = replace(llama.SIZES["70B"], layers=LAYERS)
    with torch.device("meta"):
        model = opaque.Llama(config, dist.group.WORLD).to(torch.bfloat16).eval()
    llama.fill(model, config, device, None)
    opaque.allocate(model, config, max(SIZES))
    exact = exact_of(model)
    for refused in ("", "it is tested whole"):
        opaque.state.refused = refused
        torch._dynamo.reset()
        run = compiled(model)
        for tokens in SIZES:
            ids = inputs(config, device, tokens)
            right, eager, got = (f(ids)[0].clone() for f in (exact, model, run))  # with SDPA in the graph; with opaque attention
            report = tw_compile.reports()[-1]
            assert len(report.sites) == 2 * LAYERS + 1 and not report.refusals
            if report.mode == "weave":
                assert {each.reason for each in report.joins} == ({refused} if refused else set()), report
            errors = error(eager, right), error(got, right)
            llama.say(
                f"opaque: {tokens} tokens, {report.mode}, {len(report.joins)} unsplit, {report.alike} layers compiled as one: "
                f"error {errors[1]:.2e}, eager {errors[0]:.2e}"
            )
            assert errors[1] <= 1.1 * errors[0] < 0.05
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run(ids)[0]
            for cache in opaque.state.caches.values():
                cache.zero_()
            graph.replay()
            assert torch.equal(captured, got)
            del graph
    opaque.state.refused = ""


def check_hierarchical(device):
    """Four GPUs as two hosts of two, by name: the error beside the process group, the same bits on all ranks in every run, and ``auto``."""
    if (world := dist.get_world_size()) < 4:
        llama.say("hierarchical: it needs four GPUs")
        return
    model, config = build(device)
    ids, group = inputs(config, device, 2048), dist.group.WORLD.group_name
    usual = compiled(model, **{"tokenweave.transport": "process_group"})(ids)[0].double()
    choose.forget(group)
    with mock.patch.dict(os.environ, {link.HOST_NAME: str(dist.get_rank() // (world // 2))}):
        for bits, mode in itertools.product((16, 8), ("weave", "fuse")):
            torch._dynamo.reset()
            options = {
                "tokenweave.transport": "hierarchical",
                "tokenweave.wire": bits,
                "tokenweave.mode": mode,
                "triton.cudagraphs": True,
            }
            with mock.patch.object(threshold, "least_bytes", return_value=1):
                run = compiled(model, **options)
                results = [run(ids)[0].clone() for _ in range(4)]
            report = tw_compile.reports()[-1]
            name = "hierarchical" if bits == 16 else "hierarchical:8"
            assert (report.mode, report.transport) == (mode, name), report
            everybodys = [torch.empty_like(results[0]) for _ in range(world)]
            dist.all_gather(everybodys, results[0])
            assert all(torch.equal(each, results[0]) for each in [*results, *everybodys])
            llama.say(f"{name}, {mode}: {error(results[0], usual):.3f} from the process group")
            assert error(results[0], usual) < (4e-2 if bits == 16 else 0.1)
        transport, why_not = choose.choose("auto", group, device)
        assert transport.name in ("hierarchical", "process_group"), transport.name
        llama.say(f"hierarchical: auto takes {transport.name}; {why_not}")
    choose.forget(group)


def check_models(device):
    """Hugging Face models by their own plan, with CUDA's attention kernels: sites, unsplit ops and error as on CPU ranks."""
    import zoo

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    failures, batches = {}, itertools.cycle((1, 3))
    for name, model in zoo.MODELS.items():
        if not model.is_parallel:
            llama.say(f"models: {name} needs transformers {model.since}")
            continue
        if dist.get_rank() == 0:
            zoo.make(name, folder[0])
        dist.barrier()
        batch = next(batches)
        try:
            try_model(model, os.path.join(folder[0], name), name, batch, device)
        except Exception as error:  # on all ranks alike: the others are still checked
            failures[name] = error
            llama.say(f"models: {name}, batch {batch} FAILED: {error!r}"[:2000])
    for name, cache in itertools.product(("Llama", "Gemma 3"), ("static", "dynamic")):
        result = zoo.generate(os.path.join(folder[0], name), cache, device=device, do_sample=False)
        assert [report.mode for report in result.reports][:2] == ["weave", "fuse"]
        assert torch.equal(result.tokens, result.eager_tokens), (name, cache)
        llama.say(f"models: {name} generates the same tokens as eager, {cache} cache")
    assert not failures, failures


def main():
    names = sys.argv[1:] or [name.removeprefix("check_") for name in globals() if name.startswith("check_")]
    device = start()
    log_events()
    with torch.no_grad():
        for name in names:
            torch._dynamo.reset()
            begin = time.perf_counter()
            globals()[f"check_{name}"](device)
            gc.collect(), torch.cuda.empty_cache()
            llama.say(f"passed {name} in {time.perf_counter() - begin:.0f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
