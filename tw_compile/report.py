"""What was found in each compiled graph, what was done with it, and why not more."""

import functools
import json
import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Site:
    """An all-reduce -> residual add -> norm that one op carries.

    all_reduce: name of the all-reduce in the post-grad graph, or of the reduce-scatter of a sequence-parallel site
    source:     ``file:line, in function: code`` of the model, '' where torch did not keep it
    shape:      of the reduced value; symbolic sizes as text
    residual:   whether one is added
    norm:       ``RMSNorm`` or ``LayerNorm``
    woven:      whether it is cut in two halves
    """

    all_reduce: str
    source: str
    group: str
    device: str
    shape: tuple
    dtype: str
    residual: bool
    norm: str
    woven: bool = False


@dataclass(frozen=True)
class Refusal:
    """An all-reduce or a reduce-scatter that is left as it is, and why."""

    all_reduce: str
    source: str
    reason: str


@dataclass(frozen=True)
class UnsplitOp:
    """An op between the first and the last site that is not split: its halves are joined before it."""

    op: str
    source: str
    reason: str


@dataclass(frozen=True)
class Break:
    """Where Dynamo broke a graph, so that what follows is another one.

    source: ``file:line, in function: code`` of the model, '' where Dynamo does not tell
    """

    source: str
    reason: str


@dataclass
class Report:
    """One compiled graph.

    mode:       what is in force: ``weave``, ``fuse`` or ``off``
    requested:  the options as the user gave them
    transport:  what carries the sites: ``multimem``, ``peer`` or ``process_group``; '' where there is none
    alike:      layers that are compiled as one; 0 where each is compiled
    split:      (first half, second half) along the cut axis, as numbers or symbolic text; None where not woven
    rehearsal:  what was tuned (``schedule.Section``), and the ``Plan`` that came of it, as plain data; None where nothing was
    reasons:    why mode or transport are not what could have been hoped for
    broken:     where Dynamo ended the graph before the model did; None where it did not
    """

    requested: dict
    mode: str = "off"
    transport: str = ""
    alike: int = 0
    split: tuple | None = None
    rehearsal: dict | None = None
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    joins: list[UnsplitOp] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    broken: Break | None = None

    def to_dict(self) -> dict:
        """The report as plain data: what ``json.dumps`` takes and ``from_dict`` gives back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict) -> "Report":
        rows = {"sites": Site, "refusals": Refusal, "joins": UnsplitOp}
        data = {k: [rows[k](**row) for row in v] if k in rows else v for k, v in data.items()}
        for site in data["sites"]:
            object.__setattr__(site, "shape", tuple(site.shape))
        if data["split"] is not None:
            data["split"] = tuple(data["split"])
        if data["broken"] is not None:
            data["broken"] = Break(**data["broken"])
        return cls(**data)

    def __str__(self) -> str:
        asked = ", ".join(f"{name}={value}" for name, value in self.requested.items() if value != "auto") or "auto"
        head = f"tokenweave: {self.mode} (requested: {asked})"
        if self.transport:
            head += f", transport {self.transport}"
        if self.split:
            head += f", split {self.split[0]} | {self.split[1]}"
        if self.alike:
            head += f", {self.alike} layers compiled as one"
        lines = [head, f"  {len(self.sites)} sites, {len(self.refusals)} refused, {len(self.joins)} unsplit ops"]
        if self.rehearsal:
            lines += [f"  tuned: {plan_text(**self.rehearsal['plan'])}"]
        lines += [f"  because {reason}" for reason in self.reasons]
        lines += [f"  graph break at {short(self.broken.source)}: {self.broken.reason}"] if self.broken else []
        done = {True: "woven", False: "fused"} if self.mode != "off" else {False: "found"}
        rows = [(done[s.woven], f"{'×'.join(map(str, s.shape))} {s.dtype}", short(s.source), form_of(s)) for s in self.sites]
        rows += [("refused", r.all_reduce, short(r.source), r.reason) for r in self.refusals]
        rows += [("unsplit", j.op, short(j.source), j.reason) for j in self.joins]
        # The layers of a model are alike: a row each would say the same many times.
        rows = [(what, f"{count} × {value}" if count > 1 else value, *rest) for (what, value, *rest), count in Counter(rows).items()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for row in rows:
            lines.append("  " + "  ".join([cell.ljust(width) for cell, width in zip(row, widths)] + [row[3]]).rstrip())
        return "\n".join(lines)

    def html(self, profile=None) -> str:
        """The report as one page of HTML that needs nothing else.

        profile: for a timeline: a ``torch.profiler.profile`` of calls of the model that has ended, or the path of its Chrome trace
        Raises OSError or ValueError where that cannot be read, or is no trace.
        """
        from .html import page  # which is above this

        return page(self, profile)


def short(source: str) -> str:
    """A place in the source without the part of its path that says nothing: the working directory, or where packages are."""
    return source.removeprefix(os.getcwd() + os.sep).split("site-packages" + os.sep)[-1]


def plan_text(min_tokens: int | None, ctas: int, split_ratio: float, gain: float | None) -> str:
    """What a Plan says, in words."""
    if gain is None:
        return f"no, for lack of memory; it is woven from {min_tokens} tokens on by a rule"
    cut = f"split ratio {split_ratio:g}" + (f", {ctas} CTAs" if ctas else "")
    if min_tokens is None:
        return f"not woven at any number of tokens; at best {gain:.2f} times as fast as fused at the most tokens, with {cut}"
    return f"woven from {min_tokens} tokens on, with {cut}: {gain:.2f} times as fast as fused at the most tokens"


def form_of(site: Site) -> str:
    """What the op of a site does, in words."""
    return f"all-reduce + add + {site.norm}" if site.residual else f"all-reduce + {site.norm}"


log = logging.getLogger("tw_compile")

_reports: list[Report] = []


@functools.cache
def say_once(message: str) -> None:
    log.warning(message)


def record(report: Report) -> None:
    _reports.append(report)


def reports() -> list[Report]:
    """One Report for each graph compiled in this process, newest last; a compilation served from a cache counts."""
    return list(_reports)
