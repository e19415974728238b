"""Draw a result file, beside it: speedup over the size for prefill and decode, kernels over time for a timeline, and for
kernel.py the time of the fused kernel over that of NCCL and Inductor.

    python benchmarks/plot.py benchmarks/results/prefill-70B-tp4.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "tokenweave"  # the same file for the same figures
from matplotlib import pyplot as plt  # noqa: E402

KIND_COLOURS = {
    "GEMM": "#4477aa",
    "attention": "#66ccee",
    "all-reduce + norm": "#ee6677",
    "elementwise": "#ccbb44",
    "NCCL": "#aa3377",
}
SIDE_COLOURS = {
    "eager": "#bbbbbb",
    "inductor": "#000000",
    "inductor-symm": "#4477aa",
    "fuse": "#ccbb44",
    "weave": "#ee6677",
    "auto": "#228833",
    "no-comm": "#aa3377",
}


def main():
    for path in map(Path, sys.argv[1:]):
        result = json.loads(path.read_text())
        fields = result["rows"][0]
        figure = (timeline if "lane" in fields else kernels if "ctas" in fields else speedups)(result)
        figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
        print("wrote", path.with_suffix(".svg"))


def kernels(result):
    """A line for each number of CTAs, over the tokens; of the largest hidden size."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines, hidden = {}, max(row["hidden"] for row in result["rows"])
    for row in result["rows"]:
        if (row["hidden"], row["l2"]) == (hidden, "warm"):
            lines.setdefault(row["ctas"], {})[row["tokens"]] = row["ratio"]
    for ctas, ratios in lines.items():
        axes.plot(ratios.keys(), ratios.values(), marker="o", markersize=3, label=f"{ctas} CTAs" if ctas else "by itself")
    ticks = sorted({row["tokens"] for row in result["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, ticks, rotation=45)
    axes.minorticks_off()
    axes.set_ylim(0, 1.5)
    axes.set_xlabel("tokens")
    axes.set_ylabel("time over NCCL and compiled add and norm")
    axes.legend(title=f"{result['rows'][0]['ranks']} × {result['machine']['gpu']}, {hidden} channels")
    axes.grid(alpha=0.3)
    return figure


def speedups(result):
    """A line for each side, over the tokens of a forward pass."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    lines = {}
    for row in result["rows"]:
        lines.setdefault((row["side"], row["batch"] if row["tokens"] > 1 else 0), []).append(row)
    batches = {batch for _, batch in lines}
    for (side, batch), rows in lines.items():
        x = [row["batch"] * row["tokens"] for row in rows]
        label = side if len(batches) == 1 else f"{side}, batch {batch}"
        style = ("-", "--", ":", "-.")[sorted(batches).index(batch) % 4]
        y = [row["speedup"] for row in rows]
        axes.plot(x, y, style, marker="o", markersize=3, color=SIDE_COLOURS[side], label=label)
    ticks = sorted({row["batch"] * row["tokens"] for row in result["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, ticks, rotation=45)
    axes.minorticks_off()
    axes.set_xlabel("tokens of a forward pass")
    axes.set_ylabel("times as fast as Inductor with NCCL")
    row, machine = result["rows"][0], result["machine"]
    where = f"{row['tp']} × {machine.get('gpu') or machine['cpu']}"
    axes.set_title(f"{row['model']} shapes, {row['layers']} layers, {where}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def timeline(result):
    """Two lanes, of which each kernel is a box."""
    figure, axes = plt.subplots(figsize=(11, 2.2))
    rows, lanes = result["rows"], ("communication", "compute")
    for kind, colour in KIND_COLOURS.items():
        for height, lane in enumerate(lanes):
            boxes = [(row["start"], row["us"]) for row in rows if row["kind"] == kind and row["lane"] == lane]
            axes.broken_barh(boxes, (height - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3)
    present = [kind for kind in KIND_COLOURS if any(row["kind"] == kind for row in rows)]
    axes.legend(
        [plt.Rectangle((0, 0), 1, 1, color=KIND_COLOURS[kind]) for kind in present],
        present, ncols=len(present), loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False,
    )  # fmt: skip
    axes.set_xlim(0, max(row["start"] + row["us"] for row in rows))
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel(f"µs    ({result['note']})", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
