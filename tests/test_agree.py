"""How ranks find out whether they agree, on real ranks."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from graphs import run_as_it_is, without_codegen
from sites import H, all_reduce

import tw_compile
from tw_compile import TokenWeaveError, backend, context
from tw_compile.transports import agree, choose


def say(*messages):
    return [agree.exchange(dist.group.WORLD.group_name, "this", f"{message} of {dist.get_rank()}") for message in messages]


def test_each_hears_all(ranks):
    assert ranks(say, "first", "second") == [[["first of 0", "first of 1"], ["second of 0", "second of 1"]]] * 2


def wait_for_rank_1():
    if dist.get_rank() == 1:
        return None
    try:
        agree.exchange(dist.group.WORLD.group_name, "the making of something", "here", timeout_s=0.5)
    except RuntimeError as error:
        return str(error)


def test_a_rank_that_does_not_come_is_named(ranks):
    message, _ = ranks(wait_for_rank_1)
    assert message.startswith("rank 1 of group ")
    assert " did not come to the making of something within 0.5 s, where rank 0 waited for it: see its log" in message


def of_another_version():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agree, "version", lambda: f"version {dist.get_rank()}")
        try:
            choose._agree(dist.group.WORLD.group_name, ["peer"], {})
        except TokenWeaveError as error:
            return str(error)


def test_ranks_of_different_versions_are_refused_on_all(ranks):
    for message in ranks(of_another_version):
        assert message.endswith("run different versions: ['version 0', 'version 1']")


def test_the_version_is_that_of_the_code():
    assert agree.version().startswith("torch 2.") and ", tw_compile " in agree.version()


# --- what ranks do with graphs that differ ----------------------------------------------------------------------------


class Model(torch.nn.Module):
    """Three sites, and what rank 0 alone does: ``what``."""

    def __init__(self, what):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape, generator=generator) * 0.3)  # noqa: E731
        self.what, self.bias, self.weights, self.matrices = what, draw(H), [draw(H) for _ in range(3)], [draw(H, H) for _ in range(3)]

    def forward(self, x):
        alone, seen = dist.get_rank() == 0 and self.what, []
        residual = x
        for i, (weight, matrix) in enumerate(zip(self.weights, self.matrices)):
            partial = x @ matrix
            if alone == "bias":
                partial = partial + self.bias
            total = all_reduce(partial)
            if alone == "sums" or (alone == "first sum" and i == 0) or (alone == "last sum" and i == 2):
                seen.append(total)
            if alone == "another norm" and i == 1:
                weight = weight + 0 * weight.sum()
            residual = residual + total
            if alone == "residuals":
                seen.append(residual)
            if alone == "graph break" and i == 0:
                torch._dynamo.graph_break()
            last = i == 2
            if not (last and self.what == "no last norm" and dist.get_rank() == 1):
                eps = 1e-2 if alone == "eps" and i == 1 else 1e-5
                x = norm_of(residual, weight, eps)
        if self.what == "no last norm" and dist.get_rank() == 1:
            return [x.sum()]
        return [x, *seen]


def norm_of(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def outcome(what, mode, tokens=(48,), steps=None):
    """On a rank: what its reports say, after its results were compared with eager's."""
    torch._dynamo.reset()
    context._contexts.clear()  # as in a new process
    before = len(tw_compile.reports())
    model = Model(what).requires_grad_(False)
    options = {"tokenweave.min_tokens": 8} if mode == "auto" else {"tokenweave.mode": mode}
    run = torch.compile(model, backend=backend.tokenweave, options=options)
    with torch.no_grad(), without_codegen():
        for i, count in enumerate(tokens):
            if steps is not None and dist.get_rank() == 0:
                model.what = steps[i]
            x = torch.randn(1, count, H, generator=torch.Generator().manual_seed(count))
            for got, expected in zip(run(x), model(x), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    reports = tw_compile.reports()[before:]
    return [(r.mode, len(r.sites), [refusal.reason.partition(": ")[2] for refusal in r.refusals], r.reasons) for r in reports]


ALIKE = {  # what rank 0 does -> sites of three, why the others are none
    "bias": (3, []),
    "residuals": (3, []),
    "sums": (0, None),
    "eps": (2, ["its residual or norm on rank 1 differs from that on rank 0"]),
    "another norm": (3, []),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", ["auto", "fuse"])
@pytest.mark.parametrize("what", ALIKE)
def test_ranks_whose_graphs_differ_do_what_all_can(ranks, what, mode):
    if what == "sums" and mode == "fuse":
        return
    (first,), (second,) = ranks(outcome, what, mode)
    count, reasons = ALIKE[what]
    assert first[:2] == second[:2] == ("off" if not count else {"auto": "weave"}.get(mode, mode), count)
    assert reasons is None or len(first[2]) == len(reasons)


def in_other_shapes():
    """Each rank has the same 48 tokens in another shape, and would cut them elsewhere."""
    torch._dynamo.reset()
    context._contexts.clear()
    before, model = len(tw_compile.reports()), Model("").requires_grad_(False)
    run = torch.compile(model, backend=backend.tokenweave, options={"tokenweave.min_tokens": 8})
    x = torch.randn(48, H, generator=torch.Generator().manual_seed(1)).reshape([(3, 16, H), (1, 48, H)][dist.get_rank()])
    with torch.no_grad(), without_codegen():
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    return [(report.mode, report.reasons[0]) for report in tw_compile.reports()[before:]]


def test_ranks_with_their_tokens_in_other_shapes_do_not_weave(ranks):
    for ((mode, reason),) in ranks(in_other_shapes):
        assert mode == "off" and reason.endswith("with different first halves (rank 0: 16; rank 1: 24 tokens)")


def test_a_sum_that_one_rank_does_not_read_is_still_reduced(ranks):
    (first,), (second,) = ranks(outcome, "no last norm", "auto")
    assert first[:2] == second[:2] == ("weave", 2)
    assert ranks(ranks_are_in_step) == [3, 3]


def ranks_are_in_step():
    total = torch.tensor(1 + dist.get_rank())
    dist.all_reduce(total)
    return total.item()


def test_a_graph_break_on_one_rank_leaves_the_group_to_inductor(ranks):
    for modes in ranks(outcome, "graph break", "auto"):
        assert next(mode for mode, *_ in modes) == "off"
        assert "have different graphs (rank 0: 1 × all_reduce; rank 1: 3 × all_reduce)" in modes[0][3][0]


def raised(what, mode):
    try:
        outcome(what, mode)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return type(error.inner_exception).__name__, str(error.inner_exception)


def alone_in_a_group_that_was_left():
    """A graph that all ranks know, then one with a graph break on rank 0, then rank 0 alone compiles the first one again."""
    torch._dynamo.reset()
    context._contexts.clear()
    x = torch.randn(1, 48, H, generator=torch.Generator().manual_seed(0))

    def broken(x):
        x = all_reduce(x)
        if dist.get_rank() == 0:
            torch._dynamo.graph_break()
        return [all_reduce(x)]

    model, options = Model(""), {"tokenweave.min_tokens": 8}
    known, other = (torch.compile(function, backend=backend.tokenweave, options=options) for function in (model, broken))
    with torch.no_grad(), without_codegen():
        for run, function in ((known, model), (other, broken), (known, model)):
            torch.testing.assert_close(run(x), function(x), rtol=1e-4, atol=1e-4)
            if run is other and dist.get_rank() == 0:
                torch._dynamo.reset()
    return context.of(dist.group.WORLD.group_name).left


def test_a_known_decision_holds_in_a_group_that_was_left(ranks):
    for why in ranks(alone_in_a_group_that_was_left):
        assert "have different graphs" in why


def no_code_on_rank_0():
    torch._dynamo.reset()
    context._contexts.clear()
    before, failures = len(tw_compile.reports()), [dist.get_rank() == 0]

    def failing(gm, inputs, **kwargs):
        if failures and failures.pop():
            raise ValueError("no code for this")
        return run_as_it_is(gm, inputs, **kwargs)

    model, x = Model(""), torch.randn(1, 48, H, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), without_codegen(failing):
        run = torch.compile(model, backend=backend.tokenweave, options={"tokenweave.min_tokens": 8})
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    return [(report.mode, report.reasons) for report in tw_compile.reports()[before:]]


def test_a_compilation_that_fails_on_one_rank_leaves_the_graph_to_inductor_on_all(ranks):
    reason = "it could not be compiled: ValueError: no code for this"
    assert ranks(no_code_on_rank_0) == [[("off", [reason])], [("off", [f"rank 0: {reason}"])]]


def test_a_graph_break_on_one_rank_is_an_error_on_all_where_a_mode_is_forced(ranks):
    first, second = ranks(raised, "graph break", "weave")
    assert first == second and first[0] == "TokenWeaveError" and "have different graphs" in first[1]


def test_options_that_differ_are_an_error_on_all_ranks(ranks):
    first, second = ranks(raised_of_modes, ("fuse", "weave"))
    assert first == second and first[0] == "TokenWeaveError"
    assert "have different options: rank 0: mode=fuse; rank 1: mode=weave" in first[1]


def raised_of_modes(modes):
    return raised("", modes[dist.get_rank()])


@pytest.mark.parametrize("what, mode", [("residuals", "auto"), ("residuals", "fuse"), ("last sum", "auto"), ("first sum", "auto")])
def test_a_rank_that_compiles_again_alone_takes_what_is_known(ranks, what, mode):
    """Rank 0 alone reads something from the second call on. A sum that it reads is no site there, and still comes in halves."""
    first, second = ranks(outcome, "", mode, (48, 48, 48), ("", what, what))
    assert len(first) == 2 and len(second) == 1
    assert {r[0] for r in first} == {"fuse" if mode == "fuse" else "weave"}


def test_a_rank_with_dynamic_shapes_meets_one_with_static_ones(ranks):
    for reports in ranks(of_dynamic_and_static):
        assert [mode for mode, *_ in reports][:1] == ["weave"]


def of_dynamic_and_static():
    if dist.get_rank() == 0:
        return outcome("", "auto", (48, 64, 40, 4, 2))
    with torch._dynamo.config.patch(assume_static_by_default=True, automatic_dynamic_shapes=False):
        return outcome("", "auto", (48, 64, 40, 4, 2))


def alone():
    """Rank 0 compiles a graph that rank 1 does not; rank 1 calls what it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agree, "GONE_ON_S", 0.5)
        group = dist.group.WORLD.group_name
        progress = agree.progress(group)
        progress.begin_call()
        if dist.get_rank() == 1:
            progress.begin_call()
            return None
        try:
            agree.exchange(group, "the agreement on a graph", "", progress=progress)
        except RuntimeError as error:
            return str(error)


def test_a_rank_that_has_a_new_graph_alone_does_not_wait_for_good(ranks):
    message, _ = ranks(alone)
    assert "has called the model again and did not come to the agreement on a graph, so that only some ranks have a new graph" in message


def threads_in_another_order():
    """Two threads compile for a group each. Dynamo compiles in one thread at a time, on rank 1 first what rank 0 compiles last."""
    torch._dynamo.reset()
    context._contexts.clear()
    x, matrix, weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((32, H), (H, H), (H,)))

    def work(group, calls):
        def function(x):
            x = x + all_reduce(x @ matrix, "sum", group)
            return norm_of(x + all_reduce(norm_of(x, weight, 1e-5) @ matrix, "sum", group), weight, 1e-5)

        with torch.no_grad():
            run = torch.compile(function, backend=backend.tokenweave, options={"tokenweave.min_tokens": 8})
            calls.append((run(x), run(x[:20]), function(x), function(x[:20])))

    done, groups = [], [dist.group.WORLD, dist.new_group([0, 1])]
    threads = [threading.Thread(target=work, args=(group.group_name, done), daemon=True) for group in groups]
    with without_codegen():
        for thread in threads[:: 1 - 2 * dist.get_rank()]:
            thread.start()
            time.sleep(0.5)  # the other one then waits for Dynamo's lock
        for thread in threads:
            thread.join(60)
    dist.destroy_process_group(groups[1])
    assert len(done) == 2
    for first, second, *expected in done:
        torch.testing.assert_close([first, second], expected, rtol=1e-4, atol=1e-4)
    return sorted(report.mode for report in tw_compile.reports()[-2:])


def test_threads_may_compile_in_another_order(ranks):
    assert ranks(threads_in_another_order) == [["weave", "weave"]] * 2


def given_up():
    """Rank 0 gives up an exchange to which rank 1 does not come; both go on with another one."""
    group = dist.group.WORLD.group_name
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match="did not come"):
            agree.exchange(group, "the agreement on a graph", "of a graph that is given up", timeout_s=0.2)
    dist.barrier()
    return agree.exchange(group, "the agreement on a graph", "of the next graph")


def test_an_exchange_that_was_given_up_is_not_the_next_one(ranks):
    assert ranks(given_up) == [["of the next graph"] * 2] * 2


def off_on_rank_1():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agree, "GONE_ON_S", 0.5)
        group = dist.group.WORLD.group_name
        agree.pass_by(group)  # a graph that is off on both
        said = agree.exchange(group, "the agreement on a graph", str(dist.get_rank()))
        if dist.get_rank() == 1:
            agree.pass_by(group)
            return said
        try:
            return agree.exchange(group, "the agreement on a graph", "")
        except RuntimeError as error:
            return str(error)


def test_a_rank_whose_mode_is_off_is_named(ranks):
    message, said = ranks(off_on_rank_1)
    assert said == ["0", "1"]
    assert "has left a graph to Inductor alone" in message and "did not come to the agreement on a graph" in message


def gradients_on_rank_1(options):
    """Two calls, the first with gradients on rank 1 alone. Returns (reasons of the reports, errors)."""
    torch._dynamo.reset()
    context._contexts.clear()
    group, before, errors = dist.new_group(range(2)), len(tw_compile.reports()), []
    weight = torch.ones(H, requires_grad=True)
    x, residual = torch.randn(2, 8, H, generator=torch.Generator().manual_seed(0))

    def f(x, residual, weight):
        return torch.nn.functional.rms_norm(residual + all_reduce(x, group=group), (H,), weight)

    with pytest.MonkeyPatch.context() as patch, without_codegen():
        patch.setattr(agree, "GONE_ON_S", 0.5)
        compiled = torch.compile(f, backend=backend.tokenweave, options=options)
        for gradients in (dist.get_rank() == 1, False):
            with torch.set_grad_enabled(gradients):
                expected = f(x, residual, weight)
                try:
                    torch.testing.assert_close(compiled(x, residual, weight), expected)
                except Exception as error:
                    errors.append(str(error))
                    f(x, residual, weight)  # the all-reduce that the other rank is in
    return [report.reasons[-1] for report in tw_compile.reports()[before:]], errors


def test_ranks_leave_a_group_to_inductor_where_one_rank_alone_runs_with_gradients(ranks):
    (first, errors), (second, more) = ranks(gradients_on_rank_1, {})
    assert not errors and not more and first[0] == second[0]
    assert "rank 1 of group" in first[0] and "has left a graph to Inductor alone" in first[0]


def test_a_rank_that_alone_runs_with_gradients_is_named_where_a_mode_is_forced(ranks):
    (_, errors), (_, more) = ranks(gradients_on_rank_1, {"tokenweave.mode": "fuse"})
    for message in (*errors, *more):
        assert "but this graph cannot be fused: rank 1 of group" in message and "has left a graph to Inductor alone" in message
    assert len(errors) == 2 and len(more) == 1


def other_graph_with_the_same_collectives():
    """A graph that is cut, then one with equal collectives, of which one reduces as many rows as data says. What each was: the mode."""
    torch._dynamo.reset()
    context._contexts.clear()
    before = len(tw_compile.reports())
    generator = torch.Generator().manual_seed(0)
    x, matrix, weight = (torch.randn(*shape, generator=generator) for shape in ((32, H), (H, H), (H,)))
    keep = torch.arange(32) % 3 != 0

    def cut(x, keep):
        x = x + all_reduce(x @ matrix)
        return norm_of(x + all_reduce(norm_of(x, weight, 1e-5) @ matrix), weight, 1e-5)

    def packed(x, keep):
        x = x + all_reduce(x @ matrix)
        rows = torch.zeros_like(x)
        rows[keep] = all_reduce(norm_of(x, weight, 1e-5)[keep] @ matrix)
        return norm_of(x + rows, weight, 1e-5)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad(), without_codegen():
        for function in (cut, packed):
            run = torch.compile(function, backend=backend.tokenweave, options={"tokenweave.min_tokens": 8})
            torch.testing.assert_close(run(x, keep), function(x, keep), rtol=1e-4, atol=1e-4)
    return [report.mode for report in tw_compile.reports()[before:]]


def test_a_known_decision_that_a_graph_cannot_carry_out_is_made_anew(ranks):
    first, second = ranks(other_graph_with_the_same_collectives)
    assert first == second and first[0] == "weave" and len(first) == 2
