"""Split graph -> woven graph: each site of a half becomes a start and a wait, with the work of the other half in between.

The order is as follows. S₀ and W₀ are the start and the wait of a site of half 0, and C₀ is the work that leads to its next site::

    C₀ S₀  C₁ S₁  |  W₀ C₀ S₀  W₁ C₁ S₁  |  …  |  W₀ W₁

The starts are called in the order S₀ S₁ S₀ S₁ …, each directly after the nodes that it still needs. The other collectives keep their
places between them, in program order. Each wait also takes the newest tensor of the other half, which in this order is that half's
start. So data flow fixes the order, and Inductor cannot change it. It also keeps Inductor from fusing kernels of the two halves.
"""

from torch.fx import Graph, Node

from .. import ops
from .find import communicates
from .graph_utils import arguments, calls, in_order, is_tensor, value


def weave(graph: Graph, ctas: int = 0) -> Graph:
    """Weave a graph. Returns a new graph.

    graph: what ``split`` returns, with two calls of ``fused`` for each site, marked by half
    ctas:  CTAs of a communication kernel beside the other half's work; 0 leaves the number to the kernel
    """
    return _Weaver(graph, ctas).run()


class _Weaver:
    def __init__(self, graph: Graph, ctas: int):
        self.old, self.new, self.ctas = graph, Graph(graph.owning_module), ctas
        self.env: dict[Node, Node] = {}
        self.newest: list[Node | None] = [None, None]  # of each half
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
        """Add a node and all that it still needs, inputs first."""
        stack = [node]
        while stack:
            top = stack[-1]
            done = top in self.env or (start_only and top is node and top in self.starts)
            missing = [] if done else [a for a in top.all_input_nodes if a not in self.env]
            if missing:
                # Reversed, so that the inputs are added in order.
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
