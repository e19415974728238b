"""A report as one self-contained page of HTML: no scripts, fonts or images from elsewhere."""

import json
import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .wording import count, form_of, plan_text, short, wire_text

if TYPE_CHECKING:
    from .report import Report

# The most kernels that a timeline shows, around the communication kernel in the middle of the profile.
MAX_KERNELS = 600
_WIDTH, _LANE, _LABEL = 1100, 30, 150  # pixels: width of the timeline, height of a lane, width of its label

# The first pattern that matches a kernel's name gives its kind. Names of Inductor's kernels contain the ops that they compute.
KINDS = (
    ("all-reduce + norm", r"two_shot|one_shot"),
    ("process group", r"^nccl"),
    ("elementwise", r"^triton_(?!tem)"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|splitk|gemv|^triton_tem"),
    ("elementwise", r""),
)
_COMMUNICATION = "all-reduce + norm", "process group"


def page(report: "Report", profile: Any = None) -> str:
    """The page of a report.

    profile: adds a timeline of calls of the compiled model: a ``torch.profiler.profile`` that has ended, the path of the Chrome trace that
             it has exported, or the content of one. None for no timeline
    Raises what ``kernels_of`` raises.
    """
    parts = [_head(report), _reasons(report), _sites(report)]
    parts.append(_table("Refused", ("all-reduce", "place", "why"), [(r.all_reduce, short(r.source), r.reason) for r in report.refusals]))
    unsplit = Counter((j.op, short(j.source), j.reason) for j in report.joins)
    parts.append(_table("Unsplit ops", ("number", "op", "place", "why"), [(number, *row) for row, number in unsplit.items()]))
    parts.append(_timeline(kernels_of(profile)) if profile is not None else "")
    return _PAGE.format(style=_STYLE, body="\n".join(part for part in parts if part))


# --- the report ----------------------------------------------------------------------------------------------------------------------


def _head(report: "Report") -> str:
    woven = sum(site.woven for site in report.sites)
    numbers = {
        "sites": len(report.sites),
        "woven": woven,
        "refused": len(report.refusals),
        "unsplit ops": len(report.joins),
    }
    cards = "".join(f"<div><b>{number}</b>{name}</div>" for name, number in numbers.items())
    facts = {"transport": report.transport, "split": " | ".join(map(str, report.split or ())), "layers compiled as one": report.alike}
    asked = ", ".join(f"{name}={value}" for name, value in report.requested.items() if value != "auto")
    facts |= {"requested": asked or "auto", "autotuned": plan_text(**report.rehearsal["plan"]) if report.rehearsal else ""}
    if report.wire:
        facts["wire"] = wire_text(report.transport, report.wire, report.packed, len(report.sites)).removeprefix("wire: ")
    rows = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items() if value)
    return f'<h1>tokenweave <span class="{report.mode}">{report.mode}</span></h1><div class="cards">{cards}</div><dl>{rows}</dl>'


def _reasons(report: "Report") -> str:
    reasons = [*report.reasons]
    if report.broken:
        reasons.append(f"graph break at {short(report.broken.source)}: {report.broken.reason}")
    items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f"<h2>Why not more</h2><ul>{items}</ul>" if items else ""


def _sites(report: "Report") -> str:
    """The table of sites; equal sites are one row, as the layers of a model are alike."""
    done = {True: "woven", False: "fused" if report.mode != "off" else "found"}
    rows = Counter(
        (done[s.woven], "×".join(map(str, s.shape)), s.dtype, form_of(s.norm, s.residual, s.merged, s.output), short(s.source))
        for s in report.sites
    )
    cells = [(what, number, *rest) for (what, *rest), number in rows.items()]
    return _table("Sites", ("", "number", "shape", "dtype", "op", "place"), cells)


def _table(title: str, names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(_cell(name, value) for name, value in zip(names, row)) + "</tr>" for row in rows)
    return f'<h2>{escape(title)}</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(name: str, value: object) -> str:
    """A cell of the column ``name``. Only prose and places are broken into lines."""
    text = escape(str(value))
    if name == "":
        return f'<td><span class="{text}">{text}</span></td>'
    if name in ("all-reduce", "shape") or (name == "op" and "." in text):
        return f"<td><code>{text}</code></td>"
    if name == "place":
        return f'<td class="lines place"><code>{text}</code></td>'
    return f'<td class="lines">{text}</td>' if name in ("why", "op") else f"<td>{text}</td>"


# --- the timeline --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A kernel or copy on a GPU. start, us: begin and duration in microseconds; lane: GPU and stream"""

    name: str
    kind: str
    lane: str
    start: float
    us: float

    @property
    def end(self) -> float:
        return self.start + self.us


def kernels_of(profile: Any) -> list[Kernel]:
    """The kernels and copies of a profile, in order of their begin. profile: see ``page``

    Raises ValueError if it is no Chrome trace, or a profile that has not ended, and OSError for a file that cannot be read.
    """
    if hasattr(profile, "export_chrome_trace"):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json")
            try:
                profile.export_chrome_trace(path)
            except Exception as error:  # which one depends on PyTorch's version
                raise ValueError(f"the profile has no trace: call html after the profiler has ended ({error})") from error
            return kernels_of(path)
    what, data = "the profile", profile
    if isinstance(profile, str | os.PathLike):
        what, content = os.fspath(profile), Path(profile).read_bytes()
        try:
            data = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{what} is not a Chrome trace: it is not JSON ({error})") from error
    events = data.get("traceEvents") if isinstance(data, dict) else None
    if not isinstance(events, list):
        raise ValueError(f"{what} is not a Chrome trace: it has no list 'traceEvents'")
    try:
        return sorted((_kernel(event) for event in events if event.get("cat") in _ON_GPU), key=lambda kernel: kernel.start)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{what} is not a Chrome trace: an event cannot be read ({type(error).__name__}: {error})") from error


_ON_GPU = "kernel", "gpu_memcpy", "gpu_memset"  # categories of events


def _kernel(event: dict[str, Any]) -> Kernel:
    lane = f"GPU {event.get('pid', 0)}, stream {event.get('tid', 0)}"
    return Kernel(event["name"], kind_of(event["name"]), lane, float(event["ts"]), float(event["dur"]))


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name: one of KINDS."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def hidden(kernels: list[Kernel]) -> tuple[float, float]:
    """(microseconds of communication, microseconds of it during which other kernels of the same GPU ran)"""
    total = beside = 0.0
    for gpu in {_gpu_of(kernel.lane) for kernel in kernels}:
        mine = [kernel for kernel in kernels if _gpu_of(kernel.lane) == gpu]
        compute = _union([kernel for kernel in mine if kernel.kind not in _COMMUNICATION])
        for begin, end in _union([kernel for kernel in mine if kernel.kind in _COMMUNICATION]):
            total += end - begin
            beside += sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in compute)
    return total, beside


def _gpu_of(lane: str) -> str:
    return lane.partition(",")[0]


def _union(kernels: list[Kernel]) -> list[tuple[float, float]]:
    spans: list[tuple[float, float]] = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if spans and kernel.start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], kernel.end)
        else:
            spans.append((kernel.start, kernel.end))
    return spans


def _timeline(kernels: list[Kernel]) -> str:
    if not kernels:
        return "<h2>Timeline</h2><p>The profile has no GPU kernels.</p>"
    total, beside = hidden(kernels)
    shown = _middle(kernels)
    begin, end = shown[0].start, max(kernel.end for kernel in shown)
    scale = _WIDTH / max(end - begin, 1e-3)
    lanes = {lane: number for number, lane in enumerate(sorted(dict.fromkeys(kernel.lane for kernel in shown), key=_gpu_of))}
    parts = [f'<text x="0" y="{_LANE * (n + 0.65):.1f}">{escape(lane)}</text>' for lane, n in lanes.items()]
    for kernel in shown:
        x, width = _LABEL + (kernel.start - begin) * scale, max(kernel.us * scale, 0.5)
        title = escape(f"{kernel.kind}, {kernel.us:.1f} µs: {kernel.name[:200]}")
        where = f'x="{x:.2f}" y="{_LANE * lanes[kernel.lane] + 3}" width="{width:.2f}" height="{_LANE - 6}"'
        parts.append(f'<rect class="{_class(kernel.kind)}" {where}><title>{title}</title></rect>')
    bottom = _LANE * len(lanes)
    step = _step(end - begin)
    for number in range(int((end - begin) / step) + 1):
        x = _LABEL + number * step * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}">{number * step:g}</text>')
    parts.append(f'<text x="0" y="{bottom + 18}">microseconds</text>')
    kinds = dict.fromkeys(kernel.kind for kernel in shown)
    legend = "".join(f'<span><i class="{_class(kind)}"></i>{escape(kind)}</span>' for kind in kinds)
    said = count(len(kernels), "kernel") + (f", of which {len(shown)} are shown" if len(shown) < len(kernels) else "")
    share = f"; compute ran during {100 * beside / total:.0f} % of {total / 1e3:.2f} ms of communication" if total else ""
    size = f'viewBox="0 0 {_LABEL + _WIDTH + 40} {bottom + 24}" width="{_LABEL + _WIDTH + 40}"'
    drawn = f'<div class="wide"><svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg></div>'
    return f'<h2>Timeline</h2><p>{said}{share}.</p><p class="legend">{legend}</p>{drawn}'


def _middle(kernels: list[Kernel]) -> list[Kernel]:
    """At most MAX_KERNELS, around the communication kernel in the middle."""
    if len(kernels) <= MAX_KERNELS:
        return kernels
    at = [number for number, kernel in enumerate(kernels) if kernel.kind in _COMMUNICATION] or [len(kernels) // 2]
    first = min(max(0, at[len(at) // 2] - MAX_KERNELS // 2), len(kernels) - MAX_KERNELS)
    return kernels[first : first + MAX_KERNELS]


def _step(span: float) -> float:
    """A round number of microseconds that fits 5 to 12 times into the span."""
    step = 10.0 ** len(str(int(span / 10)))
    return next((step / d for d in (10, 5, 2, 1) if span / (step / d) <= 12), step)


def _class(kind: str) -> str:
    return re.sub(r"\W+", "-", kind)


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1340px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.1em; margin: 2em 0 .5em; }
h1 span, td span { padding: .1em .6em; border-radius: 1em; background: var(--soft); }
.weave, .woven { background: #22883344 !important; } .fuse, .fused { background: #ccbb4455 !important; }
.off { background: #ee667744 !important; } .cards { display: flex; gap: 1em; flex-wrap: wrap; }
.cards div { border: 1px solid var(--line); border-radius: .5em; padding: .5em 1.2em; }
.cards b { display: block; font-size: 1.5em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1.2em; } dt { opacity: .7; } dd { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .35em .8em .35em 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
.lines { white-space: normal; overflow-wrap: anywhere; min-width: 13em; } .place { min-width: 24em; }
code { font: 13px ui-monospace, monospace; }
svg text { font-size: 12px; fill: currentColor; } svg line { stroke: currentColor; opacity: .15; }
.legend span { margin-right: 1.5em; }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: .4em; vertical-align: -.1em; }
.GEMM { fill: #4477aa; background: #4477aa; } .attention { fill: #66ccee; background: #66ccee; }
.all-reduce-norm { fill: #ee6677; background: #ee6677; } .elementwise { fill: #ccbb44; background: #ccbb44; }
.process-group { fill: #aa3377; background: #aa3377; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>tokenweave report</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
