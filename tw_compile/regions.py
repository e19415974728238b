"""Inlines regions that are marked to be compiled once (``torch.compiler.nested_compile_region``).

A site reaches from one layer into the next, so the passes need both layers in one graph. Equal layers are still compiled only once: see
``passes/outline.py``. Marked regions save the time that Dynamo and AOTAutograd take to trace each layer.
"""

import operator

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .compat import auto_functionalized, invoke_subgraph

_CALL = invoke_subgraph
# AOTAutograd's call of a region that writes to its inputs. It returns the region's results, and then the inputs that were written.
_WRITING_CALL = auto_functionalized


def inline(gm: GraphModule) -> bool:
    """Inline the regions of a graph of Dynamo or AOTAutograd, in place. Returns whether any was inlined.

    The inlined nodes have the fake values of the region, which all its calls share: the caller propagates new ones.
    Two kinds of region stay calls: a region that writes to a view of an input, and a region with sizes that depend on data, as all of
    its calls would get the same symbol.
    """
    inlined = [_inline(gm, call) for target in (_CALL, _WRITING_CALL) for call in gm.graph.find_nodes(op="call_function", target=target)]
    if any(inlined):
        gm.delete_all_unused_submodules()
        gm.recompile()
    return any(inlined)


def _taken(call: Node) -> tuple[Node, list, list[int]] | None:
    """(region, operands, indices of the operands that it writes to) of a call; None if it is no call that can be inlined."""
    if call.target is _CALL:
        return call.args[0], list(call.args[2:]), []
    if call.args[0] is not _CALL:
        return None
    given, bases = call.kwargs, call.kwargs["_all_bases"]
    operands, written = {int(name[3:]): a for name, a in given.items() if name.startswith("arg")}, [-1] * len(bases)
    for name, base in given.items():
        if name.endswith("_base_index"):
            number = int(name.removeprefix("_arg").removesuffix("_base_index"))
            of_a_part = any(other.startswith(f"_arg{number}_") for other in given if other != name)
            if of_a_part or written[base] != -1:
                return None
            operands[number], written[base] = bases[base], number
    return given["subgraph"], [operands[i] for i in range(len(operands))], written


def _inline(gm: GraphModule, call: Node) -> bool:
    taken = _taken(call)
    if taken is None:
        return False
    name, operands, written = taken
    region = getattr(gm, name.target)
    if any("unbacked_bindings" in node.meta for node in region.graph.nodes):
        return False
    inline(region)
    placeholders = region.graph.find_nodes(op="placeholder")
    env = dict(zip(placeholders, operands, strict=True))
    with gm.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "output":
                results = [*map_arg(node.args[0], env.__getitem__), *(env[placeholders[number]] for number in written)]
            elif written and node.target is torch.ops.aten.copy_.default and node.args[0] in placeholders:
                env[node] = env[node.args[0]] = env[node.args[1]]  # AOTAutograd puts these writes last
            elif node.op != "placeholder":
                target = node.target
                if node.op == "get_attr":
                    target = f"{name.target}_{target.replace('.', '_')}"
                    setattr(gm, target, operator.attrgetter(node.target)(region))
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = gm.graph.create_node(node.op, target, args, kwargs)
                env[node].meta = dict(node.meta)
    for item in list(call.users):
        assert item.target is operator.getitem, f"{item.format_node()} takes all that a region returns"
        item.replace_all_uses_with(results[item.args[1]])
        gm.graph.erase_node(item)
    attributes = [a for a in call.all_input_nodes if a.op == "get_attr"]
    gm.graph.erase_node(call)
    for attribute in attributes:
        if not attribute.users:
            gm.graph.erase_node(attribute)
    return True


def fix_numbers(gm: GraphModule, numbers: dict[Node, float]) -> None:
    """Replace number inputs of a graph of Dynamo's by constants, also where the graph passes them to regions. In place.

    numbers: input -> its value, for inputs that are tensors whose value the graph, or a region, takes by ``item``
    """
    _fix_numbers(gm, dict(numbers), {})


def _fix_numbers(gm: GraphModule, numbers: dict[Node, float], made: dict[tuple, tuple[GraphModule, str]]) -> None:
    """made: (region, a number or None for each of its inputs) -> (a copy of the region with these numbers, its name)"""
    for item in gm.graph.find_nodes(op="call_method", target="item"):
        if item.args[0] in numbers:
            numbers[item] = numbers[item.args[0]]
    for call in gm.graph.find_nodes(op="call_function", target=_CALL):
        module, _, *operands = call.args
        given = tuple(numbers.get(a) if isinstance(a, Node) else a if isinstance(a, float) else None for a in operands)
        if any(number is not None for number in given):
            region = getattr(gm, module.target)
            if (region, given) not in made:
                made[region, given] = _with_numbers(region, given, made), f"region_with_numbers_{len(made)}"
            fixed, name = made[region, given]
            setattr(gm, name, fixed)
            with gm.graph.inserting_before(call):
                attribute = gm.graph.get_attr(name)
            call.args = (attribute, name, *(a for a, number in zip(operands, given) if number is None))
    for node, number in reversed(numbers.items()):
        node.replace_all_uses_with(number)
        if node.op != "placeholder":
            gm.graph.erase_node(node)
    gm.recompile()


def _with_numbers(region: GraphModule, given: tuple, made: dict) -> GraphModule:
    graph = Graph()
    graph.output(graph.graph_copy(region.graph, {}))
    fixed = GraphModule(region, graph)
    numbers = {node: number for node, number in zip(graph.find_nodes(op="placeholder"), given, strict=True) if number is not None}
    _fix_numbers(fixed, dict(numbers), made)
    for node in numbers:
        graph.erase_node(node)
    fixed.recompile()
    return fixed
