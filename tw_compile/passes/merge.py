"""graph -> the same graph, in which a sum of reduced values is one all-reduce, and has the form that ``find`` knows.

An all-reduce is linear. So of one group and one dtype::

    all_reduce(a) + all_reduce(b)                  all_reduce(a + b)
    all_reduce(a) + g * all_reduce(b)              all_reduce(a + g * b)
    all_reduce(a).sum(0), all_reduce(a)[-1:]       all_reduce(a.sum(0)), all_reduce(a[-1:])
    all_reduce(a).transpose(0, 1)                  all_reduce(a.transpose(0, 1))
    all_reduce(a) + all_reduce(b) @ w              all_reduce(a + b @ w)
    cat(all_reduce(a), all_reduce(b))              all_reduce(cat(a, b))
    all_reduce(a) + r + residual                   all_reduce(a) + (r + residual)

What is added is complete on each rank, and stays outside of the all-reduce. g and w must be the same on all ranks: ``replicated``.

A *sum* is a value that is linear in reduced values which nothing else reads: ``(all_reduce(partial) + bias) * scale + rest``. The largest
sums are rewritten. The all-reduce takes the place and the name of the last one that it replaces.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from ..compat import detect_fake_mode
from .emit import Emitter
from .find import AllReduce, all_reduce_of, collectives, stays
from .graph_utils import (
    RESHAPES,
    WAIT,
    Ancestors,
    aten,
    c10d,
    calls,
    copied_graph,
    is_tensor,
    keeps_order,
    keeps_rows,
    other_operand,
    prims,
    same_shape,
    sort_and_clean,
    value,
)
from .linear import PRODUCTS, ROWS, has_all_rows, is_scalar, is_vector, takes_rows
from .norms import is_number
from .replicated import own_values
from .rules.token_axis import expr

# What ``find`` knows of a sum of one reduced value, in order: resHapes, scalar Factors, a Vector, Scales, a Cast, a Residual.
_KNOWN = "[hf]*v?s*c?s*r?h*"


@dataclass(frozen=True)
class Merged:
    """A sum that was rewritten.

    root:        the name of the value that is the sum
    all_reduces: the names of the all-reduces that are one now, in order. It has the name of the last
    rows:        which rows of the reduced values the sum has, as text: another rank must take the same; '' for all rows
    """

    root: str
    all_reduces: tuple[str, ...]
    rows: str


@dataclass(frozen=True)
class _Form:
    """A sum as ``(all_reduce(partial) + bias) * scale + rest``. bias: [H] or None; rest: broadcast to the sum, or None"""

    partial: Node
    bias: Node | None = None
    scale: float = 1.0
    rest: Node | None = None


def merge(graph: Graph, alone: Collection[str] = (), skip: Collection[str] = ()) -> tuple[Graph, list[Merged], dict[str, str]]:
    """Rewrite the sums of a post-grad graph that ``find`` does not know. ``graph`` is not changed.

    alone: names of all-reduces that are left as they are
    skip:  names of sums that are left as they are
    Returns (a new graph, or ``graph`` itself if nothing is rewritten; what was; name of an all-reduce -> why its sum was not).
    """
    if not any(map(all_reduce_of, graph.nodes)):
        return graph, [], {}
    merger = _Merger(copied_graph(graph), alone)
    merged = merger.run(skip)
    return merger.graph if merged else graph, merged, merger.why


class _Merger:
    def __init__(self, graph: Graph, alone: Collection[str]):
        self.graph, self.order, self.before = graph, collectives(graph), Ancestors(graph)
        self.emitter = Emitter(graph, detect_fake_mode([value(n) for n in self.order]))
        self.reduces: dict[Node, AllReduce] = {}  # the all-reduces that may be part of a sum
        self.sums: dict[Node, tuple[Node, ...]] = {}  # a sum -> its all-reduces
        self.parts: dict[Node, list[Node]] = {}  # a call that is a sum -> the operands that it is linear in
        self.owns: dict[str, dict[Node, str]] = {}  # group -> its ``own_values``
        self.why: dict[str, str] = {}
        for node in graph.nodes:
            call = all_reduce_of(node)
            if call is not None:
                may = call.reduce_op == "sum" and isinstance(call.group, str) and not node.target._schema.is_mutable
                if may and node.name not in alone:
                    self.reduces[node], self.sums[node] = call, (node,)
            elif parts := self._parts(node):
                self.parts[node] = parts
                self.sums[node] = tuple(sorted({r for p in parts for r in self.sums[p]}, key=self.order.index))

    def run(self, skip: Collection[str]) -> list[Merged]:
        carried = {part for parts in self.parts.values() for part in parts}
        roots = [node for node in self.sums if node not in carried and node.name not in skip and self._gains(node)]
        gone: set[Node] = set()
        named: dict[Node, str] = {}
        merged: list[Merged] = []
        for root in roots:
            reduces, rows = self.sums[root], self._rows(root)
            if made := self._rewrite(root):
                gone |= {node for r in reduces for node in (r, *r.users)}
                named |= dict(zip(made, (reduces[-1].name, root.name)))
                merged.append(Merged(root.name, tuple(r.name for r in reduces), rows))
        sort_and_clean(self.graph, lambda node: stays(node) and node not in gone)
        for node, name in named.items():
            node.name = name
        return merged

    # --- what is a sum -----------------------------------------------------------------------------------------------

    def _parts(self, node: Node) -> list[Node]:
        """The sums among a call's operands that it is linear in, where nothing else reads them; [] if it is no sum."""
        sums = [a for a in node.all_input_nodes if a in self.sums and len(a.users) == 1]
        if not sums or not is_tensor(node) or not self._has_dtype_of(node, sums[0]) or node.args.count(sums[0]) > 1:
            return []
        first = node.args[0]
        if calls(node, prims.convert_element_type.default):
            return [] if self._has_addends(first) else sums
        if calls(node, WAIT, aten.clone.default):
            return sums
        if keeps_order(node) or (calls(node, *ROWS) and takes_rows(node)):
            return sums if keeps_rows(node) and self._are_equal_rows(node, sums) else []
        if calls(node, aten.cat.default):
            along_rows = (node.args[1] if len(node.args) > 1 else 0) % value(node).dim() < value(node).dim() - 1
            return sums if along_rows and sums == first == self._of_one_group(sums) else []
        if calls(node, aten.sum.dim_IntList, aten.mean.dim):
            rank = value(first).dim()
            over_rows = bool(node.args[1]) and all(d % rank < rank - 1 for d in node.args[1])
            return sums if over_rows and not self._has_addends(first) else []
        if calls(node, aten.mm.default):
            return sums if sums == [first] and not self._has_addends(first) and self._is_equal(node.args[1], sums) else []
        whole = [a for a in sums if has_all_rows(a, node)]
        if calls(node, *PRODUCTS):
            factor = other_operand(node, sums[0])
            is_divisor = calls(node, aten.div.Tensor, aten.div.Scalar) and factor is first
            return whole if len(sums) == 1 and not is_divisor and self._is_factor(factor, sums) else []
        if calls(node, aten.where.self):
            picks = whole == sums and not self._has_addends(sums[0]) and any(map(_is_zero, node.args))
            return sums if picks and sums[0] is not first and self._is_equal(first, sums) else []
        if calls(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1:
            return self._of_one_group(whole) if all(map(is_tensor, node.args)) else []
        return []

    def _has_dtype_of(self, node: Node, sum_: Node) -> bool:
        """Whether a call keeps the dtype of its input, or is a cast, a product or a sum in float32 of what is reduced in 16 bits."""
        dtypes = {value(node).dtype, value(sum_).dtype}
        may_differ = calls(node, prims.convert_element_type.default, aten.add.Tensor, *PRODUCTS)
        return len(dtypes) == 1 or (may_differ and dtypes == {value(self.sums[sum_][-1]).dtype, torch.float32})

    def _of_one_group(self, sums: list[Node]) -> list[Node]:
        """The sums of the group and the dtype of the last all-reduce."""
        kinds = [(self.reduces[self.sums[a][-1]].group, value(self.sums[a][-1]).dtype) for a in sums]
        last = max(range(len(sums)), key=lambda i: self.order.index(self.sums[sums[i]][-1]), default=0)
        return [a for a, kind in zip(sums, kinds) if kind == kinds[last]]

    def _is_factor(self, factor: Any, sums: list[Node]) -> bool:
        return is_number(factor) or (is_tensor(factor) and self._is_equal(factor, sums))

    def _is_equal(self, factor: Node, sums: list[Node]) -> bool:
        """Whether a factor is the same on all ranks; notes why not."""
        group = self.reduces[self.sums[sums[0]][0]].group
        if group not in self.owns:
            self.owns[group] = own_values(self.graph, group)
        if own := self.owns[group].get(factor):
            self.why |= dict.fromkeys((r.name for r in self.sums[sums[0]]), f"its factor may differ between ranks: it is made of {own}")
        return not own

    def _are_equal_rows(self, node: Node, sums: list[Node]) -> bool:
        """Whether a call takes the same rows on all ranks, or rows that ``_rows`` tells apart; notes why not."""
        bounds = [expr(value(a) if isinstance(a, Node) else a) for a in node.args[2:]] if calls(node, *ROWS) else []
        sizes = {symbol for size in value(node.args[0]).shape for symbol in expr(size).free_symbols}
        equal_ = all(bound.free_symbols <= sizes for bound in bounds)
        if not equal_:
            self.why |= dict.fromkeys((r.name for r in self.sums[sums[0]]), "a number that may differ between ranks picks its rows")
        return equal_

    def _has_addends(self, sum_: Node) -> bool:
        return any(calls(node, aten.add.Tensor) and len(self.parts[node]) == 1 for node in self._steps(sum_))

    def _steps(self, sum_: Node) -> list[Node]:
        """The calls that make a sum of the reduced values."""
        found = [sum_]
        for node in found:
            found += self.parts.get(node, ())
        return [node for node in found if node in self.parts and not calls(node, WAIT)]

    # --- what is rewritten -------------------------------------------------------------------------------------------

    def _gains(self, root: Node) -> bool:
        """Whether ``find`` does not know the form of a sum, and would know it rewritten."""
        steps = self._steps(root)
        gemms = [node for node in steps if calls(node, aten.mm.default)]
        if gemms and {r for node in gemms for r in self.sums[node]} == set(self.sums[root]):
            return False  # the sum of the GEMM's results may have longer rows than that of its inputs
        return len(self.sums[root]) > 1 or not re.fullmatch(_KNOWN, "".join(map(self._kind, reversed(steps))))

    def _kind(self, node: Node) -> str:
        """The kind of a call in a sum of one reduced value, as _KNOWN has them; x for others."""
        part = self.parts[node][0]
        other = other_operand(node, part) if len(node.args) > 1 else None
        if calls(node, *RESHAPES):
            return "h"
        if calls(node, prims.convert_element_type.default):
            return "c"
        if calls(node, *PRODUCTS):
            return "s" if is_number(other) else "f" if calls(node, aten.mul.Tensor) and is_scalar(other) else "x"
        if calls(node, aten.add.Tensor) and value(other).dim() == 1 and is_vector(other, node):
            return "v" if value(other).dtype == value(self.sums[node][-1]).dtype else "x"
        return "r" if calls(node, aten.add.Tensor) and same_shape(value(other).shape, value(part).shape) else "x"

    def _rewrite(self, root: Node) -> tuple[Node, Node] | None:
        """Make a sum of one all-reduce. Returns the all-reduce and the sum, or None if it cannot keep its place; notes why not."""
        last, steps = self.sums[root][-1], self._steps(root)
        factors = {a for node in steps if not calls(node, aten.add.Tensor) for a in node.all_input_nodes if a not in self.parts[node]}
        for later in self.order[self.order.index(last) + 1 :]:
            if any(factor is later or self.before(later, factor) for factor in factors):
                self.why |= dict.fromkeys((r.name for r in self.sums[root]), f"its factor depends on {later}, a later collective")
                return None
        self.early, self.late = last, root
        form = self._form(root)
        partial = self._cast(last, form.partial, value(last).dtype)
        reduce = self._partial(last, c10d.all_reduce.default, partial, "sum", self.reduces[last].group)
        total = self._partial(last, WAIT, reduce)
        if form.bias is not None:
            total = self._whole(root, aten.add.Tensor, total, form.bias)
        if form.scale != 1.0:
            total = self._whole(root, aten.mul.Tensor, total, form.scale)
        if value(root).dtype != value(total).dtype:
            total = self._whole(root, prims.convert_element_type.default, total, value(root).dtype)
        if form.rest is not None:
            total = self._whole(root, aten.add.Tensor, total, self._expanded(form.rest, root))
        root.replace_all_uses_with(total)
        self.before.replace(root, total)
        return reduce, total

    def _form(self, node: Node) -> _Form:
        """A sum in its parts."""
        parts = self.parts.get(node, [])
        if not parts:
            return _Form(self.reduces[node].x)
        forms = [self._form(part) for part in parts]
        if calls(node, WAIT, aten.clone.default):
            return forms[0]
        if calls(node, prims.convert_element_type.default):
            return replace(forms[0], partial=self._cast(node, forms[0].partial, value(node).dtype))
        if calls(node, aten.add.Tensor, *PRODUCTS):  # which may add leading dimensions with one entry
            forms = [replace(form, partial=self._reshaped(form.partial, node)) for form in forms]
            if len(forms) > 1:
                return self._added(node, *forms)
            combined = self._plus if calls(node, aten.add.Tensor) else self._times
            return combined(node, forms[0], other_operand(node, parts[0]))
        if calls(node, aten.cat.default):
            return self._joined(node, [self._unscaled(node, form) for form in forms])
        (form,), (part,) = forms, parts
        if form.rest is not None:
            rest = self._whole(node, node.target, self._expanded(form.rest, part), *node.args[1:])
            form = replace(form, rest=rest)
        if keeps_order(node):
            return replace(form, partial=self._reshaped(form.partial, node))
        partial = self._reshaped(form.partial, part)
        return replace(form, partial=self._partial(node, node.target, *[partial if a is part else a for a in node.args], **node.kwargs))

    def _joined(self, node: Node, forms: list[_Form]) -> _Form:
        """Rows of several sums: those of a sum have its bias."""
        forms = [self._without_bias(part, form) for part, form in zip(self.parts[node], forms)]
        partial = self._partial(node, aten.cat.default, [form.partial for form in forms], *node.args[1:])
        if all(form.rest is None for form in forms):
            return _Form(partial)
        zero = self._whole(node, aten.full.default, [1], 0.0, dtype=value(node).dtype, device=value(node).device)
        rests = [self._expanded(form.rest or zero, part) for part, form in zip(self.parts[node], forms)]
        return _Form(partial, rest=self._whole(node, aten.cat.default, rests, *node.args[1:]))

    def _without_bias(self, node: Node, form: _Form) -> _Form:
        return form if form.bias is None else self._plus_rest(node, replace(form, bias=None), form.bias)

    def _times(self, node: Node, form: _Form, factor: Any) -> _Form:
        rest = None if form.rest is None else self._whole(node, node.target, form.rest, factor)
        if is_number(factor):
            by = float(factor) if calls(node, aten.mul.Tensor, aten.mul.Scalar) else 1.0 / factor
            return replace(form, scale=form.scale * by, rest=rest)
        form = self._unscaled(node, replace(form, rest=rest))
        partial, bias = self._partial(node, node.target, form.partial, factor), form.bias
        if bias is None:
            return replace(form, partial=partial)
        bias = self._whole(node, node.target, bias, factor)
        if not is_vector(bias, node):
            return self._plus(node, replace(form, partial=partial, bias=None), bias)
        return replace(form, partial=partial, bias=self._vector(bias))

    def _plus(self, node: Node, form: _Form, addend: Node) -> _Form:
        """What is complete on each rank is added to the bias or to the rest."""
        if is_vector(addend, node) and form.rest is None and value(node).dtype == value(self.sums[node][-1]).dtype:
            form, addend = self._unscaled(node, form), self._vector(addend)
            return replace(form, bias=addend if form.bias is None else self._whole(node, aten.add.Tensor, form.bias, addend))
        return self._plus_rest(node, form, addend)

    def _plus_rest(self, node: Node, form: _Form, addend: Node) -> _Form:
        return replace(form, rest=addend if form.rest is None else self._whole(node, aten.add.Tensor, form.rest, addend))

    def _added(self, node: Node, a: _Form, b: _Form) -> _Form:
        if a.scale != b.scale:
            a, b = self._unscaled(node, a), self._unscaled(node, b)

        def added(x: Node | None, y: Node | None) -> Node | None:
            return x or y if x is None or y is None else self._whole(node, aten.add.Tensor, x, y)

        return _Form(self._accumulated(node, a.partial, b.partial), added(a.bias, b.bias), a.scale, added(a.rest, b.rest))

    def _accumulated(self, node: Node, x: Node, y: Node) -> Node:
        """The sum of two partial sums. A GEMM accumulates it, if one of them is the result of a GEMM alone: it is rounded once."""
        for onto, of in ((x, y), (y, x)):
            gemm = of
            while calls(gemm, *RESHAPES) and keeps_rows(gemm) and len(gemm.users) < 2:
                gemm = gemm.args[0]
            if calls(gemm, aten.mm.default) and len(gemm.users) < 2 and value(onto).dtype == value(of).dtype:
                flat = self._reshaped(onto, gemm)
                return self._reshaped(self._partial(node, aten.addmm.default, flat, *gemm.args), of)
        return self._partial(node, aten.add.Tensor, x, y)

    def _unscaled(self, node: Node, form: _Form) -> _Form:
        if form.scale == 1.0:
            return form
        bias = None if form.bias is None else self._whole(node, aten.mul.Tensor, form.bias, form.scale)
        return _Form(self._partial(node, aten.mul.Tensor, form.partial, form.scale), bias, 1.0, form.rest)

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _cast(self, like: Node, x: Node, dtype: torch.dtype) -> Node:
        while calls(x, prims.convert_element_type.default) and value(x.args[0]).dtype == dtype:
            x = x.args[0]  # the same number, rounded once less
        return x if value(x).dtype == dtype else self._partial(like, prims.convert_element_type.default, x, dtype)

    def _reshaped(self, x: Node, like: Node) -> Node:
        """``x`` in the shape of another node."""
        while calls(x, *RESHAPES) and same_shape(value(x.args[0]).shape, value(like).shape):
            x = x.args[0]
        if same_shape(value(x).shape, value(like).shape):
            return x
        return self._partial(like, aten.reshape.default, x, [self.emitter.size(size) for size in value(like).shape])

    def _expanded(self, x: Node, like: Node) -> Node:
        """``x`` broadcast to the shape of another node."""
        if same_shape(value(x).shape, value(like).shape):
            return x
        return self._whole(like, aten.expand.default, x, [self.emitter.size(size) for size in value(like).shape])

    def _vector(self, x: Node) -> Node:
        return x if value(x).dim() == 1 else self._whole(x, aten.reshape.default, x, [value(x).shape[-1]])

    def _partial(self, like: Node, target: Callable, *args: Any, **kwargs: Any) -> Node:
        """A call before the all-reduce. like: the node whose place in the model's source it has"""
        return self._emit(self.early, like, target, *args, **kwargs)

    def _whole(self, like: Node, target: Callable, *args: Any, **kwargs: Any) -> Node:
        """A call on what all ranks have."""
        return self._emit(self.late, like, target, *args, **kwargs)

    def _emit(self, at: Node, like: Node, target: Callable, *args: Any, **kwargs: Any) -> Node:
        self.emitter.like = like
        with self.graph.inserting_before(at):
            node = self.emitter(target, *args, **kwargs)
        del node.meta["of"]  # it is none of the values of the original graph
        return node

    def _rows(self, root: Node) -> str:
        """Which rows of its reduced values a sum takes: each call, with its bounds."""
        taken = [(str(node.target), value(node.args[0]), node.args[1:]) for node in self._steps(root) if calls(node, *ROWS)]
        names: dict[str, str] = {}

        def show(size: Any) -> str:
            text = str(value(size) if isinstance(size, Node) else size)
            return re.sub(r"\b[su]\d+\b", lambda found: names.setdefault(found.group(), f"size {len(names)}"), text)

        return "; ".join(f"{op} of {[*map(show, x.shape)]} at {[*map(show, bounds)]}" for op, x, bounds in taken)


def _is_zero(x: Node) -> bool:
    """Whether it is a tensor of zeros, as ``masked_fill`` has it."""
    return calls(x, aten.full.default) and x.args[1] == 0
