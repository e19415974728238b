"""The time of a call on all ranks, from CUDA graphs."""

import statistics

import torch
import torch.distributed as dist

CALLS = 10  # in a CUDA graph


def time_of(run, l2, samples, device):
    """Microseconds of one call: the median over replays of a graph of CALLS calls, on the slowest rank."""
    if l2 == "warm":
        return replay_time(lambda: run(), samples, device)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # several times the L2

    def flushed_run():
        flush.zero_()
        run()

    return replay_time(flushed_run, samples, device) - replay_time(flush.zero_, samples, device)


def replay_time(run, samples, device):
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    align = torch.zeros(1, device=device)
    taken = []
    for sample in range(-3, samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.all_reduce(align)  # the ranks begin together
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if sample >= 0:
            taken.append(begin.elapsed_time(end) / CALLS * 1e3)
    slowest = torch.tensor(statistics.median(taken), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()
