"""Regions that are marked to be compiled once (``torch.compiler.nested_compile_region``): what they call is put in their place.

A site reaches from one layer into the next, and the passes see it only where both are in one graph. Layers that are alike are
compiled once for all that: see ``passes/outline.py``. What marking them saves is Dynamo's work.
"""

import operator

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

_CALL = torch.ops.higher_order.invoke_subgraph


def inline(gm: GraphModule) -> None:
    """In place, on a graph as Dynamo gives it to a backend."""
    calls = gm.graph.find_nodes(op="call_function", target=_CALL)
    for call in calls:
        _inline(gm, call)
    if calls:
        gm.graph.eliminate_dead_code()
        gm.recompile()


def _inline(gm: GraphModule, call: Node) -> None:
    module, _, *operands = call.args
    region = getattr(gm, module.target)
    inline(region)
    env = dict(zip(region.graph.find_nodes(op="placeholder"), operands, strict=True))
    with gm.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "output":
                results = map_arg(node.args[0], env.__getitem__)
            elif node.target == "item" and _is_number(number := env[node.args[0]]):
                env[node] = number  # torch 2.13 passes a float that an earlier call has made of a tensor to a region that still does
            elif node.op != "placeholder":
                target = node.target
                if node.op == "get_attr":
                    target = f"{module.target}_{target.replace('.', '_')}"
                    setattr(gm, target, operator.attrgetter(node.target)(region))
                args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
                env[node] = gm.graph.create_node(node.op, target, args, kwargs)
                env[node].meta = dict(node.meta)
    for item in list(call.users):
        assert item.target is operator.getitem, f"{item.format_node()} takes all that a region returns"
        item.replace_all_uses_with(results[item.args[1]])
        gm.graph.erase_node(item)
    gm.graph.erase_node(call)


def _is_number(a) -> bool:
    return isinstance(a.meta.get("example_value") if isinstance(a, Node) else a, (float, torch.SymFloat))
