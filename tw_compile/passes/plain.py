"""graph -> the same graph in plainer terms, so that the passes behind this one need to know fewer forms. In place.

- An op that a library has registered (``register_decomposition``), such as an RMSNorm that writes to its arguments, becomes ATen ops.
- An argument that a functional call writes to, and that is its base in another shape, becomes the base.
- Where a library has registered ops: a residual that is added in float32 to a sum over the ranks, and rounded afterwards, is added in the
  dtype of both, as vLLM's norms do it. A site adds in float32 in any case.
- What is added in float32 to a sum over the ranks, and only rounded to the dtype of both afterwards, is added in that dtype.
- A difference, a negation, ``addcmul`` and ``add`` with ``alpha`` or 0, of what is linear in a sum over the ranks, become products and
  sums.
- A concatenation of all slices of a value, in their order, becomes the value.
"""

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from ..compat import OpOverload, auto_functionalized, detect_fake_mode
from .emit import Emit, Emitter
from .find import is_sum, stays
from .graph_utils import RESHAPES, aten, calls, is_one, is_tensor, is_view, prims, same_shape, value
from .norms import Norm, is_number, match_norm
from .rules.functional import BASES, EMPTY, given, written
from .rules.token_axis import equal, expr

# (emit, name -> argument) -> name of an argument that the op writes to, or 0, 1, ... for its results -> its new value
Decomposition = Callable[[Emit, dict[str, Any]], dict[str | int, Node] | None]
_DECOMPOSITIONS: dict[OpOverload, Decomposition] = {}


def register_decomposition(op: OpOverload, decomposition: Decomposition) -> None:
    """Register how an op is made of ATen ops. All ranks must register the same.

    decomposition: (emit, name -> argument) -> the new value of each argument that ``op`` writes to, by name, and of each result, by index.
                   ``emit(target, *args)`` makes a call. It returns None where it does not cover the arguments
    """
    _DECOMPOSITIONS[op] = decomposition


def decompositions() -> list[str]:
    """The names of the ops that libraries have registered."""
    return [str(op) for op in _DECOMPOSITIONS]


def plain(graph: Graph) -> None:
    """Write a graph in plainer terms, in place."""
    tensor = next((value(node) for node in graph.nodes if is_tensor(node)), None)
    if tensor is None:
        return
    emit = _Before(graph, detect_fake_mode([tensor]))
    steps = _decompose, _reshape_bases, _add_in_dtype, _add_rounded, _spell_out, _join
    changed = [any(step(emit, node) for step in steps) for node in list(graph.nodes)]
    if any(changed):
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or stays(node))
        graph.lint()


class _Before(Emitter):
    """Adds calls before the node that is replaced, and finds the sizes of the graph among all nodes."""

    def at(self, node: Node) -> "_Before":
        self.like, self.sizes = node, {}
        return self

    def __call__(self, target: Callable, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.like):
            return super().__call__(target, *args, **kwargs)


def _decompose(emit: _Before, node: Node) -> bool:
    op = node.args[0] if calls(node, auto_functionalized) else node.target
    decomposition = _DECOMPOSITIONS.get(op) if node.op == "call_function" else None
    if decomposition is None:
        return False
    arguments = given(node)
    if op is not node.target:
        views = {name: _argument(emit.at(node), node, name) for name in written(op)}
        if any(isinstance(view, _NotWhole) for view in views.values()):
            return False
        arguments |= views
    new = decomposition(emit.at(node), arguments)
    if new is None:
        return False
    results = len(op._schema.returns) or 1 if op is not node.target else 0  # a functional call of an op without results returns None first
    names = {node.kwargs[f"_{name}_base_index"] + results: name for name in written(op)} if op is not node.target else {}
    if op is node.target and len(op._schema.returns) == 1:
        _replace(emit, node, new[0])
        return True
    for user in list(node.users):
        assert calls(user, operator.getitem)
        index = user.args[1]
        _replace(emit, user, new[names.get(index, index)])
    return True


def _replace(emit: _Before, node: Node, new: Node) -> None:
    if not same_shape(value(node).shape, value(new).shape):
        new = emit(aten.reshape.default, new, _sizes(emit, value(node).shape))
    node.replace_all_uses_with(new)


def _sizes(emit: _Before, shape: Any) -> list:
    """A shape as an argument of a reshape."""
    symbolic = [size for size in shape if not isinstance(size, int)]
    return [size if isinstance(size, int) else -1 if len(symbolic) == 1 else emit.size(size) for size in shape]


class _NotWhole:
    """Stands for an argument that is a part of its base."""


def _argument(emit: _Before, node: Node, name: str) -> Any:
    """An argument that a functional call writes to, of which the base has as many entries."""
    index = node.kwargs[f"_{name}_base_index"]
    if index is None:
        return None
    base = node.kwargs[BASES][index]
    if f"_{name}_slice_dim" in node.kwargs:
        return _NotWhole()
    if f"_{name}_size" not in node.kwargs:
        return base
    size = node.kwargs[f"_{name}_size"]
    return emit(aten.reshape.default, base, list(size)) if _is_reshape(node, name, base) else _NotWhole()


def _is_reshape(node: Node, name: str, base: Node) -> bool:
    """Whether an argument has all entries of its base in their order."""
    size, stride = (_values(node.kwargs[f"_{name}_{what}"]) for what in ("size", "stride"))
    whole = value(base)
    with whole.fake_mode:
        view = torch.as_strided(whole, size, stride, _values([node.kwargs[f"_{name}_storage_offset"]])[0])
    return whole.is_contiguous() and view.is_contiguous() and _entries(view) == _entries(whole) and _offset(view) == _offset(whole)


def _values(sizes: Any) -> list:
    return [value(size) if isinstance(size, Node) else size for size in sizes]


def _entries(tensor: torch.Tensor) -> str:
    return str(tensor.numel())


def _offset(tensor: torch.Tensor) -> str:
    return str(tensor.storage_offset())


def _reshape_bases(emit: _Before, node: Node) -> bool:
    """Make arguments that are reshapes of their bases the bases."""
    if not calls(node, auto_functionalized) or not isinstance(node.args[0], OpOverload):
        return False
    found = {node.kwargs[f"_{name}_base_index"]: name for name in written(node.args[0]) if f"_{name}_size" in node.kwargs}
    once = [node.kwargs.get(f"_{name}_base_index") for name in written(node.args[0])]
    bases, kwargs = list(node.kwargs[BASES]), dict(node.kwargs)
    changed = {}
    for index, name in found.items():
        base = bases[index]
        if once.count(index) > 1 or not _is_reshape(node, name, base):
            continue
        size = list(node.kwargs[f"_{name}_size"])
        emit.at(node)
        bases[index] = emit(EMPTY, size, **base.kwargs) if calls(base, EMPTY) else emit(aten.reshape.default, base, size)
        view = [f"_{name}_{what}" for what in ("size", "stride", "storage_offset")]
        kwargs = {key: argument for key, argument in kwargs.items() if key not in view}
        changed[index] = base
    if not changed:
        return False
    new = emit.at(node)(node.target, *node.args, **kwargs | {BASES: bases})
    results = len(value(node)) - len(bases)
    for user in list(node.users):
        part = emit(operator.getitem, new, user.args[1])
        base = changed.get(user.args[1] - results)
        if base is not None:
            part = emit(aten.reshape.default, part, _sizes(emit, value(base).shape))
        user.replace_all_uses_with(part)
    return True


def _add_in_dtype(emit: _Before, node: Node) -> bool:
    """float(a) + float(b), of which one is a sum over the ranks, becomes float(a + b)."""
    casts = list(node.args[:2]) if calls(node, aten.add.Tensor) and not node.kwargs else []
    if not casts or not all(calls(cast, prims.convert_element_type.default) and cast.args[1] == torch.float32 for cast in casts):
        return False
    a, b = (cast.args[0] for cast in casts)
    dtype = value(a).dtype
    rounded = [user for user in node.users if calls(user, prims.convert_element_type.default) and user.args[1] == dtype]
    # Elsewhere the float32 sum may be what the model means. The last norm's sum is not rounded, as no layer reads it.
    if not _DECOMPOSITIONS or not (rounded or isinstance(match_norm(node), Norm)):
        return False
    if not (is_sum(a) or is_sum(b)) or dtype != value(b).dtype or dtype not in (torch.bfloat16, torch.float16):
        return False
    total = emit.at(node)(aten.add.Tensor, a, b)
    fp32 = emit(prims.convert_element_type.default, total, torch.float32)
    for cast in rounded:
        cast.replace_all_uses_with(total)
    node.replace_all_uses_with(fp32)
    return True


def _add_rounded(emit: _Before, node: Node) -> bool:
    """What is added in float32 to 16 bits, and read in 16 bits only, is added in 16 bits: the sum is rounded once in either case."""
    dtypes = {user.args[1] for user in node.users if calls(user, prims.convert_element_type.default)}
    if not calls(node, aten.add.Tensor) or len(dtypes) != 1 or value(node).dtype != torch.float32:
        return False
    (dtype,), rounded = dtypes, list(node.users)
    if dtype not in (torch.bfloat16, torch.float16) or not all(calls(user, prims.convert_element_type.default) for user in rounded):
        return False
    if not any(map(_is_reduced, node.all_input_nodes)) or not _has_16_bits(node, dtype):
        return False
    total = _in_16_bits(emit.at(node), node, dtype)
    for user in rounded:
        user.replace_all_uses_with(total)
        emit.graph.erase_node(user)
    emit.graph.erase_node(node)  # it would be another reader of the sum
    return True


def _has_16_bits(node: Node, dtype: torch.dtype) -> bool:
    """Whether a value is made of values in ``dtype``, and of products of a sum over the ranks, by sums in float32."""
    if not is_tensor(node) or value(node).dtype == dtype:
        return is_tensor(node)
    if calls(node, aten.add.Tensor):
        return not node.kwargs and all(_has_16_bits(term, dtype) for term in node.args)
    return (calls(node, prims.convert_element_type.default) and value(node.args[0]).dtype == dtype) or _is_reduced(node)


def _in_16_bits(emit: Emitter, node: Node, dtype: torch.dtype) -> Node:
    """A value that ``_has_16_bits``, in ``dtype``."""
    if value(node).dtype == dtype:
        return node
    if calls(node, prims.convert_element_type.default) and value(node.args[0]).dtype == dtype:
        return node.args[0]
    if calls(node, aten.add.Tensor):
        return emit(aten.add.Tensor, *[_in_16_bits(emit, term, dtype) for term in node.args])
    return emit(prims.convert_element_type.default, node, dtype)


_LINEAR = (
    *RESHAPES, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.slice.Tensor,
    aten.mm.default, prims.convert_element_type.default,
)  # fmt: skip


def _is_reduced(node: Node) -> bool:
    """Whether a value is linear in a sum over the ranks which nothing else reads."""
    is_alone = is_tensor(node) and len(node.users) == 1
    return is_alone and (is_sum(node) or (calls(node, *_LINEAR) and any(map(_is_reduced, node.all_input_nodes))))


def _spell_out(emit: _Before, node: Node) -> bool:
    """A call that is linear in a sum over the ranks becomes products and sums, which merge.py knows."""
    if calls(node, aten.add.Tensor) and is_number(node.args[1]) and node.args[1] == 0 and _is_reduced(node.args[0]):
        node.replace_all_uses_with(node.args[0])  # the first addend of Python's ``sum``
        emit.graph.erase_node(node)
        return True
    if not calls(node, aten.neg.default, aten.sub.Tensor, aten.add.Tensor, aten.addcmul.default):
        return False
    terms = list(node.args)
    by = node.kwargs.get("alpha", node.kwargs.get("value", 1))
    alike = all(is_tensor(term) and value(term).dtype == value(node).dtype for term in terms) and is_number(by)
    by = -by if calls(node, aten.neg.default, aten.sub.Tensor) and alike else by
    if not alike or not any(map(_is_reduced, terms)) or (len(terms) == 2 and by == 1):
        return False
    emit.at(node)
    product = emit(aten.mul.Tensor, *terms[1:]) if len(terms) == 3 else terms[-1]
    product = emit(aten.mul.Tensor, product, by) if by != 1 else product
    node.replace_all_uses_with(product if len(terms) == 1 else emit(aten.add.Tensor, terms[0], product))
    emit.graph.erase_node(node)  # it would be another reader of the sum
    return True


def _join(emit: _Before, node: Node) -> bool:
    """The parts of a value, one after the other, become the value, so that one call reads it; so does what is written to all of it."""
    whole = _cut_and_joined(node)
    if calls(node, aten.select_scatter.default) and is_one(value(node).shape[node.args[2]]):
        whole = emit.at(node)(aten.unsqueeze.default, node.args[1], node.args[2])
    if whole is not None:
        node.replace_all_uses_with(whole)
    return whole is not None


def _cut_and_joined(cat: Node) -> Node | None:
    """The value whose parts along a dimension, one after the other, a call joins again."""
    parts = cat.args[0] if calls(cat, aten.cat.default) else []
    whole = parts[0].args[0] if parts and calls(parts[0], aten.slice.Tensor) else None
    if whole is None or not same_shape(value(whole).shape, value(cat).shape) or _is_returned(cat):
        return None
    dim, at = (cat.args[1] if len(cat.args) > 1 else 0) % value(cat).dim(), sympy.Integer(0)
    for part in parts:
        if not calls(part, aten.slice.Tensor) or part.args[0] is not whole or len(part.args) != 4:
            return None
        _, of, first, _ = part.args
        if of % value(cat).dim() != dim or not equal(expr(value(first) if isinstance(first, Node) else first), at):
            return None
        at += expr(value(part).shape[dim])
    return whole


def _is_returned(node: Node) -> bool:
    """Whether the graph returns a value, or a view of it: it must have memory of its own."""
    return any(user.op == "output" or (is_view(user.target) and _is_returned(user)) for user in node.users)
