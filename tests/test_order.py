"""The order of collectives: that of the program, in every graph that the passes make and in Inductor's code."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from graphs import capture, capture_with_inputs, copy, rewrite
from models import VOCAB, parallel
from sites import H, all_reduce, hf_norm, values
from torch._dynamo.utils import detect_fake_mode
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V

import tw_compile
from tw_compile import backend, ops, passes
from tw_compile.options import Options
from tw_compile.passes.find import collectives
from tw_compile.passes.graph_utils import c10d
from tw_compile.passes.unshard import unshard

pytestmark = pytest.mark.usefixtures("world")

GATHER = c10d.all_gather_into_tensor.default
KINDS = {c10d.all_reduce.default: "R", GATHER: "G", c10d.reduce_scatter_tensor.default: "RS", ops.fused: "S", ops.start: "S"}


def order_of(graph):
    """The collectives of a graph in order, S for sites; of a half with its number."""
    return " ".join(f"{KINDS[n.target]}{'' if n.meta.get('half') is None else n.meta['half']}" for n in collectives(graph))


def gather(x):
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, dist.group.WORLD.group_name))


def dead_reduce(x, r, w, m):
    """Its sum is read by nobody, neither before the last site nor behind it."""
    r = r + all_reduce(x)
    n = hf_norm(r, w)
    all_reduce(n @ m)
    r = r + all_reduce(n.sin() @ m)
    n = hf_norm(r, w)
    all_reduce(n)
    return n


def independent_gather(x, r, w, m):
    """A gather of what no site makes, in the middle; it is read at the very end."""
    r = r + all_reduce(x)
    other = gather(w * 2)
    r = r + all_reduce(hf_norm(r, w) @ m)
    r = r + all_reduce(hf_norm(r, w) @ m)
    return hf_norm(r, w), other


def dead_last_site(x, r, w, m):
    """An earlier hidden state is what the model returns: nobody reads the last sum, nor the norm before it but for that."""
    first = r + all_reduce(x)
    second = first + all_reduce(hf_norm(first, w) @ m)
    all_reduce(hf_norm(second, w) @ m)
    return first.sin()


def two_sums_of_one_norm(x, r, w, m):
    first, second = all_reduce(x), all_reduce(x @ m)
    r = first + second
    return hf_norm(r + all_reduce(hf_norm(r, w) @ m), w)


def later_weight(x, r, w, m):
    """The weight of the first norm comes of a later collective."""
    first = all_reduce(x)
    weight = gather(w[: H // 2])
    r = r + first
    return hf_norm(r + all_reduce(hf_norm(r, weight) @ m), w)


def early_sum(x, r, w, m):
    """The sum of a site is begun before another collective, and read behind it."""
    first = all_reduce(x)
    other = gather(w * 2)
    r = r.cos() + first
    return hf_norm(r + all_reduce(hf_norm(r, w) @ m), w), other


def inputs(*tokens):
    return values(*tokens, H), values(*tokens, H), values(H), values(H, H) / 4


CASES = {  # function -> (fused, woven)
    dead_reduce: ("S R S R", "S0 S1 R0 R1 S0 S1 R"),
    independent_gather: ("S G S S", "S0 S1 G S0 S1 S0 S1"),
    dead_last_site: ("S S R", "S0 S1 S0 S1 R"),
    two_sums_of_one_norm: ("S S", "S0 S1 S0 S1"),
    later_weight: ("R G S", "R G S0 S1"),
    early_sum: ("S G S", "S0 S1 G S0 S1"),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("tokens", [(8,), (1, 8), (4, 3)], ids=str)
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_of_what_is_fused_and_woven(function, tokens):
    for mode, expected in zip(("fuse", "weave"), CASES[function]):
        new = rewrite(function, *inputs(*tokens), mode=mode)
        assert order_of(new.after) == expected
        for node in collectives(new.after):
            assert node.target in (ops.fused, ops.start) or any(user.target is c10d.wait_tensor.default for user in node.users)
        new.check()


def test_of_what_is_unsharded():
    """Collectives between the parts of a sequence-parallel site stay, read or not; a residual is gathered before its site."""

    def block(x, r, w):
        shard = funcol.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD)
        all_reduce(w)
        return funcol.all_gather_tensor(hf_norm(r + shard, w), 0, dist.group.WORLD)

    graph, refusals = unshard(capture(block, values(8, H), values(4, H), values(H)))
    assert not refusals and order_of(graph) == "G R R"


def test_of_a_llama():
    new = rewrite(parallel("functional", dtype=torch.float32), torch.randint(0, VOCAB, (1, 16)), mode="weave")
    assert order_of(new.after) == "S0 S1 " * 4 + "S0 S1"


def test_collectives_that_are_kept_whole_and_what_was_done():
    graph, _ = capture_with_inputs(dead_reduce, *inputs(8))
    graph = copy(graph)
    with V.set_fake_mode(detect_fake_mode([n.meta["val"] for n in graph.nodes if n.op == "placeholder"])):
        sites = passes.fuse(graph, [m for m in passes.find(graph) if isinstance(m, passes.find.__globals__["Match"])], "auto", 0)
        cut = passes.choose_cut(sites, Options(mode="weave"))
        first, last = [n for n in collectives(graph) if n not in sites]
        _, _, unsplit, done, _ = passes.split(graph, sites, cut)
        assert (unsplit, done) == ({}, {first: "cut", last: "whole"})
        new, _, unsplit, done, _ = passes.split(graph, sites, cut, {first: "the other ranks do not cut it"})
    assert done == {first: "whole", last: "whole"} and order_of(new) == "S0 S1 R S0 S1 R"
    (unsplit,) = unsplit.values()
    assert (unsplit.op, unsplit.reason) == ("_c10d_functional.all_reduce.default", "the other ranks do not cut it")


# --- in the code of Inductor -----------------------------------------------------------------------------------------


def in_code(function, *given, **options):
    """The collectives in the code that Inductor makes, in order; those of a layer where it is called."""
    options = {f"tokenweave.{name}": value for name, value in options.items()}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(function, backend=backend.tokenweave, options={**options, "fx_graph_cache": False}, fullgraph=True)
        _, (code,) = run_and_get_code(compiled, *given)
    names = r"tokenweave\.(start|fused)\(|_c10d_functional\.(all_reduce_?|all_gather_into_tensor)\.default\("
    short = {"start": "S", "fused": "S", "all_reduce": "R", "all_reduce_": "R", "all_gather_into_tensor": "G"}
    return " ".join(short[a or b] for a, b in re.findall(names, code))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("function", [dead_reduce, independent_gather], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", [0, 1], ids=["fuse", "weave"])
def test_in_generated_code(unexpanded, function, mode):
    expected = re.sub(r"\d", "", CASES[function][mode])
    assert in_code(function, *inputs(8), mode=("fuse", "weave")[mode]) == expected


@pytest.mark.one_in(5)
@pytest.mark.parametrize("function", [dead_reduce, independent_gather], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", [0, 1], ids=["fuse", "weave"])
def test_in_generated_code_over_the_process_group(function, mode):
    expected = re.sub(r"\d", "", CASES[function][mode]).replace("S", "R")
    assert in_code(function, *inputs(8), mode=("fuse", "weave")[mode]) == expected


def between_layers(x, r, w, m):
    """Equal layers, one of whose calls comes between two gathers that hang on no layer."""
    first = gather(w * 2)
    r = r + all_reduce(x)
    for _ in range(3):
        r = r + all_reduce(hf_norm(r, w) @ m)
        r = r + all_reduce(hf_norm(r, w).relu() @ m)
    last = gather(w * 3)
    return hf_norm(r, w), first, last


def test_in_generated_code_with_layers_that_are_compiled_once(unexpanded):
    order = in_code(between_layers, *inputs(8), mode="weave")
    assert tw_compile.reports()[-1].alike
    assert order.count("G") == 2 and order.endswith("G"), order
