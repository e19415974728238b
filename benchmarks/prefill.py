"""Prefill time of a Llama's layers: tokenweave against Inductor with NCCL, and against the model without its all-reduces.

    torchrun --nproc-per-node 8 benchmarks/prefill.py --model 70B --layers 4 --tokens 512 1024 2048 4096 8192
    torchrun --nproc-per-node 2 benchmarks/prefill.py --model 70B --quant fp8-row

``--link host`` keeps NCCL off peer memory, so that it goes through the host's memory, as on machines without NVLink; ``socket`` off shared
memory too, as between hosts. Our sides then use the process group. ``--wire 16 8 4`` measures them with each number of bits of a value.
The table of docs/wire.md is

    torchrun --nproc-per-node 2 benchmarks/prefill.py --model 8B --link host --wire 16 8 6 4 --wire-from 1024 \\
        --tokens 1 16 64 1024 4096 8192 --sides inductor auto no-comm --samples 5 --seconds 400

Beside a GEMM that has all SMs, NCCL's kernels wait: autotuning leaves them SMs where that is faster. ``--high-priority`` lets them begin
before the waiting thread blocks of GEMMs, and ``--nccl-ctas 8`` makes them fit into the SMs that are left.

All sides run in one process, each as a CUDA graph, in turns. Writes benchmarks/results/prefill-*.json after each size, so that a run
that is interrupted keeps its results. common.py describes the sides and the rows.
"""

import argparse
import itertools
import os
import time

import common
import opaque
import quantisation
import timing
import torch
import torch.distributed as dist
import variants
from variants import llama

# Inductor chooses the block sizes of its kernels for the first size that a graph is compiled for, also with dynamic shapes: the kernels
# for 4 tokens take twice as long at 4096. So all sides are compiled again for the first size with this number of tokens, without caches.
LARGE = 1024
torch._inductor.config.force_disable_caches = True
ATTENTION = {"sdpa": llama.Llama, "opaque": opaque.Llama, "opaque-whole": opaque.Llama}

# link -> what keeps NCCL off faster ones
LINKS = {
    "nvlink": {},
    "host": {"NCCL_P2P_DISABLE": "1"},
    "socket": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=variants.MODELS, default="70B", help="shapes of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="of each sequence")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences")
    parser.add_argument("--sides", nargs="+", choices=common.SIDES, default=list(common.SIDES))
    quantisation.add_option(parser)
    parser.add_argument(
        "--attention", choices=ATTENTION, default="sdpa", help="in the graph, or opaque to the compiler (opaque.py): cut in two, or whole"
    )
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--wire", type=int, nargs="+", choices=(16, 8, 6, 4), default=[16], help="bits of a value over the process group")
    parser.add_argument("--wire-from", type=int, default=0, help="fewest tokens that are measured with fewer bits than 16")
    parser.add_argument("--link", choices=LINKS, default="nvlink", help="the fastest link that NCCL may use")
    parser.add_argument("--high-priority", action="store_true", help="NCCL's streams have a high priority, for all sides")
    parser.add_argument("--nccl-ctas", type=int, default=0, help="the most CTAs of a kernel of NCCL's, for all sides; 0 for its own choice")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no further size is begun after so many seconds")
    args = parser.parse_args()

    # All are read when the first group is made.
    os.environ.update(LINKS[args.link])
    os.environ.update({"TORCH_NCCL_HIGH_PRIORITY": "1"} if args.high_priority else {})
    os.environ.update({"NCCL_MAX_CTAS": str(args.nccl_ctas)} if args.nccl_ctas else {})
    options = {} if args.link == "nvlink" else {"tokenweave.transport": "process_group"}
    device, ranks = llama.start()
    measured_rows, begin = [], time.monotonic()
    sizes = sorted(itertools.product(args.batch, args.tokens), key=lambda size: size[0] * size[1])
    compiled_for = sizes[:1] + [(batch, tokens) for batch, tokens in sizes if batch * tokens >= LARGE][:1]
    with torch.no_grad():
        model, config = variants.build(args.model, args.layers, device, ATTENTION[args.attention])
        quantisation.quantised(model, args.quant)
        if args.attention != "sdpa":
            assert args.batch == [1], "opaque attention takes packed tokens"
            opaque.allocate(model, config, max(args.tokens))
            opaque.state.refused = "it is measured whole" if args.attention == "opaque-whole" else ""
        for batch, tokens in sizes:
            (seconds,) = timing.slowest([time.monotonic() - begin], device)
            if seconds > args.seconds:
                llama.say(f"{seconds:.0f} s: {tokens} tokens and more are left out")
                break
            llama.say(f"{seconds:.0f} s: {batch} × {tokens} tokens")
            if (batch, tokens) in compiled_for:
                torch._dynamo.reset()
                names = quantisation.able(args.sides, args.quant)
                ours = {name for name in names if common.SIDES[name][0] == "tokenweave"}
                sides = [
                    common.Side(name, model, options=options, wire=wire) for name in names for wire in (args.wire if name in ours else [16])
                ]
            kinds = {"quant": args.quant, "link": args.link}
            kinds |= {name: getattr(args, name) for name in ("high_priority", "nccl_ctas") if getattr(args, name)}
            size = {"model": args.model, "layers": args.layers, "batch": batch, "tokens": tokens} | kinds
            # Tokens in the first rank's part of the vocabulary, as the side without all-reduces can look up only its own part.
            ids = torch.randint(config.vocab // ranks, (batch, tokens), device=device)
            able = [side for side in sides if side.name != "weave" or batch * tokens > 1]  # one token cannot be split
            able = [side for side in able if side.wire == 16 or batch * tokens >= args.wire_from]
            measured = common.measure(able, (ids,), args.samples)
            common.show(size, measured)
            measured_rows += common.rows(size, measured, device)
            common.write(
                quantisation.name("prefill", args.model, args.quant, ranks)
                + ("" if args.batch == [1] else "-batches")
                + ("" if args.attention == "sdpa" else f"-{args.attention}")
                + _suffix(args.link, args.wire)
                + ("-high-priority" if args.high_priority else "")
                + (f"-{args.nccl_ctas}-ctas" if args.nccl_ctas else ""),
                device,
                "dynamic shapes; ms of a whole forward pass with embedding, last norm and the last token's logits",
                measured_rows,
            )
    dist.destroy_process_group()


def _suffix(link, wire):
    return ("" if link == "nvlink" else f"-{link}") + ("" if wire == [16] else f"-wire{'-'.join(map(str, wire))}")


if __name__ == "__main__":
    main()
