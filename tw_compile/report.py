"""What was found in each compiled graph, what was done with it, and why not more."""

import functools
import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from .html import page
from .wording import count, form_of, plan_text, short, wire_text


@dataclass(frozen=True)
class Site:
    """An all-reduce -> residual add -> norm that one op replaces.

    all_reduce: name of the all-reduce in the post-grad graph; of a sequence-parallel site, of its reduce-scatter
    source:     ``file:line, in function: code`` in the model; '' if torch did not keep it
    group:      name of the process group
    device:     device of the reduced value, such as ``cuda:0``
    shape:      shape of the reduced value; symbolic sizes as text
    dtype:      dtype of the reduced value, such as ``bfloat16``
    residual:   whether a residual is added
    norm:       ``RMSNorm``, ``LayerNorm``, or '' where the graph ends before the norm
    woven:      whether the site is cut into two halves
    merged:     the number of all-reduces of the model that the site does in one
    output:     how the site quantises its norm, such as ``FP8 per token``; '' if it does not
    """

    all_reduce: str
    source: str
    group: str
    device: str
    shape: tuple[int | str, ...]
    dtype: str
    residual: bool
    norm: str
    woven: bool = False
    merged: int = 1
    output: str = ""


@dataclass(frozen=True)
class Refusal:
    """An all-reduce or a reduce-scatter that is left as it is, and the reason. all_reduce, source: as of a ``Site``"""

    all_reduce: str
    source: str
    reason: str


@dataclass(frozen=True)
class UnsplitOp:
    """An op between the first and the last site that runs on all tokens: its halves are concatenated before it."""

    op: str
    source: str
    reason: str


@dataclass(frozen=True)
class Break:
    """A place at which Dynamo ended a graph before the model did.

    source: ``file:line, in function: code`` in the model; '' if Dynamo does not tell it
    """

    source: str
    reason: str


@dataclass
class Report:
    """What was found in one compiled graph, and what was done with it.

    requested:  the options that the user gave
    mode:       the mode in force: ``weave``, ``fuse`` or ``off``, also where sites are found and not fused, as that is not faster
    transport:  the transport of the sites: ``multimem``, ``peer``, ``hierarchical`` or ``process_group``; the last two with ``:8``, ``:6``
                or ``:4`` where they have so many bits; '' if there are no sites
    wire:       bits -> bytes that each rank sends for a token at all sites with them, over ``hierarchical`` to other hosts. First those of
                the model's dtype, "16" or "32" ("16 and 32" if sites differ), then "8", "6" and "4". None over symmetric memory
    packed:     the number of sites that have the bits of the transport; the others have those of the model's dtype
    alike:      number of equal layers that are compiled as one; 0 if each layer is compiled
    split:      (first half, second half) along the cut axis, as numbers or symbolic text; None if the graph is not woven
    rehearsal:  the section that was autotuned (``autotune.schedule.Section``) and its plan (``autotune.plan.Plan``), as plain data; None if
                nothing was autotuned
    sites:      the sites, in the order of the graph
    refusals:   the all-reduces and reduce-scatters that are left as they are
    joins:      the unsplit ops
    reasons:    why the mode is not ``weave``, why the transport is not the best available, and why each layer is compiled
    broken:     the graph break at which the graph ends; None if it ends with the model
    """

    requested: dict[str, Any]
    mode: str = "off"
    transport: str = ""
    wire: dict[str, int] | None = None
    packed: int = 0
    alike: int = 0
    split: tuple[int | str, ...] | None = None
    rehearsal: dict[str, Any] | None = None
    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    joins: list[UnsplitOp] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    broken: Break | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for ``json.dumps`` and ``from_dict``."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Report":
        """The report that ``to_dict`` has turned into ``data``. Raises ValueError for other data."""
        rows = {"sites": Site, "refusals": Refusal, "joins": UnsplitOp}
        try:
            data = {k: [rows[k](**row) for row in v] if k in rows else v for k, v in data.items()}
            for site in data["sites"]:
                object.__setattr__(site, "shape", tuple(site.shape))
            if data["split"] is not None:
                data["split"] = tuple(data["split"])
            if data["broken"] is not None:
                data["broken"] = Break(**data["broken"])
            return cls(**data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not what Report.to_dict returns: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        asked = ", ".join(f"{name}={value}" for name, value in self.requested.items() if value != "auto") or "auto"
        head = f"tokenweave: {self.mode} (requested: {asked})"
        if self.transport:
            head += f", transport {self.transport}"
        if self.split:
            head += f", split {self.split[0]} | {self.split[1]}"
        if self.alike:
            head += f", {self.alike} layers compiled as one"
        lines = [head, f"  {count(len(self.sites), 'site')}, {len(self.refusals)} refused, {count(len(self.joins), 'unsplit op')}"]
        if self.wire:
            lines += [f"  {wire_text(self.transport, self.wire, self.packed, len(self.sites))}"]
        if self.rehearsal:
            lines += [f"  autotuned: {plan_text(**self.rehearsal['plan'])}"]
        lines += [f"  because {reason}" for reason in self.reasons]
        lines += [f"  graph break at {short(self.broken.source)}: {self.broken.reason}"] if self.broken else []
        done = {True: "woven", False: "fused"} if self.mode != "off" else {False: "found"}
        found = [
            (done[s.woven], f"{'×'.join(map(str, s.shape))} {s.dtype}", short(s.source), form_of(s.norm, s.residual, s.merged, s.output))
            for s in self.sites
        ]
        found += [("refused", r.all_reduce, short(r.source), r.reason) for r in self.refusals]
        found += [("unsplit", j.op, short(j.source), j.reason) for j in self.joins]
        # Equal rows become one with their number, as the layers of a model are alike.
        rows = [(what, f"{n} × {value}" if n > 1 else value, place, text) for (what, value, place, text), n in Counter(found).items()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for row in rows:
            lines.append("  " + "  ".join([cell.ljust(width) for cell, width in zip(row, widths)] + [row[3]]).rstrip())
        return "\n".join(lines)

    def html(self, profile: Any = None) -> str:
        """The report as one self-contained page of HTML.

        profile: adds a timeline of GPU kernels: a ``torch.profiler.profile`` of calls of the model that has ended, or the path of the
                 Chrome trace that it has exported. None for no timeline
        Raises OSError if the trace cannot be read, and ValueError if it is no Chrome trace, or if the profile has not ended.
        """
        return page(self, profile)


log = logging.getLogger("tw_compile")

_reports: list[Report] = []


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, if it was not logged before."""
    log.warning(message)


def record(report: Report) -> None:
    """Add a report to ``reports()``."""
    _reports.append(report)


def reports() -> list[Report]:
    """The reports of this process, newest last: one for each form of a graph that was compiled, also from a cache."""
    return list(_reports)
