"""Prefill time of a Llama's layers: tokenweave against Inductor with NCCL, and against the model without its all-reduces.

    torchrun --nproc-per-node 8 benchmarks/prefill.py --model 70B --layers 4 --tokens 512 1024 2048 4096 8192

All sides run in one process, in turns, so that drift meets all alike; each time is the median over the samples of the slowest
rank. Writes benchmarks/results/prefill-*.json, one row for each side and number of tokens, with

    model, tp, batch, tokens, side, cuda_graphs, ms, speedup (Inductor's time over this one), vs_nocomm (no-comm's over this one)
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist

import tw_compile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
import llama  # noqa: E402  (the example's model is the one that is measured)

SIDES = {
    "inductor": ("inductor", {}),
    "fuse": ("tokenweave", {"tokenweave.mode": "fuse"}),
    "weave": ("tokenweave", {"tokenweave.mode": "weave"}),
    "auto": ("tokenweave", {}),
    "no-comm": ("inductor", {}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("8B", "70B"), default="70B", help="shapes of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--ctas", type=int, nargs="*", default=[], help="further sides: auto with so many CTAs")
    parser.add_argument("--no-cuda-graphs", dest="cuda_graphs", action="store_false")
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()

    device, ranks = llama.start()
    if device.type != "cuda":
        sys.exit("this measures GPUs: start it with as many ranks as there are")
    config = replace(llama.SIZES[args.model], layers=args.layers)
    with torch.no_grad():
        times = {tokens: {} for tokens in args.tokens}
        runs = {name: compiled(config, device, args.cuda_graphs, *SIDES[name], reduce=name != "no-comm") for name in args.sides}
        for ctas in args.ctas:
            runs[f"auto-{ctas}"] = compiled(config, device, args.cuda_graphs, "tokenweave", {"tokenweave.ctas": ctas})
        for tokens in args.tokens:
            times[tokens] = measure(runs, config, device, args, tokens)
            show(tokens, times[tokens], config.layers)
            if dist.get_rank() == 0:
                write(rows(times, args, ranks), args, device)  # after each size, so that a run cut short leaves what it has
    torch._dynamo.reset()  # NCCL's communicator waits in vain for the CUDA graphs that hold it, while there are any
    dist.destroy_process_group()


def compiled(config, device, cuda_graphs, backend, options, reduce=True):
    """A compiled model with random weights; without ``reduce`` it has the same shapes and no all-reduces: wrong, and a bound."""
    with torch.device("meta"):
        model = llama.Llama(config, dist.group.WORLD).to(torch.bfloat16).eval()
    llama.fill(model, config, device, None)
    if not reduce:
        for module in model.modules():
            if isinstance(module, (llama.Row, llama.Embedding)):
                module.tp = None
    return torch.compile(model, backend=backend, options={"triton.cudagraphs": cuda_graphs, **options}, dynamic=True)


def measure(runs, config, device, args, tokens):
    # Words of the first rank's part of the vocabulary, so that the side without all-reduces can look them up too.
    ids = torch.randint(config.vocab // dist.get_world_size(), (args.batch, tokens), device=device)
    samples = {name: [] for name in runs}
    for sample in range(-3, args.samples):  # the first ones compile, record the CUDA graphs, and warm up
        for name, run in runs.items():
            seconds = torch.tensor(llama.time_of(run, ids, calls=2 if sample < 0 else 4), device=device)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if sample >= 0:
                samples[name].append(seconds.item() / 4 * 1e3)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def show(tokens, times, layers):
    cells = [f"{n} {times['inductor'] / t:5.2f}× ({t / layers:.3f} ms/layer)" for n, t in times.items() if "inductor" in times]
    llama.say(f"{tokens:6} tokens  " + "  ".join(cells))


def rows(times, args, ranks):
    for tokens, sides in times.items():
        for side, ms in sides.items():
            against = {f: sides[s] / ms for f, s in (("speedup", "inductor"), ("vs_nocomm", "no-comm")) if s in sides}
            yield {
                "model": args.model, "layers": args.layers, "tp": ranks, "batch": args.batch, "tokens": tokens, "side": side,
                "cuda_graphs": args.cuda_graphs, "ms": round(ms, 4), **{f: round(v, 3) for f, v in against.items()},
            }  # fmt: skip


def write(measured, args, device):
    result = {
        "machine": {"gpu": torch.cuda.get_device_name(device), "gpus": dist.get_world_size()},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))},
        "date": date.today().isoformat(),
        "command": "torchrun benchmarks/prefill.py " + " ".join(sys.argv[1:]),
        "transport": sorted({report.transport for report in tw_compile.reports() if report.transport}),
        "note": "dynamic shapes; ms of a whole forward pass with embedding, last norm and the last token's logits",
        "rows": list(measured),
    }
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"prefill-{args.model}-tp{dist.get_world_size()}{'' if args.cuda_graphs else '-nographs'}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("wrote", path.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
