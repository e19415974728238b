"""Two real ranks over gloo: a tiny Llama in every form, its run-time order, and its error beside plain Inductor's."""

import contextlib
import functools
import itertools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from graphs import without_codegen
from models import NORMS, STYLES, VOCAB, parallel, whole
from test_weave import designed

import tw_compile
from tw_compile import backend
from tw_compile.site import Site
from tw_compile.transports import choose
from tw_compile.transports.process_group import ProcessGroup

LAYERS, TOKENS = 2, 64


@contextlib.contextmanager
def logged():
    """What the process group is asked for while this context is open, at run time: S and W with the slot.

    Our ops stay in the graph, as over symmetric memory.
    """
    log, start, wait = [], ProcessGroup.start, ProcessGroup.wait

    def logging_start(self, site):
        log.append(f"S{Site._make(site).slot}")
        return start(self, site)

    def logging_wait(self, slot, in_workspace):
        log.append(f"W{slot}")
        return wait(self, slot, in_workspace)

    ProcessGroup.start, ProcessGroup.wait = logging_start, logging_wait
    try:
        with mock.patch.object(choose, "is_over_process_group", return_value=False):
            yield log
    finally:
        ProcessGroup.start, ProcessGroup.wait = start, wait


@functools.cache
def inputs_and_reference(norm, batch):
    """ids, and what the model on one rank makes of them in float64, from the same bf16 weights."""
    ids = torch.randint(0, VOCAB, (batch, TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return ids, whole(LAYERS, norm).double()(ids)


def forward(style, norm, dynamic, batch, codegen, mode, expanded=False):
    """On a rank: (relative error, output, report, executed order). expanded: with PyTorch's own all-reduces, as over the process group"""
    torch._dynamo.reset()
    ids, reference = inputs_and_reference(norm, batch)
    model = parallel(style, LAYERS, norm)
    context = contextlib.nullcontext() if codegen else without_codegen()
    with torch.no_grad(), context, contextlib.nullcontext([]) if expanded else logged() as log:
        compiled = torch.compile(model, backend=backend.tokenweave, dynamic=dynamic, options={"tokenweave.mode": mode})
        out = compiled(ids)
    error = (out.double() - reference).norm() / reference.norm()
    return error.item(), out, tw_compile.reports()[-1], " ".join(log)


@pytest.fixture(scope="module")
def run(ranks):
    """``forward`` on every rank, once for each set of arguments."""
    return functools.cache(functools.partial(ranks, forward))


def error_of(run, *arguments):
    return run(*arguments)[0][0]


def check(run, style, norm, dynamic, batch, codegen):
    """Everything is woven, the order is the designed one, and the error is that of the model without us."""
    results = run(style, norm, dynamic, batch, codegen, "weave")
    for error, _, report, order in results:
        assert report.mode == "weave" and report.transport == "process_group"
        assert {site.norm for site in report.sites} == {"LayerNorm" if norm == "layer" else "RMSNorm"}
        assert [site.residual for site in report.sites] == [False] * STYLES[style].embedding + [True] * 2 * LAYERS
        assert all(site.woven for site in report.sites)
        assert not report.refusals and not report.joins
        assert order == designed(len(report.sites))
        assert error <= 1.1 * error_of(run, style, norm, False, batch, codegen, "off")
    assert torch.equal(results[0][1], results[1][1]), "the ranks have the same bits"


# Style, norm, dynamic shapes, batch. Here each pair of choices; with TW_FULL=1 all combinations, also through Inductor, which
# takes half a minute for each.
COMBINATIONS = [
    ("functional", "hf", False, 1), ("functional", "torch", True, 4), ("functional", "layer", False, 4),
    ("in_place", "hf", True, 1), ("in_place", "torch", False, 4), ("in_place", "layer", True, 1),
    ("dtensor", "hf", False, 4), ("dtensor", "torch", True, 1),
]  # fmt: skip
THROUGH_INDUCTOR = [("in_place", "torch", False, 1)]
if os.environ.get("TW_FULL"):
    plain = [name for name, style in STYLES.items() if not style.sequence]
    COMBINATIONS = THROUGH_INDUCTOR = list(itertools.product(plain, NORMS, (False, True), (1, 4)))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("style, norm, dynamic, batch", COMBINATIONS)
def test_llama(run, style, norm, dynamic, batch):
    """The rewritten graph, run as it is."""
    check(run, style, norm, dynamic, batch, codegen=False)


@pytest.mark.slow
@pytest.mark.parametrize("style, norm, dynamic, batch", THROUGH_INDUCTOR)
def test_llama_through_inductor(run, style, norm, dynamic, batch):
    """With code generation: Inductor's own passes and scheduler leave the order as it is, and the error is Inductor's."""
    check(run, style, norm, dynamic, batch, codegen=True)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode, codegen", [("fuse", False), ("weave", False), ("weave", True)])
def test_llama_over_the_process_group(run, mode, codegen):
    """With PyTorch's own all-reduces in the graph."""
    arguments = ("in_place", "torch", False, 1, codegen)
    (error, out, report, _), (_, other, _, _) = run(*arguments, mode, True)
    assert (report.mode, report.transport) == (mode, "process_group") and not report.refusals
    assert error <= 1.1 * error_of(run, *arguments, "off")
    assert torch.equal(out, other), "the ranks have the same bits"


def test_fused_only(run):
    (error, out, report, order), (_, other, _, _) = run("functional", "hf", False, 1, False, "fuse")
    assert (report.mode, order) == ("fuse", "")
    assert error <= 1.1 * error_of(run, "functional", "hf", False, 1, False, "off")
    assert torch.equal(out, other)


def sizes_with_a_threshold():
    """Forward passes of many sizes through one compiled model: (modes of its graphs, largest error, orders)."""
    torch._dynamo.reset()
    before = len(tw_compile.reports())
    model, reference = parallel("functional", 1), whole(1).double()
    compiled = torch.compile(model, backend=backend.tokenweave, dynamic=True, options={"tokenweave.min_tokens": 32})
    errors, orders = [], {}
    with torch.no_grad(), without_codegen():
        for tokens in (48, 100, 31, 7, 33, 32, 16, 64, 2):
            ids = torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(tokens))
            with logged() as log:
                out = compiled(ids).double()
            expected = reference(ids)
            errors.append(((out - expected).norm() / expected.norm()).item())
            orders[tokens] = " ".join(log)
    return [report.mode for report in tw_compile.reports()[before:]], max(errors), orders


@pytest.mark.slow
def test_a_graph_is_woven_from_the_threshold_on_and_fused_below(ranks):
    for modes, error, orders in ranks(sizes_with_a_threshold):
        assert modes == ["weave", "fuse"]
        assert orders == {tokens: designed(3) if tokens >= 32 else "" for tokens in orders}
        assert error < 0.02


# --- requests that cannot be met: one message on every rank, and no hang ----------------------------------------------


def message_of(style, tokens, options):
    """On a rank: what a compilation raises, without what Dynamo adds."""
    torch._dynamo.reset()
    model = parallel(style, 1) if style else whole(1)
    try:
        with torch.no_grad(), without_codegen():
            torch.compile(model, backend=backend.tokenweave, options=options)(torch.zeros(1, tokens, dtype=torch.long))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        assert isinstance(error.inner_exception, tw_compile.TokenWeaveError), repr(error.inner_exception)
        return str(error.inner_exception)
    return "no error"


@pytest.mark.parametrize("transport", ["peer", "multimem"])
def test_a_transport_that_the_ranks_do_not_have(ranks, transport):
    first, second = ranks(message_of, "functional", 8, {"tokenweave.transport": transport})
    assert first == second
    assert first.startswith(f"option 'tokenweave.transport' is {transport!r}, which is not possible here: {transport}: ")


@pytest.mark.parametrize("mode", ["weave", "fuse"])
def test_a_graph_without_collectives_is_inductors_whatever_the_mode(ranks, mode):
    """Dynamo makes such graphs of the parts of a model around a graph break: there is nothing that could be asked of them."""
    assert ranks(message_of, None, 8, {"tokenweave.mode": mode}) == ["no error"] * 2


def test_one_token_that_must_be_woven(ranks):
    first, second = ranks(message_of, "functional", 1, {"tokenweave.mode": "weave"})
    assert first == second
    assert first == "option 'tokenweave.mode' is 'weave', but this graph cannot be woven: one token cannot be split"


def test_an_unknown_option(ranks):
    first, second = ranks(message_of, "functional", 8, {"tokenweave.min_token": 8})
    assert first == second and "did you mean 'tokenweave.min_tokens'?" in first


def ranks_agree():
    return dist.get_rank(), dist.get_world_size()


def test_the_ranks_go_on_after_an_error(ranks):
    assert ranks(ranks_agree) == [(0, 2), (1, 2)]
