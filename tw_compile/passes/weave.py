"""Split graph -> woven graph: each site of a half becomes a start and a wait, with the other half's work in between.

The order, for sites i = 0, 1, …, where S and W are start and wait of one half, and C the work that leads to its next site::

    C₀ S₀  C₁ S₁  |  W₀ C₀ S₀  W₁ C₁ S₁  |  …  |  W₀ W₁

Nothing is scheduled by hand: the starts are called in the order S₀ S₁ S₀ S₁ …, each with just what it still needs. What else
communicates has its place among them as in the split graph, which is the order of the program. Each wait also takes the newest tensor of the other half, which in this order is that half's start: the order of the graph is its
data flow, and stays so whatever Inductor does. It also keeps Inductor from fusing the two halves' kernels.
"""


from torch.fx import Graph, Node

from .. import ops
from .find import communicates
from .graph_utils import arguments, calls, in_order, is_tensor, value


def weave(graph: Graph, ctas: int = 0) -> Graph:
    """
    graph: as ``split`` leaves it, with two calls of ``fused`` for each site, marked by half
    ctas:  of the kernels that run beside the other half's work, 0 for their own choice
    """
    return _Weaver(graph, ctas).run()


class _Weaver:
    def __init__(self, graph: Graph, ctas: int):
        self.old, self.new, self.ctas = graph, Graph(graph.owning_module), ctas
        self.env: dict[Node, Node] = {}
        self.newest = [None, None]  # the tensor that each half made last
        self.starts: dict[Node, Node] = {}

    def run(self) -> Graph:
        for node in self.old.nodes:
            if node.op == "placeholder":
                self._put(node, self.new.node_copy(node))
        for node in self.old.nodes:
            if communicates(node):
                self._demand(node, start_only=_is_cut_site(node))
        for node in self.old.nodes:
            self._demand(node)
        self.new.lint()
        return self.new

    def _demand(self, node: Node, start_only: bool = False) -> None:
        """Put a node and everything it still needs, inputs first."""
        stack = [node]
        while stack:
            top = stack[-1]
            done = top in self.env or (start_only and top is node and top in self.starts)
            missing = [] if done else [a for a in top.all_input_nodes if a not in self.env]
            if missing:
                # Reversed, so that inputs come in their order.
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if not done:
                self._emit(top, start_only and top is node)

    def _emit(self, node: Node, start_only: bool) -> None:
        if not _is_cut_site(node):
            self._put(node, self.new.node_copy(node, self.env.__getitem__))
            return
        if node not in self.starts:
            self.starts[node] = self._start(node)
        if not start_only:
            self._put(node, self._wait(node))

    def _start(self, node: Node) -> Node:
        given = {name: self.env[a] if isinstance(a, Node) else a for name, a in arguments(node).items()} | {"ctas": self.ctas}
        start = self.new.call_function(ops.start, in_order(ops.start, given))
        start.meta = {**node.meta, "val": value(node)[0].new_empty(0)}
        self._newest(start)
        return start

    def _wait(self, node: Node) -> Node:
        start, half = self.starts[node], node.meta["half"]
        named = arguments(node) | arguments(start) | {"token": start, "after": self.newest[1 - half]}
        wait = self.new.call_function(ops.wait, in_order(ops.wait, named))
        wait.meta = dict(node.meta)
        return wait

    def _put(self, old: Node, new: Node) -> None:
        self.env[old] = new
        self._newest(new)

    def _newest(self, node: Node) -> None:
        half = node.meta.get("half")
        if half is not None and is_tensor(node):
            self.newest[half] = node


def _is_cut_site(node: Node) -> bool:
    return calls(node, ops.fused) and node.meta.get("half") is not None
