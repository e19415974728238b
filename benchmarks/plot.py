"""Draws a result file as an SVG file beside it: the speed-up by size for prefill and decode, the kernels by time for a timeline, and for
kernel.py the time of the fused kernel relative to NCCL and Inductor.

    python benchmarks/plot.py benchmarks/results/prefill-70B-tp4.json
    python benchmarks/plot.py --overview benchmarks/results/prefill-{8B,70B}-tp{2,4}.json

With --overview it draws the side ``auto`` of several prefill files in one picture, overview.svg beside the first file, for the README.
It needs matplotlib and no GPU.
"""

import argparse
import json
from pathlib import Path

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
SIDE_NAMES = {
    "inductor": "Inductor, NCCL",
    "inductor-symm": "Inductor, symmetric memory",
    "no-comm": "no all-reduces",
}
MODEL_COLOURS = "#4477aa", "#ee6677", "#228833", "#aa3377"
STYLES = "-", "--", ":", "-."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="result files, benchmarks/results/*.json")
    parser.add_argument("--overview", action="store_true", help="the side auto of several prefill files in one picture")
    args = parser.parse_args()
    results = {path: json.loads(path.read_text()) for path in args.files}
    if args.overview:
        save(overview(list(results.values())), args.files[0].with_name("overview.svg"))
        return
    for path, result in results.items():
        fields = result["rows"][0]
        draw = timeline if "lane" in fields else kernels if "ctas" in fields else speedups
        save(draw(result), path.with_suffix(".svg"))


def subplots(*args, **kwargs):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tokenweave"  # the same file for the same figures
    from matplotlib import pyplot

    return pyplot.subplots(*args, **kwargs)


def save(figure, path):
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    print("wrote", path)


# --- data ------------------------------------------------------------------------------------------------------------


def sides(result):
    """Label -> (side, index of the batch size, [(tokens of a forward pass, speedup)]), one for each line of ``speedups``.

    A prefill file has a line for each side and batch size. A decode file, where each sequence has one token, has a line for each side,
    along which the batch size varies.
    """
    is_decode = decodes(result)
    batches = [1] if is_decode else sorted({row["batch"] for row in result["rows"]})
    lines, order = {}, list(SIDE_COLOURS)
    for row in sorted(result["rows"], key=lambda row: order.index(row["side"])):
        batch = 1 if is_decode else row["batch"]
        label = SIDE_NAMES.get(row["side"], row["side"]) + (f", batch {batch}" if len(batches) > 1 else "")
        _, _, points = lines.setdefault(label, (row["side"], batches.index(batch), []))
        points.append((row["batch"] * row["tokens"], row["speedup"]))
    return lines


def decodes(result):
    return all(row["tokens"] == 1 for row in result["rows"])


def ctas(result, hidden):
    """CTAs -> [(tokens, time relative to NCCL and Inductor)] for a hidden size and inputs that are in L2."""
    lines = {}
    for row in result["rows"]:
        if (row["hidden"], row["l2"]) == (hidden, "warm"):
            lines.setdefault(row["ctas"], []).append((row["tokens"], row["ratio"]))
    return lines


def panels(results):
    """Number of ranks, in descending order -> [(model, points of auto, points of no-comm)], smallest model first.

    results: prefill files
    A point of auto is (tokens, speedup, whether it was woven); a point of no-comm is (tokens, speedup).
    """
    found = {}
    for result in results:
        rows = [row for row in result["rows"] if row["batch"] == 1]
        auto = [(row["tokens"], row["speedup"], row["mode"] == "weave") for row in rows if row["side"] == "auto"]
        bound = [(row["tokens"], row["speedup"]) for row in rows if row["side"] == "no-comm"]
        found.setdefault(rows[0]["tp"], []).append((rows[0]["model"], auto, bound))
    return {ranks: sorted(found[ranks], key=lambda line: (len(line[0]), line[0])) for ranks in sorted(found, reverse=True)}


# --- figures ---------------------------------------------------------------------------------------------------------


def speedups(result):
    """A line for each side, over the tokens of a forward pass."""
    figure, axes = subplots(figsize=(7, 4.5))
    for label, (side, batch, points) in sides(result).items():
        style = STYLES[batch % len(STYLES)]
        axes.plot(*zip(*points), style, marker="o", markersize=3, color=SIDE_COLOURS[side], label=label)
    what, label = ("decode", "sequences") if decodes(result) else ("prefill", "tokens of a forward pass")
    over_tokens(axes, {row["batch"] * row["tokens"] for row in result["rows"]}, label)
    axes.set_ylabel("times as fast as Inductor with NCCL")
    row, machine = result["rows"][0], result["machine"]
    where = f"{row['tp']} × {machine.get('gpu') or machine['cpu']}"
    quant = "" if row.get("quant", "none") == "none" else f" {row['quant']}"
    axes.set_title(f"{what}, {row['model']}{quant} shapes, {row['layers']} layers, {where}", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def overview(results):
    """A panel for each number of ranks, with a line for each model, and a dashed line for the model without all-reduces."""
    by_ranks = panels(results)
    figure, all_axes = subplots(1, len(by_ranks), figsize=(5 * len(by_ranks), 3.6), sharey=True, squeeze=False)
    for axes, (ranks, lines) in zip(all_axes[0], by_ranks.items()):
        axes.axhline(1, color="black", linewidth=1)
        for (model, auto, bound), colour in zip(lines, MODEL_COLOURS):
            axes.plot(*zip(*bound), "--", color=colour, linewidth=1, alpha=0.5)
            axes.plot(*list(zip(*auto))[:2], "-", color=colour, label=f"{model} shapes")
            for tokens, speedup, is_woven in auto:
                axes.plot(tokens, speedup, "o", markersize=5, color=colour, markerfacecolor=colour if is_woven else "white")
        over_tokens(axes, {tokens for _, auto, _ in lines for tokens, _, _ in auto})
        axes.set_title(f"{ranks} × {results[0]['machine']['gpu']}", fontsize=10)
    axes = all_axes[0][0]
    axes.set_ylabel("times as fast as Inductor with NCCL")
    axes.plot([], [], "o", color="grey", markerfacecolor="grey", label="woven")
    axes.plot([], [], "o", color="grey", markerfacecolor="white", label="fused")
    axes.plot([], [], "--", color="grey", linewidth=1, label="no all-reduces")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="lower center", bbox_to_anchor=(0.5, 0.95), fontsize=9, frameon=False)
    figure.subplots_adjust(wspace=0.05)
    return figure


def kernels(result):
    """A line for each number of CTAs, over the tokens, for the largest hidden size."""
    figure, axes = subplots(figsize=(7, 4.5))
    hidden = max(row["hidden"] for row in result["rows"])
    axes.axhline(1, color="black", linewidth=1)
    for number, points in ctas(result, hidden).items():
        axes.plot(*zip(*points), marker="o", markersize=3, label=f"{number} CTAs" if number else "tuned")
    over_tokens(axes, {row["tokens"] for row in result["rows"]}, "tokens")
    ticks = 0.5, 0.6, 0.7, 0.8, 1, 1.5, 2, 3
    axes.set_yscale("log", base=2)
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_ylabel("time, NCCL + compiled add and norm = 1")
    axes.set_title(f"all-reduce + add + RMSNorm, {hidden} channels, {result['rows'][0]['ranks']} × {result['machine']['gpu']}", fontsize=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def timeline(result):
    """Two lanes, communication and compute, with a box for each kernel."""
    figure, axes = subplots(figsize=(11, 2.2))
    rows, lanes = result["rows"], ("communication", "compute")
    for kind, colour in KIND_COLOURS.items():
        for height, lane in enumerate(lanes):
            boxes = [(row["start"], row["us"]) for row in rows if row["kind"] == kind and row["lane"] == lane]
            label = kind if boxes and kind not in axes.get_legend_handles_labels()[1] else None
            axes.broken_barh(boxes, (height - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3, label=label)
    axes.legend(ncols=len(KIND_COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
    axes.set_xlim(0, max(row["start"] + row["us"] for row in rows))
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel(f"µs    ({result['note']})", fontsize=8)
    return figure


def over_tokens(axes, tokens, label="tokens of a forward pass"):
    """Set up the x axis for numbers of tokens, with a tick for each."""
    ticks = sorted(tokens)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, ticks, rotation=45)
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
