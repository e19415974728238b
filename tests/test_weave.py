"""weave: starts and waits alternate between the halves, and their order is data flow."""

import expecttest
import pytest
import torch
from graphs import Plain, rewrite, run, shuffled, text
from models import VOCAB, parallel
from sites import H, all_reduce, hf_norm, values
from test_split import mlp, mlp_inputs

from tw_compile import ops
from tw_compile.passes.graph_utils import arguments
from tw_compile.site import Site

pytestmark = pytest.mark.usefixtures("world")


class Snapshot(expecttest.TestCase):
    def test_two_sites(self):
        woven = rewrite(mlp, *mlp_inputs(8, dtype=torch.bfloat16), mode="weave")
        self.assertExpectedInline(text(woven.after, "x residual weight up down"), """\
0 %0 = aten.slice.Tensor(x, 0, 0, 4) : bf16[4, 16]
0 %1 = aten.slice.Tensor(residual, 0, 0, 4) : bf16[4, 16]
0 %2 = tokenweave.start(%0, %1, weight, slot=0, fp32_residual=True) : bf16[0]
1 %3 = aten.slice.Tensor(x, 0, 4, 8) : bf16[4, 16]
1 %4 = aten.slice.Tensor(residual, 0, 4, 8) : bf16[4, 16]
1 %5 = tokenweave.start(%3, %4, weight, slot=1, fp32_residual=True) : bf16[0]
0 %6 = tokenweave.wait(%2, %0, %1, weight, after=%5, slot=0, fp32_residual=True) : (bf16[4, 16], f32[4, 16])
0 %7 = getitem(%6, 0) : bf16[4, 16]
0 %8 = aten.mm(%7, up) : bf16[4, 24]
0 %9 = aten.relu(%8) : bf16[4, 24]
0 %10 = aten.mm(%9, down) : bf16[4, 16]
0 %11 = getitem(%6, 1) : f32[4, 16]
0 %12 = tokenweave.start(%10, %11, weight, slot=0, fp32_residual=True) : bf16[0]
1 %13 = tokenweave.wait(%5, %3, %4, weight, after=%12, slot=1, fp32_residual=True) : (bf16[4, 16], f32[4, 16])
1 %14 = getitem(%13, 0) : bf16[4, 16]
1 %15 = aten.mm(%14, up) : bf16[4, 24]
1 %16 = aten.relu(%15) : bf16[4, 24]
1 %17 = aten.mm(%16, down) : bf16[4, 16]
1 %18 = getitem(%13, 1) : f32[4, 16]
1 %19 = tokenweave.start(%17, %18, weight, slot=1, fp32_residual=True) : bf16[0]
0 %20 = tokenweave.wait(%12, %10, %11, weight, after=%19, slot=0, fp32_residual=True) : (bf16[4, 16], f32[4, 16])
0 %21 = getitem(%20, 0) : bf16[4, 16]
1 %22 = tokenweave.wait(%19, %17, %18, weight, after=%21, slot=1, fp32_residual=True) : (bf16[4, 16], f32[4, 16])
1 %23 = getitem(%22, 0) : bf16[4, 16]
  %24 = aten.cat([%21, %23], 0) : bf16[8, 16]
  return %24
""")


class Logging(Plain):
    """Notes each start and wait with its slot."""

    def __init__(self):
        super().__init__()
        self.log = []

    def start(self, site, *where):
        self.log.append(f"S{Site._make(site).slot}")
        return super().start(site, *where)

    def wait(self, x, slot, *others):
        self.log.append(f"W{slot}")
        return super().wait(x, slot, *others)


def designed(sites):
    """S0 S1 | W0 S0 W1 S1 | ... | W0 W1"""
    return "S0 S1 " + "W0 S0 W1 S1 " * (sites - 1) + "W0 W1"


def order_of(graph, inputs):
    transport = Logging()
    run(graph, inputs, transport)
    return " ".join(transport.log)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_order_in_a_llama(batch):
    woven = rewrite(parallel("functional", dtype=torch.float32), torch.randint(0, VOCAB, (batch, 16)), mode="weave")
    assert order_of(woven.after, woven.inputs) == designed(5)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_data_flow(seed):
    """Whatever order a compiler chooses that respects the data flow, starts and waits stay where they are."""
    woven = rewrite(parallel("functional", dtype=torch.float32), torch.randint(0, VOCAB, (1, 16)), mode="weave")
    order = order_of(shuffled(woven.after, seed), woven.inputs)
    assert order.replace("S1 S0", "S0 S1", 1) == designed(5), "only the first two starts may change places"


def test_one_site():
    def block(x, r, w):
        return hf_norm(r + all_reduce(x), w)

    woven = rewrite(block, values(8, H), values(8, H), values(H), mode="weave")
    assert order_of(woven.after, woven.inputs) == designed(1)


def test_the_other_halfs_work_lies_between_a_start_and_its_wait():
    woven = rewrite(mlp, *mlp_inputs(8), mode="weave")
    kinds = {ops.start: "S", ops.wait: "W", torch.ops.aten.mm.default: "C"}
    order = [f"{kinds[n.target]}{n.meta['half']}" for n in woven.after.nodes if n.target in kinds]
    assert " ".join(order) == "S0 S1 W0 C0 C0 S0 W1 C1 C1 S1 W0 W1"


def test_a_wait_holds_everything_its_start_reads():
    woven = rewrite(mlp, *mlp_inputs(8), mode="weave")
    for wait in (n for n in woven.after.nodes if n.target is ops.wait):
        token, *inputs = wait.args[:6]
        assert token.target is ops.start and list(token.args[:5]) == inputs


def test_a_wait_also_waits_for_the_newest_tensor_of_the_other_half():
    woven = rewrite(mlp, *mlp_inputs(8), mode="weave")
    newest = [None, None]
    for node in woven.after.nodes:
        half = node.meta.get("half")
        if node.target is ops.wait:
            assert arguments(node)["after"] is newest[1 - half]
        elif half is not None:
            newest[half] = node


def test_each_half_has_its_slot():
    woven = rewrite(mlp, *mlp_inputs(8), mode="weave")
    assert all(arguments(n)["slot"] == n.meta["half"] for n in woven.after.nodes if n.target in (ops.start, ops.wait))


def test_an_unsplit_op_waits_for_both_halves_and_both_for_it():
    def block(x, r, w):
        r = r + all_reduce(x)
        r = r + all_reduce(hf_norm(r, w).cumsum(0))
        return hf_norm(r, w)

    woven = rewrite(block, values(8, H), values(8, H), values(H), mode="weave")
    assert order_of(woven.after, woven.inputs) == "S0 S1 W0 W1 S0 S1 W0 W1"
    woven.check()
