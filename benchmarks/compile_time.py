"""Compile time of a deep, narrow Llama in seconds: tokenweave against Inductor, with empty and with full caches.

    torchrun --nproc-per-node 4 benchmarks/compile_time.py --layers 80 [--regions]

Each figure comes from new processes: the time of the first forward pass less that of the second one, on the slowest rank. ``cold``
begins with an empty cache directory, ``warm`` with the directory of ``cold``. The number of ops does not depend on the width of a layer.

With ``--regions`` each layer is marked by ``torch.compiler.nested_compile_region``, for all sides, and shapes are static. With dynamic
shapes Inductor does not take a number of a module, such as the eps of a norm, into a region, and PyTorch would break the graph.

Writes benchmarks/results/compile-*.json, one row for each side and cache, with

    ratio (seconds / Inductor's seconds), layers, tp, tokens, side, cache, seconds, passes_seconds (the part in this package's passes)
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

import common
import timing
import torch
import torch.distributed as dist
import variants
from variants import llama

from tw_compile import passes

SIDES = ("inductor", "fuse", "weave")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--regions", action="store_true", help="mark each layer as one that is to be compiled once")
    parser.add_argument("--side", choices=SIDES, help="only compile for this one, and print what it took")
    args = parser.parse_args()
    device, ranks = llama.start()
    if args.side:
        print(json.dumps(compile_once(args, device)))
    else:
        rows = []
        for side in SIDES:
            for row in in_new_processes(side, args):
                inductor = next((r["seconds"] for r in rows if r["cache"] == row["cache"]), row["seconds"])
                rows.append({"ratio": round(row["seconds"] / inductor, 3), **row})
                llama.say(f"{rows[-1]['ratio']:.2f} of Inductor's time:", row)
            kind = "static" if args.regions else "dynamic"
            note = f"the example's tiny Llama, {kind} shapes; seconds with Dynamo's; the passes are not run where the cache is warm"
            common.write(f"compile-{'regions-' if args.regions else ''}tp{ranks}", device, note, rows)
    dist.destroy_process_group()


def in_new_processes(side, args):
    """Start this script in a new process on each rank, first with an empty cache, then with the cache of the first time. Yields rows."""
    size = {"layers": args.layers, "tp": dist.get_world_size(), "tokens": args.tokens}
    with tempfile.TemporaryDirectory() as own:
        for cache in ("cold", "warm"):
            shared = [(own, free_port())]
            dist.broadcast_object_list(shared)
            folder, port = shared[0]
            variables = {"TORCHINDUCTOR_CACHE_DIR": folder, "TW_COMPILE_CACHE_DIR": folder, "MASTER_PORT": str(port)}
            # The new processes need a store of their own: this process uses torchrun's.
            environment = {**os.environ, **variables, "TORCHELASTIC_USE_AGENT_STORE": "False"}
            command = [sys.executable, __file__, "--side", side, "--layers", str(args.layers), "--tokens", str(args.tokens)]
            command += ["--regions"] if args.regions else []
            printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            dist.barrier()  # rank 0 removes the cache directory of all ranks after this
            yield {**size, "side": side, "cache": cache, **json.loads(printed.splitlines()[-1])}


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("", 0))
        return any_port.getsockname()[1]


def compile_once(args, device):
    """Seconds of the compilation on the slowest rank, and of the part in the passes."""
    in_passes = timed_passes()
    if args.regions:
        llama.Layer.forward = torch.compiler.nested_compile_region(llama.Layer.forward)
    with torch.no_grad():
        model, config = variants.build("tiny", args.layers, device)
        ids = torch.randint(config.vocab, (1, args.tokens), device=device)
        run = common.Side(args.side, model, dynamic=not args.regions).run
        dist.barrier()  # opens the connections, which must not count as compile time
        first, second = (timing.whole_seconds(functools.partial(run, ids), device) for _ in range(2))
    slowest = timing.slowest([first - second, sum(in_passes)], device)
    return dict(zip(("seconds", "passes_seconds"), (round(each, 3) for each in slowest)))


def timed_passes():
    """A list to which each later run of the passes adds its seconds."""
    taken, rewrite = [], passes.rewrite

    def timed(*args):
        begin = time.perf_counter()
        result = rewrite(*args)
        taken.append(time.perf_counter() - begin)
        return result

    passes.rewrite = timed
    return taken


if __name__ == "__main__":
    main()
