"""Placed graph -> the same graph, in which equal layers (layers.py) are calls of one subgraph, which Inductor compiles once.

``weave`` and ``place`` order nodes by data flow only. So each order of the calls that respects data flow is also right for the nodes in
them. A layer also writes to inputs of the graph, such as its key-value cache, if nothing outside of the layer reads that input.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..compat import FakeScriptObject, OpOverload, auto_functionalized, detect_fake_mode
from ..ops.lowering import layer
from .emit import Emitter
from .graph_utils import aten, calls, is_view, prims, value
from .layers import SITES, Repetition, arguments_of, different_text, is_write, longest_run, sections_of, site_numbers
from .rules.token_axis import expr

NAME = "tokenweave_layer"
TRIES = 8  # a woven layer has four sites


def outline(graph: Graph) -> tuple[GraphModule | None, int | str]:
    """Replace equal layers by calls of ``ops.lowering.layer``, in place.

    Returns (the module of one layer, the number of calls), or (None, why there are none); the reason is '' if layers differ in more
    than texts.
    The module becomes the attribute NAME of the graph's module.
    """
    _move(graph)
    _copy_scalars(graph)
    _round_in_layers(graph)
    numbers, sections = site_numbers(graph), sections_of(graph)
    refused: dict[tuple[int, int], str] = {}
    while True:
        at, alike = longest_run(sections, numbers, refused)
        if not alike or len(refused) == TRIES:
            return None, next(iter(refused.values()), "") or different_text(sections, numbers)
        symbols = _symbols_of(graph, alike[0])
        reason = _not_callable(alike)
        if reason is None and symbols is not None:
            break
        # Layers that begin at another site may pass other values from one to the next.
        refused[at] = reason or "its layers have sizes that are not inputs of the graph"
    body = _body(alike, symbols, numbers)
    setattr(graph.owning_module, NAME, body.module)
    replaced: dict[Node, Node] = {}
    for repetition in alike:
        replaced |= _call(graph, repetition, body, replaced)
    graph.lint()
    return body.module, len(alike)


# --- before layers are found -----------------------------------------------------------------------------------------------


def _move(graph: Graph) -> None:
    """Move constants to the front, so that they are in no layer; and ``getitem`` to its tuple, so that layers pass on no tuples."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "get_attr":
            first.prepend(node)
        elif calls(node, operator.getitem):
            node.args[0].append(node)


def _copy_scalars(graph: Graph) -> None:
    """Give layers copies of scalar tensors on the CPU, such as the length of a new cache, on their own device.

    The copies, and the calls on the CPU that they depend on, move to the front. There Inductor sees them: they cannot be in a CUDA graph.
    """
    site = next((node for node in graph.nodes if calls(node, *SITES)), None)
    if site is None:
        return
    device = value(site.args[0]).device
    known = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    first = next(node for node in graph.nodes if node not in known)
    inside = {node for section in sections_of(graph) for node in section}
    copies: dict[Node, Node] = {}
    for node in list(graph.nodes):
        scalars = [a for a in node.all_input_nodes if a in known and _is_scalar_elsewhere(value(a), device)]
        if not scalars or not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
            continue
        if known.issuperset(node.all_input_nodes) and isinstance(value(node), torch.Tensor) and value(node).dim() == 0:
            known.add(node)
            if node is first:
                first = node.next
            else:
                first.prepend(node)
        elif node in inside and torch.Tag.pointwise in node.target.tags and value(node).device == device:
            for scalar in scalars:
                # With a float64 copy, Inductor would round a product differently.
                if value(scalar).dtype != torch.float64:
                    if scalar not in copies:
                        copies[scalar] = _copy_of(scalar, device, first)
                    node.replace_input_with(scalar, copies[scalar])


def _is_scalar_elsewhere(val: object, device: torch.device) -> bool:
    return isinstance(val, torch.Tensor) and val.dim() == 0 and val.device != device


def _copy_of(scalar: Node, device: torch.device, first: Node) -> Node:
    """A copy of a scalar tensor on ``device``, before the node ``first``."""
    with first.graph.inserting_before(first):
        copy = first.graph.call_function(prims.device_put.default, (scalar, device))
    copy.meta["val"] = value(scalar).new_empty((), device=device)
    return copy


def _round_in_layers(graph: Graph) -> None:
    """Copy a rounding whose result several layers take into each of them, such as that of a rotary embedding's angles.

    Inductor omits a rounding if the same kernel computes with the result. A layer that is called would read rounded values from memory, and
    its results would not have the same bits as those of layers that are compiled one by one.
    """
    sections = sections_of(graph)
    section_of = {node: i for i, section in enumerate(sections) for node in section}
    for node in reversed(graph.nodes):
        users: dict[int, list[Node]] = {}
        for user in node.users:
            if user in section_of:
                users.setdefault(section_of[user], []).append(user)
        elsewhere = set(users) - {section_of.get(node)}
        if len(elsewhere) < 2 or not _is_rounded(node):
            continue
        for i in elsewhere:
            first = min(users[i], key=sections[i].index)
            with graph.inserting_before(first):
                own = graph.node_copy(node, lambda a: a)
            sections[i].insert(sections[i].index(first), own)
            section_of[own] = i
            for user in users[i]:
                user.replace_input_with(node, own)
        if not node.users:
            graph.erase_node(node)


def _is_rounded(node: Node) -> bool:
    """Whether it is a cast to a floating dtype with fewer bits, or a view of one."""
    while is_view(node.target):
        node = node.args[0]
    if not calls(node, prims.convert_element_type.default):
        return False
    before, after = value(node.args[0]).dtype, value(node).dtype
    return before.is_floating_point and after.is_floating_point and after.itemsize < before.itemsize


# --- whether layers can be called ------------------------------------------------------------------------------------------


def _not_callable(alike: list[Repetition]) -> str | None:
    """Why layers cannot be calls of one graph, of which Inductor knows only inputs and results; None if they can."""
    first = alike[0].nodes[0]
    device = value(first.args[0]).device
    # Inductor would not know that a result shares memory with an input, or with a value that the layer writes. It never reuses the
    # memory of inputs of the graph that are only read.
    only_read = {_storage(n) for n in first.graph.find_nodes(op="placeholder") if _is_read_only(n)}
    for node in alike[0].nodes:
        if is_write(node):
            continue
        if node.meta.get("unbacked_bindings"):
            return f"its layers call {node.target}, whose result has a size that depends on data"
        if node.target is operator.getitem or isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            continue
        # A functional call of an op that writes: Inductor lets it write to a value of the layer, or to a copy of an operand.
        is_functional = calls(node, auto_functionalized)
        op = node.args[0] if is_functional else node.target
        if not isinstance(op, OpOverload):
            return f"its layers call {op}, which has a graph of its own"
        if torch.Tag.cudagraph_unsafe in op.tags or (op._schema.is_mutable and not is_functional):
            return f"its layers call {op}, which is not a function of its inputs alone"
    for repetition in alike:
        inside = set(repetition.nodes)
        taken = {*repetition.operands(), *(node.args[1] for node in repetition.nodes if is_write(node))}
        not_new = {_storage(node) for node in taken if isinstance(value(node), torch.Tensor)} - only_read
        for node in repetition.nodes:
            outside = [user for user in node.users if user not in inside]
            if any(calls(user, aten.copy_.default) for user in outside):
                return "its layers write to inputs of the graph that are also read elsewhere"
            # Inductor would add the offset of a result in its storage once more.
            if outside and not (isinstance(value(node), torch.Tensor) and expr(value(node).storage_offset()) == 0):
                name = getattr(node.target, "__name__", node.target)
                return f"its layers return the result of {name}, which is not a tensor, or is a part of one"
            if outside and _storage(node) in not_new:
                return "its layers return a view of an input, or of a value that they write"
        if not all(isinstance(value(node), (torch.Tensor, torch.SymInt, FakeScriptObject)) for node in repetition.outer):
            return "its layers have inputs other than tensors, sizes and objects"
    # Results without users, such as the seed of an attention, may be scalar tensors on the CPU.
    elsewhere = [(node, t) for node in [*alike[0].nodes, *alike[0].outer] for t in _tensors(value(node)) if t.device != device]
    if any(node in alike[0].outer or tensor.dim() > 0 for node, tensor in elsewhere):
        return f"its layers have tensors that are not on {device}"
    return None


def _is_read_only(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor) and not any(is_write(user) and user.args[0] is node for user in node.users)


def _storage(node: Node) -> int:
    return value(node).untyped_storage()._cdata


def _tensors(val: Any) -> list[torch.Tensor]:
    if isinstance(val, (list, tuple)):
        return [tensor for item in val for tensor in _tensors(item)]
    return [val] if isinstance(val, torch.Tensor) else []


def _symbols_of(graph: Graph, layer: Repetition) -> list[Node] | None:
    """The inputs of the graph that are the symbols in a layer's sizes; None if a symbol is not an input."""
    inputs = {expr(value(n)): n for n in graph.find_nodes(op="placeholder") if isinstance(value(n), torch.SymInt)}
    vals = [value(node) for node in (*layer.nodes, *layer.outer)]
    sizes = [size for val in vals for t in _tensors(val) for size in (*t.shape, *t.stride(), t.storage_offset())]
    sizes += [val for val in vals if isinstance(val, torch.SymInt)]
    symbols = sorted(set().union(*(expr(size).free_symbols for size in sizes)), key=str)
    return [inputs[symbol] for symbol in symbols] if set(symbols) <= set(inputs) else None


# --- the subgraph and its calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Body:
    """The graph of a layer.

    module:  takes the symbols, then ``Repetition.operands``
    symbols: the inputs of the graph that are symbols in its sizes
    results: the indices of the nodes that it returns
    written: the indices of the inputs that it writes to
    """

    module: GraphModule
    symbols: list[Node]
    results: list[int]
    written: tuple[int, ...]


def _body(alike: list[Repetition], symbols: list[Node], numbers: dict[Node, int]) -> _Body:
    first = alike[0]
    results = sorted({i for r in alike for i, node in enumerate(r.nodes) if not set(node.users) <= set(r.nodes)})
    new = Graph()
    emit = Emitter(new, detect_fake_mode([value(first.nodes[0].args[0])]))
    env: dict[Node, Any] = {}
    operands = [*symbols, *first.operands()]
    for outer in operands:
        env[outer] = new.placeholder(outer.name)
        env[outer].meta = dict(outer.meta)
    env |= {a: emit.size(value(a)) for a in first.outer if a not in env}
    for node in first.nodes:
        args, kwargs = map_arg((arguments_of(node, numbers), node.kwargs), env.__getitem__)
        env[node] = new.call_function(node.target, args, kwargs)
        env[node].meta = dict(node.meta)
    returned = [env[first.nodes[i]] for i in results]
    output = new.output(tuple(returned))
    # As in Inductor's own subgraphs: the caller relies on these strides.
    output.meta["user_visible_output_idxs"] = list(range(len(returned)))
    output.meta["original_output_strides"] = [value(node).stride() for node in returned]
    new.lint()
    return _Body(GraphModule(torch.nn.Module(), new), symbols, results, tuple(map(operands.index, first.written())))


def _call(graph: Graph, repetition: Repetition, body: _Body, replaced: dict[Node, Node]) -> dict[Node, Node]:
    """Replace a layer by a call.

    replaced: node -> the result of an earlier call that replaces it
    Returns the same for this call.
    """
    with graph.inserting_before(repetition.nodes[0]):
        module = graph.get_attr(NAME)
        operands = [*body.symbols, *(replaced.get(a, a) for a in repetition.operands())]
        call = graph.call_function(layer, (module, body.written, *operands))
        returned = [repetition.nodes[i] for i in body.results]
        call.meta["val"] = tuple(map(value, returned))
        results = {old: graph.call_function(operator.getitem, (call, i)) for i, old in enumerate(returned)}
    for old, new in results.items():
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    for node in reversed(repetition.nodes):
        graph.erase_node(node)
    return results
