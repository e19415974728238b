"""Ways to weave a layer: cuts, more than two pieces, attention that is not cut, numbers of CTAs, and GEMMs with and without an SM carveout.

    torchrun --nproc-per-node 8 benchmarks/schedule.py --model 70B --tokens 1024 2048 4096 8192

It runs the GEMMs, the attention and the sites of two layers, as autotuning does (tw_compile/autotune/schedule.py), but in CUDA graphs.
Writes benchmarks/results/schedule-*.json: one row for each way, with

    model, tp, tokens, pieces (tokens of each piece), whole_attention (whether attention and the GEMMs in front of it are not cut), ctas
    (of a communication kernel), carveout (whether cuBLASLt leaves it as many SMs), ms, speedup (over the fused form), vs_nocomm (over
    the form that is not cut and has no all-reduces)
"""

import argparse
import functools
from collections.abc import Iterable

import result_file
import timing
import torch
import torch.distributed as dist
import variants
from variants import llama

from tw_compile.autotune.schedule import Section, Stage
from tw_compile.transports import choose
from tw_compile.transports.symmetric import gemms


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=variants.MODELS, default="70B", help="shapes of the model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ctas", type=int, nargs="+", default=[4, 8, 16, 24])
    parser.add_argument("--samples", type=int, default=7)
    args = parser.parse_args()

    device, ranks = llama.start()
    stage = Ways(section_of(variants.MODELS[args.model], ranks, args.tokens), device)
    rows = []
    with torch.no_grad():
        stage.set()
        for tokens in args.tokens:
            rows += measure(stage, args.model, tokens, args.ctas, args.samples, device)
            note = "GEMMs, attention and sites of two layers; medians of the slowest rank"
            result_file.write(f"schedule-{args.model}-tp{ranks}", device, note, rows, transport=[stage.transport.name])
    dist.destroy_process_group()


def section_of(config, ranks, sizes):
    """The Section of two layers of a Llama on one of ``ranks`` ranks."""
    hidden, heads, kv_heads = config.hidden, config.heads // ranks, max(config.kv_heads // ranks, 1)
    q, kv, inner = heads * config.head_dim, kv_heads * config.head_dim, config.intermediate // ranks
    qkv = ("mm", hidden, q), ("mm", hidden, kv), ("mm", hidden, kv)
    attention = *qkv, ("attention", heads, kv_heads, config.head_dim), ("mm", q, hidden)
    mlp = ("mm", hidden, inner), ("mm", hidden, inner), ("mm", inner, hidden)
    return Section(hidden, "bfloat16", tuple(sizes), 1, 0, (attention, mlp) * 2, cuda_graphs=True)


class Ways(Stage):
    """A Stage that can also run without the sites, or with attention that is not cut."""

    def __init__(self, section, device):
        super().__init__(section, choose.choose("auto", dist.group.WORLD.group_name, device)[0], device)

    def compute(self, phase, norm, slot, sequence, before):
        """Run a phase on the tokens of ``norm``, which follow ``before`` tokens of the sequence. Returns the output of its last GEMM."""
        self.work(phase[:-1], norm, sequence, before)
        rows, columns = phase[-1][1:]
        return self.transport.linear(self._input(norm, rows), self.weights[rows, columns], None, slot)

    def without_sites(self, tokens):
        norm = self.value(tokens, self.section.hidden)
        for phase in self.section.phases:
            self.compute(phase, norm, 0, tokens, 0)

    def run_way(self, pieces, whole_attention, ctas, carveout):
        gemms.MAX_CTAS = ctas if carveout else 0
        if whole_attention:
            self.run_with_whole_attention(pieces, ctas)
        else:
            self.run(pieces, sum(pieces), ctas)

    def run_with_whole_attention(self, pieces, ctas):
        """Run attention and the GEMMs in front of it for all tokens, after the norms of all pieces. All other GEMMs are cut."""
        tokens, slots = sum(pieces), range(len(pieces))
        for number, phase in enumerate(self.section.phases):
            # Generators: the norm and residual of a piece are waited for when they are needed.
            first = ((self.value(pieces[slot], self.section.hidden), None) for slot in slots)
            halves: Iterable = (self.transport.wait(slot, True) for slot in slots) if number else first
            whole = any(op[0] == "attention" for op in phase)
            if whole:
                halves = list(halves)
                self.work(phase[:-1], torch.cat([norm for norm, _ in halves]), tokens, 0)
                parts = self.value(tokens, phase[-1][1]).split(pieces)
            for slot, (norm, residual) in enumerate(halves):
                if whole:
                    x = self.transport.linear(parts[slot], self.weights[phase[-1][1:]], None, slot)
                else:
                    x = self.compute(phase, norm, slot, tokens, sum(pieces[:slot]))
                self.transport.start(self.site(x, residual, ctas=ctas, slot=slot, number=number))
        for slot in slots:
            self.transport.wait(slot, True)


def measure(stage, model, tokens, ctas, samples, device):
    tile = 128
    eighth, third, quarter = tokens // 8, tokens // 3 // tile * tile, tokens // 4
    cuts = [[tokens // 2] * 2, [3 * eighth, 5 * eighth], [5 * eighth, 3 * eighth], [third, third, tokens - 2 * third], [quarter] * 4]
    plain = (tokens,), False, 0, False
    kinds = [*((tuple(pieces), False) for pieces in cuts), (tuple(cuts[0]), True)]  # and whether attention is whole
    keys = [plain, *((*kind, number, carveout) for kind in kinds for number in ctas for carveout in (False, True))]
    ways = {"no-comm": functools.partial(stage.without_sites, tokens)}
    ways |= {(pieces, *way): functools.partial(stage.run_way, list(pieces), *way) for pieces, *way in keys}
    for run in ways.values():
        run()
    torch.cuda.synchronize()
    max_ctas = gemms.MAX_CTAS
    times = timing.median_times({way: timing.recorded(run, device) for way, run in ways.items()}, device, samples, calls=2)
    gemms.MAX_CTAS = max_ctas
    bound = times.pop("no-comm")
    fused = times[plain]
    llama.say(f"{tokens} tokens: fused {fused * 1e3:.3f} ms, no-comm {fused / bound:.3f} ×")
    rows = []
    for (pieces, whole_attention, number, carveout), seconds in times.items():
        rows.append(
            {
                "model": model, "tp": dist.get_world_size(), "tokens": tokens, "pieces": pieces,
                "whole_attention": whole_attention, "ctas": number, "carveout": carveout,
                "ms": round(seconds * 1e3, 4), "speedup": round(fused / seconds, 3), "vs_nocomm": round(bound / seconds, 3),
            }
        )  # fmt: skip
        llama.say("  ".join(f"{name} {value}" for name, value in rows[-1].items() if name not in ("model", "tp", "tokens")))
    return rows


if __name__ == "__main__":
    main()
