"""Placed graph -> the same graph, in which layers that are alike are calls of one subgraph: Inductor compiles that once.

Layers are told by their sites. The nodes from one site to the next are a section; the longest run of sections that repeats every
so many is looked for, and each repetition becomes a call. They are alike where all ops, constants, shapes and the flow of data
between them are. What differs are the operands, of which weights are most, and the numbers of the sites.

Order is data flow, as ``weave`` and ``place`` leave it, and any order of the calls that keeps to it is one of the nodes in them.
What a layer writes to an input of the graph, such as its key-value cache, it writes inside, if nobody else reads that input.
"""

import itertools
import operator
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .. import ops
from ..compat import OpOverload, detect_fake_mode
from ..ops.lowering import layer
from .emit import Emitter
from .graph_utils import arguments, aten, calls, in_order, is_view, prims, value

NAME = "tokenweave_layer"
TRIES = 8  # a woven layer has four sites


def outline(graph: Graph) -> tuple[GraphModule | None, int | str]:
    """Make calls of ``ops.lowering.layer`` of repeated layers, in place.

    Returns (what they call, how many there are); (None, why there are none), where the reason is empty if no two layers are alike.
    What they call becomes the attribute NAME of the graph's module.
    """
    _put_in_place(graph)
    _bring_numbers(graph)
    _round_inside(graph)
    numbers = _numbers(graph)
    sections, refused = _sections(graph), {}
    while True:
        at, alike = _longest_run(sections, numbers, refused)
        if not alike or len(refused) == TRIES:
            return None, next(iter(refused.values()), "")
        symbols = _symbols_of(graph, alike[0])
        reason = _not_callable(alike) or ("" if symbols is not None else "its layers have sizes that are no inputs of the graph")
        if not reason:
            break
        refused[at] = reason  # layers that begin at the next site may be cut where less passes from one to the other
    body = _body(alike, symbols, numbers)
    setattr(graph.owning_module, NAME, body.module)
    handed_on = {}
    for repetition in alike:
        handed_on |= _call(graph, repetition, body, handed_on)
    graph.lint()
    return body.module, len(alike)


# --- which nodes -----------------------------------------------------------------------------------------------------------


def _put_in_place(graph: Graph) -> None:
    """Constants to the front, so that whichever layer uses one takes it from elsewhere; and items to their tuples, so that no tuple
    passes from one layer to another."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if node.op == "get_attr":
            first.prepend(node)
        elif calls(node, operator.getitem):
            node.args[0].append(node)


def _bring_numbers(graph: Graph) -> None:
    """Let no layer take a tensor of one number from the CPU, such as the length of a cache that is new, but a copy on its own device.

    Copies, and what is computed for them on the CPU, go to the front: Inductor has to see them, as they cannot be in a CUDA graph.
    """
    site = next((node for node in graph.nodes if calls(node, ops.start, ops.fused)), None)
    if site is None:
        return
    device = value(site.args[0]).device
    known = {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    first = next(node for node in graph.nodes if node not in known)
    inside, copies = {node for section in _sections(graph) for node in section}, {}
    for node in list(graph.nodes):
        numbers = [a for a in node.all_input_nodes if a in known and _is_number_elsewhere(value(a), device)]
        if not numbers or not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
            continue
        if known.issuperset(node.all_input_nodes) and isinstance(value(node), torch.Tensor) and value(node).dim() == 0:
            known.add(node)
            if node is first:
                first = node.next
            else:
                first.prepend(node)
        elif node in inside and torch.Tag.pointwise in node.target.tags and value(node).device == device:
            for number in numbers:
                # Of one in float64, Inductor would compute the product with another rounding.
                if value(number).dtype != torch.float64:
                    if number not in copies:
                        copies[number] = _copy_of(number, device, first)
                    node.replace_input_with(number, copies[number])


def _is_number_elsewhere(val, device: torch.device) -> bool:
    return isinstance(val, torch.Tensor) and val.dim() == 0 and val.device != device


def _copy_of(number: Node, device: torch.device, first: Node) -> Node:
    with first.graph.inserting_before(first):
        copy = first.graph.call_function(prims.device_put.default, (number, device))
    copy.meta["val"] = value(number).new_empty((), device=device)
    return copy


def _round_inside(graph: Graph) -> None:
    """Let each layer round for itself what several take rounded, such as the angles of a rotary embedding.

    Inductor leaves a rounding out where it computes with the result in the same kernel. A layer that is called would find the rounded
    values in memory, and compute with these: to other bits than layers that are compiled one by one.
    """
    sections = _sections(graph)
    section_of = {node: i for i, section in enumerate(sections) for node in section}
    for node in reversed(graph.nodes):
        users = {}
        for user in node.users:
            users.setdefault(section_of.get(user), []).append(user)
        elsewhere = set(users) - {None, section_of.get(node)}
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
    """Whether it is something in fewer bits than that was computed in, or a view of that."""
    while is_view(node.target):
        node = node.args[0]
    if not calls(node, prims.convert_element_type.default):
        return False
    before, after = value(node.args[0]).dtype, value(node).dtype
    return before.is_floating_point and after.is_floating_point and after.itemsize < before.itemsize


@dataclass(frozen=True)
class _Repetition:
    """nodes: of one layer, writes last; outer: what they take from elsewhere, in the order in which they do."""

    nodes: list[Node]
    outer: list[Node]

    def operands(self) -> list[Node]:
        """What of it is tensors."""
        return [a for a in self.outer if isinstance(value(a), torch.Tensor)]

    def written(self) -> list[Node]:
        return [node.args[0] for node in self.nodes if _is_write(node)]


def _sections(graph: Graph) -> list[list[Node]]:
    """The nodes from each site on to the next."""
    sections = []
    for node in graph.nodes:
        if calls(node, ops.start, ops.fused):
            sections.append([])
        if sections and node.op == "call_function" and not _is_write(node):
            sections[-1].append(node)
    return sections


def _is_write(node: Node) -> bool:
    """Whether it is one of those that stand at the end of a graph for what the model did to its inputs in place."""
    return calls(node, aten.copy_.default) and node.args[0].op == "placeholder"


def _with_writes(nodes: list[Node]) -> list[Node]:
    """The nodes, and behind them the writes of their results to what nobody else reads."""
    inside = set(nodes)
    writes = [u for node in nodes for u in node.users if _is_write(u) and u.args[1] is node]
    return nodes + [write for write in writes if set(write.args[0].users) <= {write, *inside}]


def _longest_run(sections, numbers: dict[Node, int], refused) -> tuple[tuple[int, int], list[_Repetition]]:
    """The repetitions that save most nodes; of several that do, the shortest. None if there are no two.

    Returns (where: the first section and how many are one repetition, the repetitions). refused: where not
    """
    known = {}
    kinds = [known.setdefault(_key(section, numbers)[0], len(known)) for section in sections]
    at, best, saved = (0, 0), [], 0
    for period in range(1, len(sections) // 2 + 1):
        first = 0
        while first + 2 * period <= len(sections):
            end = first + period
            while end < len(sections) and kinds[end] == kinds[end - period]:
                end += 1
            count = (end - first) // period
            if (first, period) in refused:
                first += 1
                continue
            if count > 1 and (count - 1) * sum(map(len, sections[first : first + period])) > saved:
                run = _equal(sections, first, period, count, numbers)
                if (len(run) - 1) * len(run[0].nodes) > saved:
                    at, best, saved = (first, period), run, (len(run) - 1) * len(run[0].nodes)
            first = max(end - period, first) + 1
    return at, best


def _equal(sections, first, period, count, numbers) -> list[_Repetition]:
    """As many repetitions in a row as are alike as a whole, of those whose sections are."""
    repetitions = []
    for at in range(first, first + count * period, period):
        nodes = _with_writes([node for section in sections[at : at + period] for node in section])
        key, outer = _key(nodes, numbers)
        repetitions.append((key, _Repetition(nodes, outer)))
    runs = [[repetition for _, repetition in run] for _, run in itertools.groupby(repetitions, key=operator.itemgetter(0))]
    return max(runs, key=len)


def _numbers(graph: Graph) -> dict[Node, int]:
    """What a site is to be numbered as in a layer: NEXT_SITE wherever it follows the one before it in its slot."""
    numbers, last = {}, {}
    for node in graph.nodes:
        if calls(node, ops.start, ops.fused):
            group, slot, site = map(arguments(node).get, ("group", "slot", "site"))
            numbers[node] = ops.NEXT_SITE if last.get((group, slot)) == site - 1 else site
            last[group, slot] = site
    return numbers


def _key(nodes: list[Node], numbers: dict[Node, int]) -> tuple[tuple, list[Node]]:
    """What is equal for nodes that compute the same of what they take; and what they take from elsewhere."""
    inner, outer, key = {node: i for i, node in enumerate(nodes)}, {}, []

    def encoded(a):
        if isinstance(a, Node):
            return ("inner", inner[a]) if a in inner else ("outer", outer.setdefault(a, len(outer)))
        if isinstance(a, (list, tuple)):
            return tuple(map(encoded, a))
        if isinstance(a, dict):
            return tuple((name, encoded(item)) for name, item in a.items())
        return type(a), str(a)  # 1, 1.0 and True are equal; -0.0 and 0.0 are, too

    for node in nodes:
        key.append((node.target, encoded(_args(node, numbers)), encoded(node.kwargs), _signature(value(node))))
    return (tuple(key), tuple(_signature(value(node)) for node in outer)), list(outer)


def _args(node: Node, numbers: dict[Node, int]) -> tuple:
    return in_order(node.target, arguments(node) | {"site": numbers[node]}) if node in numbers else node.args


def _signature(val) -> tuple:
    if isinstance(val, torch.Tensor):
        return val.device, val.dtype, tuple(map(_expr, val.shape)), tuple(map(_expr, val.stride())), _is_aligned(val)
    return tuple(map(_signature, val)) if isinstance(val, (list, tuple)) else (type(val), str(val))


def _is_aligned(val: torch.Tensor) -> bool:
    """Whether it is known to begin at a multiple of 16 bytes, as far as its place in its storage goes."""
    return sympy.Mod(_expr(val.storage_offset()) * val.itemsize, 16) == 0


def _expr(size):
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


# --- what can be called ----------------------------------------------------------------------------------------------------


def _not_callable(alike: list[_Repetition]) -> str | None:
    """Why one graph cannot stand for them, without Inductor knowing more of it than what it takes and returns; None if it can."""
    first = alike[0].nodes[0]
    device = value(first.args[0]).device
    # Inductor would not know that a result is a part of what a layer takes, or writes. What is only read is nobody's to reuse.
    only_read = {_storage(n) for n in first.graph.find_nodes(op="placeholder") if _is_read_only(n)}
    for node in alike[0].nodes:
        if _is_write(node):
            continue
        if node.meta.get("unbacked_bindings"):
            return f"its layers call {node.target}, whose result has a size that depends on data"
        if node.target is operator.getitem or isinstance(value(node), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            continue
        if not isinstance(node.target, OpOverload):
            return f"its layers call {node.target}, which has a graph of its own"
        tags = node.target.tags
        if torch.Tag.cudagraph_unsafe in tags or node.target._schema.is_mutable:
            return f"its layers call {node.target}, which is not a function of its inputs alone"
    for repetition in alike:
        inside = set(repetition.nodes)
        taken = {*repetition.operands(), *(node.args[1] for node in repetition.nodes if _is_write(node))}
        not_new = set(map(_storage, taken)) - only_read
        for node in repetition.nodes:
            outside = [user for user in node.users if user not in inside]
            if any(calls(user, aten.copy_.default) for user in outside):
                return "its layers write to inputs of the graph that are read elsewhere, too"
            # Inductor takes the place of a result in its storage for one that is yet to be counted.
            if outside and not (isinstance(value(node), torch.Tensor) and _expr(value(node).storage_offset()) == 0):
                return f"its layers hand on what {getattr(node.target, '__name__', node.target)} returns, which is no tensor, or a part of one"
            if outside and _storage(node) in not_new:
                return "its layers hand on a part of what they take, or write"
        if not all(isinstance(value(node), (torch.Tensor, torch.SymInt)) for node in repetition.outer):
            return "its layers take something other than tensors and sizes"
    # Constants, and results that nobody reads, such as the seeds of an attention, may be numbers on the CPU.
    elsewhere = [(node, t) for node in [*alike[0].nodes, *alike[0].outer] for t in _tensors(value(node)) if t.device != device]
    if any(node in alike[0].outer or tensor.dim() > 0 for node, tensor in elsewhere):
        return f"its layers take or make tensors elsewhere than on {device}"
    return None


def _is_read_only(node: Node) -> bool:
    return isinstance(value(node), torch.Tensor) and not any(_is_write(user) and user.args[0] is node for user in node.users)


def _storage(node: Node) -> int:
    return value(node).untyped_storage()._cdata


def _tensors(val) -> list[torch.Tensor]:
    if isinstance(val, (list, tuple)):
        return [tensor for item in val for tensor in _tensors(item)]
    return [val] if isinstance(val, torch.Tensor) else []


def _symbols_of(graph: Graph, layer: _Repetition) -> list[Node] | None:
    """The inputs of the graph that are the symbols in a layer's sizes; None if there is one for which there is none."""
    inputs = {_expr(value(n)): n for n in graph.find_nodes(op="placeholder") if isinstance(value(n), torch.SymInt)}
    vals = [value(node) for node in (*layer.nodes, *layer.outer)]
    sizes = [size for val in vals for t in _tensors(val) for size in (*t.shape, *t.stride(), t.storage_offset())]
    sizes += [val for val in vals if isinstance(val, torch.SymInt)]
    symbols = sorted(set().union(*(_expr(size).free_symbols for size in sizes)), key=str)
    return [inputs[symbol] for symbol in symbols] if set(symbols) <= set(inputs) else None


# --- the subgraph and its calls --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Body:
    """module: one layer; symbols: the inputs of the graph that it takes before those of ``_Repetition.outer`` that are tensors;
    results: which of its nodes it returns; written: which of its operands it writes to, counted from the first symbol"""

    module: GraphModule
    symbols: list[Node]
    results: list[int]
    written: tuple[int, ...]


def _body(alike: list[_Repetition], symbols: list[Node], numbers: dict[Node, int]) -> _Body:
    first = alike[0]
    results = sorted({i for r in alike for i, node in enumerate(r.nodes) if not set(node.users) <= set(r.nodes)})
    new = Graph()
    emit = Emitter(new, detect_fake_mode([value(first.nodes[0].args[0])]))
    env = {}
    operands = [*symbols, *first.operands()]
    for outer in operands:
        env[outer] = new.placeholder(outer.name)
        env[outer].meta = dict(outer.meta)
    env |= {a: emit.size(value(a)) for a in first.outer if a not in env}
    for node in first.nodes:
        args, kwargs = map_arg((_args(node, numbers), node.kwargs), env.__getitem__)
        env[node] = new.call_function(node.target, args, kwargs)
        env[node].meta = dict(node.meta)
    returned = [env[first.nodes[i]] for i in results]
    output = new.output(tuple(returned))
    # As Inductor has it for subgraphs of its own: whoever calls it relies on these strides.
    output.meta["user_visible_output_idxs"] = list(range(len(returned)))
    output.meta["original_output_strides"] = [value(node).stride() for node in returned]
    new.lint()
    return _Body(GraphModule(torch.nn.Module(), new), symbols, results, tuple(map(operands.index, first.written())))


def _call(graph: Graph, repetition: _Repetition, body: _Body, handed_on: dict[Node, Node]) -> dict[Node, Node]:
    """Replace a layer by a call. handed_on: what earlier calls return, by the nodes that it replaces; returns the same of this one."""
    with graph.inserting_before(repetition.nodes[0]):
        module = graph.get_attr(NAME)
        operands = [*body.symbols, *(handed_on.get(a, a) for a in repetition.operands())]
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
