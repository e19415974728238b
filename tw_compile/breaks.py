"""Where Dynamo broke a graph, and why: from its list of graph breaks, and from its counters."""

import os
from typing import Any

import torch

from . import compat
from .report import Break


def break_of(gm: torch.fx.GraphModule) -> Break | None:
    """The graph break at which this graph ends; None if it ends with the model."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return _break(reason) if reason is not None and reason.graph_break else None


class Breaks:
    """Records the graph breaks that happen after it is made."""

    def __init__(self) -> None:
        self.seen, self.counts = len(_places()), dict(_counts())

    def since(self) -> list[Break]:
        """Those graph breaks, each once. Dynamo lists a break in every function that it leads out of."""
        found = dict.fromkeys(map(_break, _places()[self.seen :]))
        reasons = {b.reason for b in found}
        counted = [_summary(reason) for reason, count in _counts().items() if count > self.counts.get(reason, 0)]
        return [*found, *(Break("", reason) for reason in counted if reason not in reasons)]


def _places() -> list[Any]:
    return compat.graph_break_reasons if compat.has(compat.graph_break_reasons) else []


def _counts() -> dict[str, int]:
    return compat.dynamo_counters["graph_break"] if compat.has(compat.dynamo_counters) else {}


def _break(reason: Any) -> Break:
    lines = [line for line in reason.user_stack if not line.filename.startswith(_NOT_THE_MODEL)]
    source = f"{lines[-1].filename}:{lines[-1].lineno}, in {lines[-1].name}: {lines[-1].line}" if lines else ""
    return Break(source, _summary(reason.reason))


# The source of a break is the innermost line of its stack that is in the model.
_NOT_THE_MODEL = os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep


def _summary(reason: str) -> str:
    """Dynamo's message in one line: its first line, and its explanation."""
    what, *rest = reason.strip().splitlines() or [""]
    explanation = next((line.strip().removeprefix("Explanation: ") for line in rest if "Explanation: " in line), "")
    return f"{what}: {explanation}" if explanation else what
