"""A timeline of one layer of a woven forward pass, from the profiler: which kernels run at the same time.

    torchrun --nproc-per-node 4 benchmarks/timeline.py --model 70B --layers 4 --tokens 4096

It takes two profiles on rank 0. Replays of a CUDA graph, without delays by the host, give the times of an inner layer, from the norm of
its input's first half to the norm of its output's first half. Passes without a CUDA graph give the order of launches. From these it
prints the kernels between each row-parallel GEMM and the communication kernel after it: there should be none.

Writes benchmarks/results/timeline-*.json, whose rows are kernels: name, kind, lane, start and us (microseconds). plot.py draws it.
"""

import argparse
import functools
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import common
import timing
import torch
import torch.distributed as dist
import variants
from variants import llama

from tw_compile import html

PASSES = 5  # passes that are profiled; the one with the median time is shown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=variants.MODELS, default="70B", help="shapes of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True  # a cached graph may be compiled for another size: see prefill.py

    device, ranks = llama.start()
    with torch.no_grad():
        model, config = variants.build(args.model, args.layers, device)
        side = common.Side("weave", model)
        ids = torch.randint(config.vocab, (1, args.tokens), device=device)
        side.warm_up(ids)
        run = functools.partial(side.run, ids)
        launched, replayed = profile(run), profile(timing.recorded(run, device))
    if dist.get_rank() == 0:
        launches = sorted(launched, key=lambda event: event["launch"])
        llama.say("kernels from a row-parallel GEMM to the communication kernel after it, by order of launches:")
        for names, count in Counter(between(launches, args.layers)).items():
            llama.say(f"  {count} ×", " | ".join(names))
        rows = inner_layer(replayed, args.layers)
        for row in rows:
            llama.say(f"  {row['start']:8.1f} {row['us']:7.1f} µs  {row['lane']:13}  {row['kind']:17}  {row['name'][:100]}")
        common.write(
            f"timeline-{args.model}-tp{ranks}",
            device,
            f"one layer of {args.model} shapes, {args.tokens} tokens, rank 0, in a CUDA graph, under the profiler",
            rows,
        )
    dist.destroy_process_group()


def profile(run):
    """The kernels of PASSES runs on this rank, in order of time."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PASSES):
            dist.barrier()
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels(json.loads(path.read_text())["traceEvents"])


def kernels(trace):
    """The kernels, copies and memsets among the events of a Chrome trace, in order of time. launch: increases in the order of launches"""
    found = [
        {
            "name": event["name"],
            "kind": kind_of(event["name"]),
            "start": event["ts"],
            "us": event["dur"],
            "launch": event["args"].get("correlation", 0),
        }
        for event in trace
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda event: event["start"])


def kind_of(name):
    """The kind of a kernel, as in the pages of reports. The process group is NCCL here."""
    kind = html.kind_of(name)
    return "NCCL" if kind == "process group" else kind


def is_communication(event):
    return event["kind"] == "all-reduce + norm"


def sites(events, layers):
    """For each whole pass, the indices of its communication kernels in ``events``. The profiler may miss the first kernels."""
    in_pass = 2 * (2 * layers + 1)  # two sites in each layer and one after the embedding, with a kernel for each half
    at = [i for i, event in enumerate(events) if is_communication(event)]
    at = at[len(at) % in_pass :]
    if not at:
        sys.exit(f"the profiler has seen {len(events)} kernels on this GPU, and no whole pass among them")
    return [at[i : i + in_pass] for i in range(0, len(at), in_pass)]


def between(launches, layers):
    """For each communication kernel except those after the embedding, the names of the kernels from the GEMM before it to itself."""
    for at in sites(launches, layers):
        for site in at[2:]:
            gemm = max(i for i in range(site) if launches[i]["kind"] == "GEMM")
            yield tuple(short(event["name"]) for event in launches[gemm : site + 1])


def short(name):
    return name.removeprefix("void ").split("<")[0].split("(")[0][:60]


def inner_layer(events, layers):
    """The kernels of the middle layer, clipped to its time, in the pass in which its time is the median.

    Site ``2 * i`` computes the input of layer i.
    """
    first = 2 * 2 * (layers // 2)
    windows = []
    for at in sites(events, layers):
        begin, end = (events[at[number]] for number in (first, first + 4))
        windows.append((begin["start"] + begin["us"], end["start"] + end["us"]))
    begin, end = sorted(windows, key=lambda window: window[1] - window[0])[len(windows) // 2]
    rows = []
    for event in events:
        start, stop = max(event["start"], begin), min(event["start"] + event["us"], end)
        if start < stop:
            lane = "communication" if is_communication(event) else "compute"
            times = {"start": round(start - begin, 2), "us": round(stop - start, 2)}
            rows.append({"name": event["name"], "kind": event["kind"], "lane": lane, **times})
    return rows


if __name__ == "__main__":
    main()
