"""Explains what the backend does with a model: the reports of its graphs, and where Dynamo broke them."""

import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import backend
from .breaks import Breaks
from .options import TokenWeaveError, parse
from .report import Break, Report, reports
from .wording import count, short

# Dynamo caches what it compiles behind a graph break with the functions there. From PyTorch 2.13 on it can keep such entries apart.
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


class Explanation(list[Report]):
    """The result of ``explain``: a list of the reports of the model's graphs. str() has the reports and the graph breaks.

    breaks: the graph breaks, also those that left no graph
    """

    def __init__(self, found: Iterable[Report], breaks: list[Break]) -> None:
        super().__init__(found)
        self.breaks = breaks

    def __str__(self) -> str:
        lines = [str(report) for report in self] or ["tokenweave: Dynamo compiled no graph"]
        lines += [count(len(self.breaks), "graph break")]
        lines += [f"  {short(b.source) or 'an unknown place'}: {b.reason}" for b in self.breaks]
        return "\n".join(lines)


def explain(model: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Compile ``model`` with the backend, run it once, and return the reports of its graphs and all graph breaks.

    model:   a module or a function, not compiled, or what torch.compile returned
    args, kwargs: the arguments of the call
    options: options of the backend, as for torch.compile

    It computes no gradients. All ranks of the model's process groups must call it, as it runs the model. Other compiled models keep their
    graphs; up to PyTorch 2.12, graphs behind a graph break count towards Dynamo's recompile limit of their functions.
    Raises TokenWeaveError for wrong options, and if ``model`` cannot be called; what the model raises; and Dynamo's error around a
    TokenWeaveError for options that this model or machine cannot meet.
    """
    parse(options)
    before, broken = len(reports()), Breaks()
    with torch.no_grad():
        torch.compile(anew(model), backend=anew(backend.tokenweave), options=options, **ISOLATED)(*args, **kwargs)
    return Explanation(reports()[before:], broken.since())


def anew(function: Callable[..., Any]) -> Callable[..., Any]:
    """A new function that calls ``function``. What Dynamo compiles for it is separate, and is freed with it.

    Raises TokenWeaveError if ``function`` cannot be called.
    """
    if not callable(function):
        raise TokenWeaveError(f"{function!r:.200} is not a model: give a module or a function, or what torch.compile returned")
    original: Callable[..., Any] = function
    if not getattr(function, "_torchdynamo_disable", False):  # a disabled function has an original, too, and stays disabled
        original = getattr(function, "_torchdynamo_orig_callable", function)
        original = getattr(function, "_orig_mod", None) or original

    def call(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    name = getattr(original, "__name__", "call")
    return types.FunctionType(call.__code__.replace(), globals(), name, closure=call.__closure__)
