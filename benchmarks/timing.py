"""How long a call takes on all ranks, as a CUDA graph: of one function among others in turns, or of a small one alone."""

import random
import statistics
import time

import torch
import torch.distributed as dist

CALLS = 10  # of a small function, in a CUDA graph


def recorded(run, device):
    """``run`` as a CUDA graph, to be called; on the CPU ``run`` itself. It must have run before."""
    if device.type == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that watches NCCL, may go on with what a capture would not allow.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def median_times(runs, device, samples, calls=4):
    """Seconds of a call of each: the median over samples of the slowest rank.

    The runs take turns, so that drift meets all alike, each time in another order: a GPU that has just been busier is slower.
    """
    taken, turns = {name: [] for name in runs}, random.Random(0)
    for sample in range(-2, samples):  # the first two warm up
        for name in turns.sample(list(runs), len(runs)):
            seconds = seconds_of(runs[name], device, calls)
            if sample >= 0:
                taken[name].append(seconds / calls)
    slowest = torch.tensor([*taken.values()], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {name: statistics.median(row) for name, row in zip(taken, slowest.tolist())}


def time_of(run, l2, samples, device):
    """Microseconds of a call, its input in L2 (``warm``) or not (``cold``), as ``replay_time`` has them."""
    if l2 == "warm":
        return replay_time(run, samples, device)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # several times the L2

    def flushed_run():
        flush.zero_()
        run()

    return replay_time(flushed_run, samples, device) - replay_time(flush.zero_, samples, device)


def replay_time(run, samples, device):
    """Microseconds of a call: the median over replays of a graph of CALLS calls, on the slowest rank."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()

    def several():
        for _ in range(CALLS):
            run()

    replay = recorded(several, device)
    taken = [seconds_of(replay, device) for _ in range(-3, samples)][3:]  # the first three warm up
    slowest = torch.tensor(statistics.median(taken) / CALLS * 1e6, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def seconds_of(run, device, calls=1):
    """Seconds of ``calls`` calls in a row on this rank; the ranks begin together."""
    dist.all_reduce(torch.zeros(1, device=device))
    if device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
