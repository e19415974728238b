"""Paged attention that is opaque to the compiler: ops of an engine that find keys, values and metadata by the name of their layer.

The engine has two ops, as vLLM has them::

    update(key, value, layer_name) -> Tensor                       writes the new keys and values to the cache; the result orders the calls
    attend(query, key, value, output!, layer_name, ...) -> ()      writes to ``output``

All tokens of a step are packed along the first dimension. Each half calls the same ops, while the engine shows them metadata for the
tokens of this half only (``Engine.halved``). The second half's attention comes after the first half's update, by data flow: it attends
to the first half's keys.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ...compat import OpOverload, auto_functionalized
from ..graph_utils import calls, value
from .functional import given, split_rows
from .per_half import First, Index, Length
from .token_axis import Axes, Split, TokenAxis, register_token_rule

_ROWS = ("query", "key", "value", "output")
_DEPENDENCY = "kv_cache_dummy_dep"


@dataclass(frozen=True)
class Engine:
    """An engine's paged attention.

    why_not: layer name -> why its attention cannot be cut; '' if it can be
    halved:  (half, number of tokens in the first half) -> a context in which the ops work on the tokens of a half
    name_type: the type of ``layer_name`` in schemas. The printed schema of an op does not tell a type that Python has registered
    """

    update: OpOverload
    attend: OpOverload
    why_not: Callable[[str], str]
    halved: Callable[[int, int], AbstractContextManager]
    name_type: str = "str"


def register_engine(engine: Engine, library: torch.library.Library) -> None:
    """Register the rules of an engine's ops, and define in ``library`` the ops that run for one half."""
    update, attend = (_half_of(op, engine, library) for op in (engine.update, engine.attend))

    @register_token_rule(engine.update)
    def _update(node: Node, axes: Axes) -> Split | str | None:
        if reason := engine.why_not(_layer_name(node)):
            return reason
        rows = split_rows(node, axes, _ROWS)
        # The result has no entries.
        return Split(TokenAxis(0, 0), slices=rows.slices, target=update, kwargs=_of_half(node, None)) if isinstance(rows, Split) else rows

    @register_token_rule(engine.attend)
    def _attend(node: Node, axes: Axes) -> Split | str | None:
        arguments = given(node)
        if not calls(node, auto_functionalized) or arguments["query"] not in axes:
            return None
        if reason := engine.why_not(_layer_name(node)):
            return reason
        after = arguments.get(_DEPENDENCY)
        rows = split_rows(node, {a: axis for a, axis in axes.items() if a is not after}, _ROWS)
        return replace(rows, args=(attend,), kwargs=_of_half(node, after)) if isinstance(rows, Split) else rows


def _of_half(node: Node, after: Node | None) -> dict[str, Any]:
    return {**node.kwargs, "half": Index(), "first": Length(of=0), "after": First(after) if after is not None else None}


def _layer_name(node: Node) -> str:
    """The name of a call's layer: a text, or an object that has it. The graph may take it as an input."""
    known = given(node)["layer_name"]
    known = value(known) if isinstance(known, Node) else known
    known = getattr(known, "real_obj", known)
    return getattr(known, "value", known)


def _half_of(op: OpOverload, engine: Engine, library: torch.library.Library) -> OpOverload:
    """An op that calls ``op`` for a half. It takes three arguments more, of which ``after`` is for the order of the calls only."""
    name = f"{op._schema.name.split('::')[1]}_half"
    arguments, results = str(op._schema).replace("PyObject layer_name", f"{engine.name_type} layer_name").split("(", 1)[1].rsplit(") ->", 1)
    library.define(f"{name}({arguments}, *, Tensor? after=None, int half=0, SymInt first=0) ->{results}", tags=op.tags)

    def run(*args: Any, after: Any = None, half: int = 0, first: int = 0, **kwargs: Any) -> Any:
        with engine.halved(half, first):
            return op(*args, **kwargs)

    def fake(*args: Any, after: Any = None, half: int = 0, first: int = 0, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    return getattr(getattr(torch.ops, library.ns), name).default
