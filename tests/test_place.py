"""place: what may live in the workspace. Every graph runs over one that makes NaN of all that the contract leaves undefined,
in its own order and in others that its data flow allows."""

import pytest
import torch
from graphs import rewrite
from models import STYLES, VOCAB, parallel
from sites import INNER, H, all_reduce, hf_norm, torch_norm, values
from test_split import mlp, mlp_inputs
from workspace import Workspace

from tw_compile import ops
from tw_compile.passes.graph_utils import arguments

pytestmark = pytest.mark.usefixtures("world")

MODES = pytest.mark.parametrize("mode", ["fuse", "weave"])

def check(function, *inputs, mode="fuse", linear=None, in_workspace=None, sharded_residual=None, orders=20, **kwargs):
    """Assert that the results are right, and how many values live in the workspace where that is given."""
    placed = rewrite(function, *inputs, symmetric=True, mode=mode, **kwargs)
    for order in [None, *range(orders)]:
        workspace = Workspace()
        placed.check(workspace, shuffle=order)
        expected = {"linear": linear, "in_workspace": in_workspace, "sharded_residual": sharded_residual}
        assert all(workspace.counts[name] == n for name, n in expected.items() if n is not None), workspace.counts
    return placed


def halves(mode):
    return 2 if mode == "weave" else 1


@pytest.mark.one_in(5)
@MODES
@pytest.mark.parametrize("style", ["functional", "in_place"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_llama_copies_nothing_between_its_sites(style, batch, mode):
    """All GEMMs before sites write in the workspace, all norms but the last one are read there, all residuals stay."""
    layers, embedding = 2, STYLES[style].embedding
    sites, gemms, norms = 2 * layers + embedding, 2 * layers, 2 * layers + embedding
    if mode == "weave":
        norms -= 1  # the last one is joined before the head
        gemms -= not embedding  # what comes before the first site is not cut: its GEMM is sliced
    model, n = parallel(style, layers, dtype=torch.float32), halves(mode)
    counts = dict(linear=gemms * n, in_workspace=norms * n, sharded_residual=sites * n)
    check(model, torch.randint(0, VOCAB, (batch, 12)), mode=mode, **counts, orders=3)


@pytest.mark.full
def test_a_dynamic_llama_copies_nothing_either():
    check(
        parallel("functional", 1, dtype=torch.float32), torch.randint(0, VOCAB, (1, 12)),
        mode="weave", dynamic=True, linear=4, in_workspace=4, sharded_residual=6, orders=3,
    )  # fmt: skip


def test_without_symmetric_memory_nothing_is_placed():
    plain = rewrite(mlp, *mlp_inputs(8), mode="weave")
    assert plain.count(ops.linear) == 0
    assert not any(arguments(n)["sharded_residual"] or arguments(n)["in_workspace"] for n in plain.after.nodes if n.target is ops.wait)


def chain(between, *inputs, ends=lambda norm, residual: norm, mode="fuse", **kwargs):
    """Two sites. between: (norm, residual of the first, *inputs) -> what the second one reduces."""

    def block(x, residual, weight, *inputs):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, weight)
        second = residual + all_reduce(between(norm, residual, *inputs))
        return ends(hf_norm(second, weight), second)

    return check(block, values(8, H), values(8, H), values(H), *inputs, mode=mode, **kwargs)


# --- the norm --------------------------------------------------------------------------------------------------------


@MODES
def test_a_norm_that_only_gemms_read_stays_in_the_workspace(mode):
    up, down = values(H, INNER), values(INNER, H)
    chain(lambda norm, _, up, down: (norm @ up).relu() @ down, up, down, mode=mode, in_workspace=halves(mode), linear=halves(mode))


def test_a_norm_whose_largest_value_scales_a_gemm_is():
    """As for one scale of all tokens. A reduction over all dimensions names none of them."""
    scaled = lambda norm, _, up, down: (((norm / norm.abs().amax()) @ up).relu() @ down)  # noqa: E731
    chain(scaled, values(H, INNER), values(INNER, H), in_workspace=1, linear=1)


@MODES
def test_a_norm_whose_gemm_is_the_next_sites_is_not(mode):
    """The GEMM would read the memory that it writes."""
    chain(lambda norm, _, w: norm @ w, values(H, H), mode=mode, in_workspace=0, linear=halves(mode))


@MODES
def test_a_norm_that_something_else_reads_is_not(mode):
    up, down = values(H, INNER), values(INNER, H)
    chain(lambda norm, _, up, down: (norm @ up).relu() @ down + norm, up, down, mode=mode, in_workspace=0)


@MODES
def test_a_norm_that_leaves_the_graph_is_not(mode):
    def block(x, residual, weight, up, down):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, weight)
        second = residual + all_reduce((norm @ up).relu() @ down)
        return norm, hf_norm(second, weight)

    check(block, *mlp_inputs(8), mode=mode, in_workspace=0)


@MODES
def test_a_norm_whose_reshape_leaves_the_graph_is_not(mode):
    def block(x, residual, weight, up, down):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, weight).view(8, H)
        second = residual + all_reduce(((norm @ up).relu() @ down).view(1, 8, H))
        return norm, hf_norm(second, weight)

    check(block, *mlp_inputs(1, 8), mode=mode, in_workspace=0)


@MODES
def test_a_norm_that_is_read_after_the_next_site_is_not(mode):
    def block(x, residual, weight, up, down):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, weight)
        second = residual + all_reduce((norm @ up).relu() @ down)
        return hf_norm(second, weight) * (norm @ up).sum(-1, keepdim=True)

    check(block, *mlp_inputs(8), mode=mode, in_workspace=0)


# --- what is reduced -------------------------------------------------------------------------------------------------


@MODES
def test_a_gemm_that_something_else_reads_does_not_write_there(mode):
    def block(x, residual, weight, up):
        partial = x @ up
        total = residual + all_reduce(partial)
        return hf_norm(total, weight), partial.sin()

    check(block, values(8, INNER), values(8, H), values(H), values(INNER, H), mode=mode, linear=0)


@MODES
def test_a_gemm_that_is_the_residual_too_does_not(mode):
    def block(x, weight, up):
        partial = x @ up
        return hf_norm(partial + all_reduce(partial), weight)

    check(block, values(8, INNER), values(H), values(INNER, H), mode=mode, linear=0)


@MODES
def test_a_gemm_with_a_bias_writes_there(mode):
    chain(lambda norm, _, b, up: torch.addmm(b, norm.relu(), up), values(H), values(H, H), mode=mode, linear=halves(mode))


def test_a_gemm_that_may_run_before_the_last_site_is_done_does_not():
    def block(x, residual, weight, y, up):
        first = residual + all_reduce(x)
        second = first + all_reduce(y @ up)
        return hf_norm(first, weight), hf_norm(second, weight)

    check(block, values(8, H), values(8, H), values(H), values(8, INNER), values(INNER, H), linear=0)


# --- the residual ----------------------------------------------------------------------------------------------------


@MODES
def test_a_residual_for_the_next_site_alone_stays(mode):
    chain(lambda norm, _: norm.relu(), mode=mode, sharded_residual=2 * halves(mode))


@MODES
def test_a_residual_that_something_between_reads_is_made_whole(mode):
    chain(lambda norm, residual: norm.relu() + residual.sin(), mode=mode, sharded_residual=halves(mode))


@MODES
def test_a_residual_that_leaves_the_graph_is_made_whole(mode):
    chain(lambda norm, _: norm.relu(), ends=lambda norm, residual: (norm, residual), mode=mode, sharded_residual=halves(mode))


@MODES
def test_a_residual_that_is_read_after_the_next_site_is_made_whole(mode):
    def block(x, residual, weight):
        first = residual + all_reduce(x)
        second = first + all_reduce(hf_norm(first, weight).relu())
        return hf_norm(second, weight), first.cos()

    check(block, values(8, H), values(8, H), values(H), mode=mode, sharded_residual=halves(mode))


@MODES
def test_a_residual_that_is_reduced_itself_is_made_whole(mode):
    chain(lambda _, residual: residual, mode=mode, sharded_residual=halves(mode))


@MODES
def test_a_residual_that_skips_a_site_is_made_whole(mode):
    def block(x, r, w):
        first = r + all_reduce(x)
        second = all_reduce(hf_norm(first, w).relu())
        third = first + all_reduce(torch_norm(second, w).relu())
        return hf_norm(third, w)

    check(block, values(8, H), values(8, H), values(H), mode=mode, sharded_residual=2 * halves(mode))


def test_a_residual_in_another_shape_is_made_whole():
    def block(x, r, w):
        first = r + all_reduce(x)
        second = first.view(2, 4, H) + all_reduce(hf_norm(first, w).view(2, 4, H).relu())
        return hf_norm(second, w)

    check(block, values(8, H), values(8, H), values(H))


# --- sites that do not depend on each other --------------------------------------------------------------------------


@MODES
def test_sites_beside_each_other(mode):
    def block(x, y, r, w, up):
        one = hf_norm(r + all_reduce(x @ up), w)
        two = torch_norm(r + all_reduce(y @ up), w)
        return one @ up, two @ up

    check(block, values(8, H), values(8, H), values(8, H), values(H), values(H, H), mode=mode)


@MODES
def test_a_chain_beside_another(mode):
    def tower(x, r, w, up, down):
        for _ in range(2):
            r = r + all_reduce(x)
            x = (hf_norm(r, w) @ up).relu() @ down
        return x

    def block(x, r, y, s, w, up, down):
        return tower(x, r, w, up, down) + tower(y, s, w, up, down)

    check(block, *(values(8, H) for _ in range(4)), values(H), values(H, INNER), values(INNER, H), mode=mode)


@MODES
def test_a_site_of_another_shape_beside_the_chain(mode):
    def block(x, r, w, up, down, y):
        pooled = hf_norm(all_reduce(y @ up @ down), w) @ up
        r = r + all_reduce(x)
        r = r + all_reduce((hf_norm(r, w) @ up).relu() @ down)
        return hf_norm(r, w) @ up, pooled

    check(block, *mlp_inputs(8), values(3, H), mode=mode)


@MODES
def test_sites_of_other_shapes_one_after_the_other(mode):
    def block(x, r, w, up, down):
        r = r + all_reduce(x)
        last = hf_norm(r, w)[-1:] @ up @ down
        return hf_norm(r[-1:] + all_reduce(last), w) @ up

    check(block, *mlp_inputs(8), mode=mode)
