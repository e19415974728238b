"""Ways to weave a layer: cuts, more than two pieces, numbers of CTAs, and GEMMs that are told of them or not.

    torchrun --nproc-per-node 8 benchmarks/schedule.py --model 70B --tokens 1024 2048 4096 8192

Two layers' GEMMs, attention and sites alone, as a rehearsal runs them (tw_compile/rehearsal.py), but in CUDA graphs. Writes
benchmarks/results/schedule-*.json: one row for each way, with

    model, tp, tokens, pieces (tokens of each), ctas (of a communication kernel), told (cuBLASLt of the SMs that are left), ms,
    speedup (over the fused sites, not woven), vs_nocomm (over no all-reduces, not cut)
"""

import argparse
import functools

import result_file
import timing
import torch
import torch.distributed as dist
import variants
from variants import llama

from tw_compile.ops import gemms, transport
from tw_compile.rehearsal import Section, Stage


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=variants.MODELS, default="70B", help="shapes of the model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ctas", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--samples", type=int, default=7)
    args = parser.parse_args()

    device, ranks = llama.start()
    stage = WithoutComm(section_of(variants.MODELS[args.model], ranks, args.tokens), device)
    rows = []
    with torch.no_grad():
        stage.set()
        for tokens in args.tokens:
            rows += measure(stage, args.model, tokens, args.ctas, args.samples, device)
            note = "GEMMs, attention and sites of two layers; medians of the slowest rank"
            result_file.write(f"schedule-{args.model}-tp{ranks}", device, note, rows, transport=[stage.carrier.name])
    dist.destroy_process_group()


def section_of(config, ranks, sizes):
    """Two layers of a Llama on one of ``ranks`` ranks."""
    hidden, heads, kv_heads = config.hidden, config.heads // ranks, max(config.kv_heads // ranks, 1)
    q, kv, inner = heads * config.head_dim, kv_heads * config.head_dim, config.intermediate // ranks
    attention = ("mm", hidden, q), ("mm", hidden, kv), ("mm", hidden, kv), ("attention", heads, kv_heads, config.head_dim), ("mm", q, hidden)
    mlp = ("mm", hidden, inner), ("mm", hidden, inner), ("mm", inner, hidden)
    return Section(hidden, "bfloat16", tuple(sizes), 1, 0, (attention, mlp) * 2)


class WithoutComm(Stage):
    """A stage that can leave out the sites."""

    def __init__(self, section, device):
        super().__init__(section, transport.choose("auto", dist.group.WORLD.group_name, device)[0], device)

    def without_sites(self, tokens):
        norm = self.value(tokens, self.section.hidden)
        for phase in self.section.phases:
            self.compute(phase, norm, 0, tokens, 0)

    def run_told(self, pieces, ctas, told):
        gemms.MAX_CTAS = ctas if told else 0
        self.run(pieces, sum(pieces), ctas)


def measure(stage, model, tokens, ctas, samples, device):
    tile = 128
    eighth, third, quarter = tokens // 8, tokens // 3 // tile * tile, tokens // 4
    cuts = [[tokens // 2] * 2, [3 * eighth, 5 * eighth], [5 * eighth, 3 * eighth], [third, third, tokens - 2 * third], [quarter] * 4]
    ways = {"no-comm": functools.partial(stage.without_sites, tokens), ((tokens,), 0, False): functools.partial(stage.run_told, [tokens], 0, False)}
    for pieces in cuts:
        for number in ctas:
            for told in (False, True):
                ways[tuple(pieces), number, told] = functools.partial(stage.run_told, pieces, number, told)
    for run in ways.values():
        run()
    torch.cuda.synchronize()
    max_ctas = gemms.MAX_CTAS
    times = timing.median_times({way: timing.recorded(run, device) for way, run in ways.items()}, device, samples, calls=2)
    gemms.MAX_CTAS = max_ctas
    bound = times.pop("no-comm")
    fused = times[(tokens,), 0, False]
    llama.say(f"{tokens} tokens: fused {fused * 1e3:.3f} ms, no-comm {fused / bound:.3f} ×")
    rows = []
    for (pieces, number, told), seconds in times.items():
        rows.append(
            {
                "model": model, "tp": dist.get_world_size(), "tokens": tokens, "pieces": pieces, "ctas": number, "told": told,
                "ms": round(seconds * 1e3, 4), "speedup": round(fused / seconds, 3), "vs_nocomm": round(bound / seconds, 3),
            }
        )  # fmt: skip
        llama.say("  ".join(f"{name} {value}" for name, value in rows[-1].items() if name not in ("model", "tp", "tokens")))
    return rows


if __name__ == "__main__":
    main()
