"""Whether a fused graph over the process group wins anything over the graph as it was.

The process group runs its all-reduce by itself, and Inductor makes one kernel of add and norm, in either graph: see ``expand``. What
could differ is the host's time, as calls of layers that are compiled once cost some. So such a graph is kept as it was, unless it has
fewer collectives when it is fused: several all-reduces that become one, or sequence-parallel sites.
"""

from collections.abc import Callable, Collection

import torch
from torch.fx import Graph

from .. import ops
from .fingerprint import numbered
from .graph_utils import arguments, c10d, calls, value

# Of a user's own all-reduce, nothing is known.
_PLAIN = (c10d.all_reduce.default, c10d.all_reduce_.default)


def wins_nothing(
    fused: Graph, original: Graph, sites: Collection[tuple[str, int]], over_process_group: Callable[[str, torch.Tensor], bool]
) -> bool:
    """Whether a graph that is fused and not woven is what Inductor makes of the original in any case. The same on all ranks.

    sites:              (group, number of its collective in the original) of each site; none of them does several all-reduces in one
    over_process_group: (group name, fake partial sums of a site) -> whether the process group's own all-reduce carries it
    """
    plain = {number for node, number in numbered(original).items() if calls(node, *_PLAIN)}
    given = [(arguments(node)["group"], value(node.args[0])) for node in fused.nodes if calls(node, ops.fused)]
    return plain.issuperset(sites) and all(over_process_group(*each) for each in given)
