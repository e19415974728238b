"""Why a model is not faster: its reports, and where Dynamo broke its graph."""

import inspect
import types
from collections.abc import Callable, Iterable

import torch

from . import backend
from .breaks import Breaks
from .report import Break, Report, reports, short


# What Dynamo compiles behind a graph break belongs to the functions there. From 2.13 on it can be kept apart from what others compile.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


class Explanation(list[Report]):
    """What ``explain`` found: a list of the reports of the model's graphs. str() is all of it.

    breaks: where Dynamo broke the graph, also where that left no graph behind
    """

    def __init__(self, found: Iterable[Report], breaks: list[Break]):
        super().__init__(found)
        self.breaks = breaks

    def __str__(self) -> str:
        lines = [str(report) for report in self] or ["tokenweave: Dynamo compiled no graph"]
        lines += [f"{len(self.breaks)} graph breaks"]
        lines += [f"  {short(b.source) or 'a place that Dynamo does not tell'}: {b.reason}" for b in self.breaks]
        return "\n".join(lines)


def explain(model: Callable, *args, options: dict | None = None, **kwargs) -> Explanation:
    """Compile ``model`` for the backend, run it once on the arguments, and return the reports of its graphs and all graph breaks.

    model:   a module or a function; of one that torch.compile has returned, what was compiled
    options: of the backend, as for torch.compile
    Every rank of the model's process groups must call it, as it runs the model. No gradients. Other compiled models keep their graphs;
    up to PyTorch 2.12 the graphs behind a graph break count towards Dynamo's recompile limit of the functions that they are of.
    Raises what the model raises, and Dynamo's error around a TokenWeaveError for options that cannot be met.
    """
    before, broken = len(reports()), Breaks()
    with torch.no_grad():
        torch.compile(anew(model), backend=anew(backend.tokenweave), options=options, **ISOLATED)(*args, **kwargs)
    return Explanation(reports()[before:], broken.since())


def anew(function: Callable) -> Callable:
    """A function that calls this one, and that Dynamo has never seen. What Dynamo compiles for it is its own, and goes with it."""
    if not getattr(function, "_torchdynamo_disable", False):  # which is one, too, that keeps its original
        function = getattr(function, "_orig_mod", None) or getattr(function, "_torchdynamo_orig_callable", function)

    def call(*args, **kwargs):
        return function(*args, **kwargs)

    name = getattr(function, "__name__", "call")
    return types.FunctionType(call.__code__.replace(), globals(), name, closure=call.__closure__)
