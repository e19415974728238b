"""What passes know of a view: whether it keeps all entries, and their order."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tw_compile.passes.graph_utils import aten, is_view, keeps_entries, keeps_order

# view of x [2, 6, 6] -> (whether it keeps the order of the entries, whether it has all of them)
VIEWS = {
    aten.view.default: (lambda x: x.view(12, 6), True, True),
    aten._unsafe_view.default: (lambda x: aten._unsafe_view.default(x, [72]), True, True),
    aten.unsqueeze.default: (lambda x: x.unsqueeze(1), True, True),
    aten.squeeze.default: (lambda x: x.unsqueeze(1).squeeze(), True, True),
    aten.squeeze.dim: (lambda x: x.unsqueeze(1).squeeze(1), True, True),
    aten.squeeze.dims: (lambda x: aten.squeeze.dims(x.unsqueeze(1), [1]), True, True),
    aten.alias.default: (aten.alias.default, True, True),
    aten.permute.default: (lambda x: x.permute(0, 2, 1), False, True),
    aten.transpose.int: (lambda x: x.transpose(1, 2), False, True),
    aten.t.default: (lambda x: aten.t.default(x[0]), False, True),
    aten.expand.default: (lambda x: x.unsqueeze(0).expand(3, -1, -1, -1), False, True),
    aten.slice.Tensor: (lambda x: x[:, 1:], False, False),
    aten.select.int: (lambda x: x[0], False, False),
    aten.diagonal.default: (lambda x: x.diagonal(0, 1, 2), False, False),
    aten.view.dtype: (lambda x: x.view(torch.int32), False, True),
    aten._neg_view.default: (torch._neg_view, False, True),
}


@pytest.mark.parametrize("tracing", ["fake", "symbolic"])
@pytest.mark.parametrize("op", VIEWS, ids=str)
def test_views(op, tracing):
    view, order, entries = VIEWS[op]
    graph = make_fx(view, tracing_mode=tracing)(torch.randn(2, 6, 6)).graph
    node = [n for n in graph.nodes if n.target is op][-1]
    assert (is_view(node.target), keeps_order(node), keeps_entries(node)) == (True, order, entries)


def test_what_is_no_view():
    graph = make_fx(lambda x: x.clone(), tracing_mode="fake")(torch.randn(2, 3)).graph
    node = list(graph.nodes)[-2]
    assert not is_view(node.target) and not keeps_order(node) and not keeps_entries(node) and not keeps_order(node.args[0])
