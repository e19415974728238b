"""How long a call takes on all ranks, as a CUDA graph: of functions in turns, lest what the GPUs do between them decides."""

import functools
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


def times_of(runs, l2, samples, device):
    """Microseconds of a call of each small function, its input in L2 (``warm``) or not (``cold``), as ``median_times`` has them."""
    if l2 == "cold":
        flush = torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_  # several times the L2
        runs = {name: functools.partial(_one_after_the_other, (flush, run)) for name, run in runs.items()} | {flush: flush}
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    graphs = {name: recorded(functools.partial(_one_after_the_other, (run,) * CALLS), device) for name, run in runs.items()}
    times = {name: seconds / CALLS * 1e6 for name, seconds in median_times(graphs, device, samples, calls=1).items()}
    if l2 == "cold":
        flushing = times.pop(flush)
        times = {name: us - flushing for name, us in times.items()}
    return times


def _one_after_the_other(runs):
    for run in runs:
        run()


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
