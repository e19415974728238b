"""The host's time of a call: what the backend adds to Inductor's, or takes from it, without CUDA graphs.

    torchrun --nproc-per-node 2 benchmarks/host.py --layers 8 --tokens 1

A tiny Llama, so that the host is the limit. All sides run in one process, in turns. Writes benchmarks/results/host-*.json, one row for each
side, with ``us``: CPU microseconds of the thread that calls, the least of all samples, which other programs on the machine change least,
on the slowest rank. The process group's own threads and the time for which a call waits for another rank do not count.
"""

import argparse
import time

import common
import result_file
import timing
import torch
import torch.distributed as dist
import variants
from variants import llama

common.SIDES["auto"] = ("tokenweave", {}, None)
SIDES = ("inductor", "fuse", "auto")
CALLS = 5  # in a sample


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=common.SIDES, default=SIDES)
    parser.add_argument("--samples", type=int, default=30)
    args = parser.parse_args()

    device, ranks = llama.start()
    with torch.no_grad():
        model, config = variants.build("tiny", args.layers, device)
        sides = [common.Side(name, model, dynamic=False) for name in args.sides]
        ids = torch.randint(config.vocab // ranks, (1, args.tokens), device=device)
        for side in sides:
            side.warm_up(ids)
        taken = {side.name: [] for side in sides}
        for sample in range(-2, args.samples):
            for side in sides:
                seconds = cpu_seconds(side.run, ids)
                if sample >= 0:
                    taken[side.name].append(seconds / CALLS * 1e6)
        least = timing.slowest([*map(min, taken.values())], device)
    size = {"layers": args.layers, "tokens": args.tokens, "tp": ranks}
    rows = [{**size, "side": side.name, "mode": side.mode, "us": round(us)} for side, us in zip(sides, least)]
    llama.say("  ".join(f"{row['side']} {row['us']} µs" for row in rows))
    result_file.write(f"host-tp{ranks}", device, "CPU time of a call, without CUDA graphs", rows)
    dist.destroy_process_group()


def cpu_seconds(run, ids):
    begin = time.thread_time()
    for _ in range(CALLS):
        run(ids)
    return time.thread_time() - begin


if __name__ == "__main__":
    main()
