"""The timing functions of the benchmarks. The time of a call is that of the slowest rank.

They measure several functions, as CUDA graphs and in turns; two functions on two streams at the same time; the host alone; and one call
from its beginning to its end.
"""

import functools
import random
import statistics
import time

import torch
import torch.distributed as dist

CALLS = 10  # calls of a small function in a CUDA graph


def recorded(run, device):
    """A function that replays ``run`` as a CUDA graph; on the CPU ``run`` itself. ``run`` must have run once before."""
    if device.type == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as NCCL's watchdog, may make calls that are not allowed in a capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def median_times(runs, device, samples, calls=4):
    """name -> seconds of a call: the median over samples of the slowest rank.

    runs:  name -> function
    calls: calls in a sample
    The runs take turns, so that drift affects all of them alike, each time in another order, as a GPU is slower after a busier run.
    """
    taken, turns = {name: [] for name in runs}, random.Random(0)
    for sample in range(-2, samples):  # the first two warm up
        for name in turns.sample(list(runs), len(runs)):
            seconds = seconds_of(runs[name], device, calls)
            if sample >= 0:
                taken[name].append(seconds / calls)
    return {name: statistics.median(row) for name, row in zip(taken, slowest([*taken.values()], device))}


def times_of(runs, l2, samples, device):
    """name -> microseconds of a call of a small function, as by ``median_times``. l2: "warm" for inputs in L2, or "cold" """
    if l2 == "cold":
        flush = torch.empty(256 << 20, dtype=torch.uint8, device=device).zero_  # several times the size of the L2
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
    """Seconds of ``calls`` calls in a row on this rank. The ranks begin together."""
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


def whole_seconds(run, device):
    """Seconds of one call on this rank, until the GPU has finished."""
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def times_beside(run, run_on_side, side, device, samples):
    """[microseconds of ``run`` on the current stream, microseconds of ``run_on_side`` on ``side``]: medians of the slowest rank."""
    taken, align, current = [], torch.zeros(1, device=device), torch.cuda.current_stream()
    for sample in range(-2, samples):
        torch.cuda.synchronize()
        dist.all_reduce(align)
        torch.cuda._sleep(5_000_000)  # the host enqueues everything before the GPU begins, so that the GPU alone is measured
        side.wait_stream(current)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        events[2].record(side)
        with torch.cuda.stream(side):
            run_on_side()
        events[3].record(side)
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        if sample >= 0:
            taken.append([events[i].elapsed_time(events[i + 1]) * 1e3 for i in (0, 2)])
    return slowest([statistics.median(times) for times in zip(*taken)], device)


def host_time(run, device, calls=100):
    """The host's microseconds for a call: the median, on the slowest rank."""
    taken = []
    for sample in range(-3, 30):
        torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        if sample >= 0:
            taken.append((time.perf_counter() - begin) / calls * 1e6)
    return slowest([statistics.median(taken)], device)[0]


def slowest(times, device):
    """The maximum over the ranks of each number in a list of numbers, or of lists of numbers. A collective."""
    of_all = torch.tensor(times, device=device)
    dist.all_reduce(of_all, dist.ReduceOp.MAX)
    return of_all.tolist()
