"""Tuning of the schedule: what of a graph it takes, and that all ranks have the same plan, however they came to it."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from graphs import rewrite, trace_with_inputs, without_codegen
from models import HIDDEN, VOCAB, parallel, whole
from quantised import LINEARS
from sites import INNER, H, all_reduce, hf_norm, values
from test_quantised import block
from test_split import mlp, mlp_inputs

import tw_compile
from tw_compile import backend, context, ops
from tw_compile.autotune import schedule
from tw_compile.autotune.plan import WEAVE_MIN_TOKENS, Plan
from tw_compile.passes import section
from tw_compile.passes.graph_utils import arguments
from tw_compile.site import Site
from tw_compile.transports import choose
from tw_compile.transports.process_group import ProcessGroup
from tw_compile.transports.symmetric import gemms

SIZES = 16, 32
# Attention and MLP of a layer on one of two ranks, as tests/models.py has them.
ATTENTION = ("others", 4), ("mm", 64, 32), ("mm", 64, 16), ("mm", 64, 16), ("attention", 2, 1, 16), ("mm", 32, 64)
MLP = ("others", 1), ("mm", 64, 64), ("mm", 64, 64), ("mm", 64, 64)


class Rank:
    """A rank that tunes on the CPU, with plans on a disk of its own."""

    def __init__(self, folder, **patches):
        self.tuned = []
        tune = patches.pop("_autotune", schedule._autotune)

        def logged(section, *args):
            self.tuned.append(section)
            return tune(section, *args)

        self.patches = [
            mock.patch.multiple(schedule, possible=lambda device: True, SIZES=SIZES, SAMPLES=1, _autotune=logged, **patches),
            mock.patch.dict(os.environ, TW_COMPILE_CACHE_DIR=folder),
            mock.patch.dict(context._contexts, clear=True),  # as in a new process
            without_codegen(),
            torch.no_grad(),
        ]

    def __enter__(self):
        for patch in self.patches:
            patch.__enter__()
        torch._dynamo.reset()
        self.before = len(tw_compile.reports())
        return self

    def __exit__(self, *error):
        for patch in reversed(self.patches):
            patch.__exit__(*error)

    @property
    def reports(self):
        return tw_compile.reports()[self.before :]


class Block(torch.nn.Module):
    """Two sites, compiled in a second. Its weights are parameters, whose sizes are fixed."""

    def __init__(self):
        super().__init__()
        self.weight, self.up, self.down = map(torch.nn.Parameter, mlp_inputs(1)[2:])

    def forward(self, x, residual):
        return mlp(x, residual, self.weight, self.up, self.down)


def compiled(model, **options):
    options = {f"tokenweave.{name}": option for name, option in options.items()}
    return torch.compile(model, backend=backend.tokenweave, dynamic=options.pop("tokenweave.dynamic", True), options=options)


def ids_of(tokens, batch=1):
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def faster_from(tokens, ctas=4, split_ratio=0.625):
    """In place of measuring."""
    return lambda *args: Plan(tokens, ctas, split_ratio, 1.1)


def really():
    with tempfile.TemporaryDirectory() as folder, Rank(folder) as rank:
        model, ids = parallel("functional", 1), ids_of(48)
        out, expected = compiled(model)(ids), whole(1)(ids)
        (section,), (report,) = rank.tuned, rank.reports
        assert (out - expected).norm() < 0.02 * expected.norm()
        return section, report.rehearsal, os.listdir(folder)


@pytest.mark.slow
def test_the_first_layers_are_tuned_as_they_are(ranks):
    (section, kept, files), (other_section, other_kept, _) = ranks(really)
    assert section == other_section
    assert section == schedule.Section(HIDDEN, "bfloat16", SIZES, 1, 0, (ATTENTION, MLP), False)
    assert schedule.Section.from_dict(kept["section"]) == section
    assert kept == other_kept and kept["plan"]["gain"] > 0
    assert len(files) == 1


def where_one_rank_lacks_memory():
    section = schedule.Section(HIDDEN, "float32", SIZES, 1, 0, (ATTENTION, MLP), False)
    lacking = lambda self: "it needs 9.9 GB" if dist.get_rank() else None  # noqa: E731
    with tempfile.TemporaryDirectory() as folder, Rank(folder), mock.patch.object(schedule.Stage, "_lacks_memory", lacking):
        plan = schedule.agree_on(section, dist.group.WORLD.group_name, torch.device("cpu"), "auto", None)
        return plan, os.listdir(folder)


def test_where_one_rank_lacks_memory_all_go_by_a_rule(ranks):
    assert ranks(where_one_rank_lacks_memory) == [(Plan(WEAVE_MIN_TOKENS), [])] * 2


def files_of_two_processes():
    """On a rank: which file has the plan after a process that tuned, and after one that found it."""
    section = schedule.Section(HIDDEN, "float32", SIZES, 1, 0, (ATTENTION, MLP), False)
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            with Rank(folder, _autotune=faster_from(8)):
                args = section, dist.group.WORLD.group_name, torch.device("cpu"), "auto"
                schedule.agree_on(*args, schedule.known(*args))
                seen += [path.stat().st_ino for path in Path(folder).iterdir()]
    return seen


def test_a_plan_that_is_kept_is_not_written_again(ranks):
    for first, second in ranks(files_of_two_processes):
        assert first == second


def starts_of_a_batch(batch):
    """On a rank: the times of a batch, each cut between two of its sequences."""
    section = schedule.Section(HIDDEN, "float32", (batch * 16,), batch, 0, (ATTENTION, MLP), False)
    stage = schedule.Stage(section, ProcessGroup(dist.group.WORLD.group_name, torch.device("cpu")), torch.device("cpu"))
    stage.set()
    starts, start = [], stage.transport.start
    stage.transport.start = lambda site: (starts.append(len(site.x)), start(site))
    assert len(stage.times([None, (0, 4, False)], batch * 16)) == 2
    return starts


def test_a_batch_is_tuned_cut_between_sequences(ranks):
    for starts in ranks(starts_of_a_batch, 3):
        assert set(starts[0::2]) == {16} and set(starts[1::2]) == {32}


def with_unsplit_ops(x, residual, weight, up, down):
    """A sort along the tokens, which needs both halves, in front of a GEMM of all tokens."""
    residual = residual + all_reduce(x)
    inner = (hf_norm(residual, weight) @ up).sort(0).values
    residual = residual + all_reduce((inner.t() @ inner.expand(len(inner), INNER)) @ down)
    return hf_norm(residual, weight)


def test_the_section_names_ops_that_need_both_halves(world, monkeypatch):
    monkeypatch.setattr(schedule, "possible", lambda device: True)
    monkeypatch.setattr(schedule, "SIZES", SIZES)
    seen = []
    rewrite(with_unsplit_ops, *mlp_inputs(INNER), plan_of=lambda section, *_: seen.append(section))
    ((_, *ops),) = seen[0].phases
    assert ops == [("mm", H, INNER), ("unsplit",), ("unsplit", "mm", INNER, INNER), ("unsplit",), ("mm", INNER, H)]


def sections_of(kind, monkeypatch, **options):
    monkeypatch.setattr(schedule, "possible", lambda device: True)
    monkeypatch.setattr(schedule, "SIZES", SIZES)
    seen, shapes = [], ((1, 20, H), (1, 20, H), (H,), (H, H), (H, H))
    given = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    rewrite(block(LINEARS[kind], 3), *given, plan_of=lambda section, *_: seen.append(section), by=trace_with_inputs, **options)
    return seen


ROWS, ROW_SCALES = ("tensor", "float8_e4m3fn", (-1, H), (0, 1)), ("tensor", "float32", (-1, 1), (0, 1))
WEIGHT, SCALES = ("tensor", "float8_e4m3fn", (H, H), (1, 0)), ("tensor", "float32", (1, H), (0, 1))
NONE = ("constant", None)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in LINEARS if "tensor" not in kind])
def test_quantised_linears_are_tuned_as_they_are(world, monkeypatch, kind, dynamic):
    (section,) = sections_of(kind, monkeypatch, dynamic=dynamic)
    assert schedule.Section.from_dict(json.loads(json.dumps(asdict(section)))) == section
    _, (_, first, second) = section.phases
    if kind == "fp8 row":
        fast = ("dtype", "bfloat16"), ("constant", False)
        assert first == ("gemm", "aten::_scaled_mm", H, (ROWS, WEIGHT, ROW_SCALES, SCALES, NONE, NONE, *fast))
    # They run, and the last one writes to its given output.
    stage = schedule.Stage(section, ProcessGroup(dist.group.WORLD.group_name, torch.device("cpu")), torch.device("cpu"))
    assert stage.set() is None
    for op, gemm in stage.gemms.items():
        for tokens in (5, max(section.sizes)):
            product, out = gemm(tokens), torch.full((tokens, op[2]), float("nan"), dtype=torch.bfloat16)
            assert gemm(tokens, out) is out and torch.equal(out, product.to(torch.bfloat16)) and product.float().std() > 0
    assert second[0] == ("mm" if "weight" in kind else "gemm") and second[2] == H


def of_quantised(section):
    """On a rank: whether a plan is measured."""
    with tempfile.TemporaryDirectory() as folder, Rank(folder):
        plan = schedule.agree_on(section, dist.group.WORLD.group_name, torch.device("cpu"), "auto", None)
    return plan.gain is not None


def test_a_plan_of_quantised_linears_is_measured(world, ranks, monkeypatch):
    (section,) = sections_of("int8 row", monkeypatch)
    assert ranks(of_quantised, section) == [True, True]


def test_the_report_names_what_cannot_be_tuned(world, monkeypatch):
    monkeypatch.setattr(schedule, "possible", lambda device: True)
    graph = lambda x, r, w: hf_norm(r + all_reduce(hf_norm(r + all_reduce(x), w).cumsum(-1)), w)  # noqa: E731
    given = [torch.randn(shape) for shape in ((1, 300, H), (1, 300, H), (H,))]
    with without_codegen(), torch.no_grad():
        torch.compile(graph, backend=backend.tokenweave, dynamic=False)(*given)
    (report,) = tw_compile.reports()
    assert any("is not the product of a GEMM that autotuning can run" in reason for reason in report.reasons)


def test_a_gemm_that_is_left_out_is_told(world, monkeypatch, caplog):
    """Once. Before the last GEMM of a phase, so that the rest is a section."""
    monkeypatch.setattr(schedule, "possible", lambda device: True)

    def graph(x, residual, weight, a, b):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, weight)
        y = torch._int_mm((norm * 10).to(torch.int8), b).to(x.dtype)
        return hf_norm(residual + all_reduce(y @ a), weight)

    given = values(300, H), values(300, H), values(H), values(H, H), values(H, H).to(torch.int8)
    sections = []
    section._say_what_is_left_out.cache_clear()
    monkeypatch.setattr(section, "_gemm", lambda node: None)  # as of an op that is not described by sizes
    for _ in range(2):
        rewrite(graph, *given, plan_of=lambda given: sections.append(given) or Plan(8, 0, 0.5, 1.1), mode="weave")
    assert all(isinstance(each, schedule.Section) for each in sections)
    told = [record.getMessage() for record in caplog.records if "autotuned without" in record.getMessage()]
    assert told == ["a schedule is autotuned without aten._int_mm.default, which autotuning cannot run"]


def experts(x, residual, weight, router, up, down):
    """Two sites, and experts between them."""
    residual = residual + all_reduce(x)
    norm = hf_norm(residual, weight)
    shares, choices = (norm @ router).topk(2)
    keys, order = choices.view(-1).sort()
    ends = torch.histc(keys.float(), 4, 0, 3).cumsum(0, dtype=torch.int32)
    rows = torch._grouped_mm(torch._grouped_mm(norm[order // 2], up, ends).sin(), down, ends) * shares.view(-1)[order].unsqueeze(-1)
    residual = residual + all_reduce(rows[order.argsort()].view(-1, 2, H).sum(1))
    return hf_norm(residual, weight)


def expert_inputs(tokens):
    shapes = (tokens, H), (tokens, H), (H,), (H, 4), (4, H, INNER), (4, INNER, H)
    return [values(*shape, dtype=torch.bfloat16) for shape in shapes]


EXPERTS = ("mm", H, 4), ("experts", 4, 2, H, INNER), ("experts", 4, 2, INNER, H)


def test_experts_are_tuned_cut_and_whole(world, monkeypatch):
    """A plan has the number of tokens from which they are cut."""
    monkeypatch.setattr(schedule, "possible", lambda device: True)
    monkeypatch.setattr(schedule, "SIZES", SIZES)
    seen = []
    for experts_from, unsplit in ((20, 0), (21, 1)):
        plan = Plan(8, 0, 0.5, 1.1, experts_from)
        new = rewrite(experts, *expert_inputs(20), plan_of=lambda section, plan=plan: seen.append(section) or plan, mode="weave")
        assert sum(each.op == "aten.sort.default" for each in new.report.joins) == unsplit
    ((_, *ops),) = seen[0].phases
    assert seen[0] == seen[1] and tuple(ops) == EXPERTS and seen[0].experts == [(4, 2)] * 2


def times_of_experts():
    """On a rank: a plan of a section with experts, and what ran in its forms: (rows, whether they are skewed)."""
    section = schedule.Section(H, "bfloat16", SIZES, 1, 0, ((("others", 1), *EXPERTS),) * schedule.PHASES, False)
    seen = []

    def grouped(rows, weight, offs):
        shares = offs.diff(prepend=offs.new_zeros(1))
        seen.append((len(rows), int(offs[-1]), int(shares.max() - shares.min()) > 1))
        return rows @ weight[0]

    with tempfile.TemporaryDirectory() as folder, Rank(folder), mock.patch.object(F, "grouped_mm", grouped):
        plan = schedule.agree_on(section, dist.group.WORLD.group_name, torch.device("cpu"), "auto", None)
    return plan.gain, sorted({rows for rows, _, _ in seen}), all(rows == last for rows, last, _ in seen), {skewed for *_, skewed in seen}


def test_both_forms_of_experts_run_with_both_routings(ranks):
    for gain, rows, right, skewed in ranks(times_of_experts):
        assert gain > 0 and rows == [16, 32, 64] and right and skewed == {False, True}


def inputs_behind_a_measurement(phases):
    """On a rank: whether the inputs of a section are what they were, and where a site has reduced."""
    group, cpu = dist.group.WORLD.group_name, torch.device("cpu")
    transport = choose.another("process_group", group, cpu)
    stage = schedule.Stage(schedule.Section(H, "bfloat16", SIZES, 1, 0, phases, False), transport, cpu)
    stage.set()
    before, x = stage.values.clone(), torch.ones(2, H)
    with mock.patch.object(F, "grouped_mm", lambda rows, weight, offs: rows @ weight[0]), mock.patch.object(schedule, "SAMPLES", 1):
        stage.times([None, (0, 0.5, True)], max(SIZES))
    with transport.call():
        transport.fused(Site(x), True)
    return torch.equal(stage.values, before), x.unique().tolist()


@pytest.mark.parametrize(
    "phases", [((("mm", H, 32), ("mm", 32, H)), (("mm", H, H),)), ((("others", 1), *EXPERTS),) * 2], ids=["dense", "experts"]
)
def test_a_measured_process_group_reduces_in_place_but_for_inputs(ranks, phases):
    assert ranks(inputs_behind_a_measurement, phases) == [(True, [2.0])] * 2


@pytest.fixture
def reserved(monkeypatch):
    """The numbers of SMs that are reserved, and "end" for each release."""
    log = []
    monkeypatch.setattr(gemms, "reserve_sms", lambda ctas: log.append(ctas) or True)
    monkeypatch.setattr(gemms, "release_sms", lambda: log.append("end"))
    return log


@pytest.mark.parametrize(
    "options, wanted", [(dict(mode="weave", ctas=4), [4, "end"]), (dict(mode="weave"), []), (dict(mode="fuse", ctas=4), [])], ids=str
)
def test_gemms_of_a_woven_form_leave_sms_to_the_process_group(world, reserved, options, wanted):
    with without_codegen(), torch.no_grad():
        compiled(mlp, dynamic=False, **options)(*mlp_inputs(40))
    assert reserved == wanted


def test_a_failing_call_reserves_nothing_on(reserved):
    with pytest.raises(KeyboardInterrupt), gemms.reserved(8):
        raise KeyboardInterrupt
    with gemms.reserved(0):
        pass
    assert reserved == [8, "end"]


def test_so_many_sms_are_measured_over_the_process_group(world, reserved):
    group, cpu = dist.group.WORLD.group_name, torch.device("cpu")
    section = schedule.Section(H, "float32", SIZES, 1, 0, ((("mm", H, H),),) * 2, False)
    with tempfile.TemporaryDirectory() as folder, Rank(folder):
        schedule.agree_on(section, group, cpu, "process_group", None)
    assert set(reserved) >= {4, 8, "end"} and len(reserved) % 2 == 0 and set(reserved[1::2]) == {"end"}


class Logged(ProcessGroup):
    """A transport that notes its calls."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def start(self, site):
        self.calls.append(("start", site.slot))
        return super().start(site)

    def wait(self, slot, in_workspace):
        self.calls.append(("wait", slot))
        return super().wait(slot, in_workspace)


def calls_of(phase):
    """On a rank: what a woven run of two phases calls, and the kernels that stand for others."""
    section = schedule.Section(64, "float32", (32,), 1, 0, (phase, phase), False)
    device = torch.device("cpu")
    stage = schedule.Stage(section, Logged(dist.group.WORLD.group_name, device), device)
    stage.set()
    stage.run([16, 16], 32, 0)
    return stage.transport.calls, stage.small[0].item()


S0, S1, W0, W1 = ("start", 0), ("start", 1), ("wait", 0), ("wait", 1)


def test_an_op_of_both_halves_waits_for_both(ranks):
    cut = ("others", 3), ("mm", 64, 64), ("mm", 64, 64)
    for calls, small in ranks(calls_of, cut):
        assert calls == [S0, S1, W0, S0, W1, S1, W0, W1]
        assert small == 2 * 2 * 3, "phases × halves × kernels"
    for unsplit in (("unsplit",), ("unsplit", "mm", 64, 64), ("unsplit", "attention", 4, 2, 16)):
        for calls, _ in ranks(calls_of, (("mm", 64, 64), unsplit, ("mm", 64, 64))):
            assert calls == [S0, S1, W0, W1, S0, S1, W0, W1]


# What the user leaves open, of one graph: options -> (sizes, sequences, ctas) of what is tuned.
OPEN = [
    (1, dict(), (SIZES, 1, 0)),
    (2, dict(dynamic=False), ((40,), 2, 0)),
    (1, dict(dynamic=False), ((20,), 1, 0)),
    (1, dict(ctas=3), (SIZES, 1, 3)),
    (1, dict(mode="weave"), (SIZES, 1, 0)),
    (1, dict(min_tokens=8, split=8), (SIZES, 1, 0)),
    (1, dict(mode="fuse"), None),
    (1, dict(min_tokens=8, split=8, ctas=3), None),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("batch, options, expected", OPEN)
def test_what_is_left_to_decide_is_tuned(world, monkeypatch, batch, options, expected):
    monkeypatch.setattr(schedule, "possible", lambda device: True)
    monkeypatch.setattr(schedule, "SIZES", SIZES)
    seen = []
    rewrite(mlp, *mlp_inputs(batch, 20), plan_of=lambda section, *_: seen.append(section), **{"dynamic": True} | options)
    assert [(s.sizes, s.sequences, s.ctas) for s in seen] == ([expected] if expected else [])


def test_a_plan_says_how_many_ctas_a_start_has(world, monkeypatch):
    monkeypatch.setattr(schedule, "possible", lambda device: True)
    for plan, ctas in ((Plan(256, 6, 0.625, 1.1), 6), (Plan(None, 6, 0.625, 0.9), 0)):
        new = rewrite(mlp, *mlp_inputs(1, 300), plan_of=lambda *_: plan)
        nodes = new.after.find_nodes(op="call_function", target=ops.start) + new.after.find_nodes(op="call_function", target=ops.fused)
        assert {arguments(node)["ctas"] for node in nodes} == {ctas}
        assert new.report.split == ((128, 172) if ctas else None)


def of_plan():
    """On a rank: a plan for 256 tokens or more, then one for none."""
    seen = []
    for least, sizes in ((256, (500, 40)), (None, (500,))):
        with tempfile.TemporaryDirectory() as folder, Rank(folder, _autotune=faster_from(least)) as rank:
            run = compiled(Block())
            for tokens in sizes:
                run(*mlp_inputs(tokens)[:2])
            seen.append((len(rank.tuned), [(r.mode, r.split, r.reasons[0]) for r in rank.reports]))
    return seen


def test_a_plan_decides(ranks):
    for some, none in ranks(of_plan):
        tuned, [(weave, split, _), (kept, _, reason)] = some
        assert tuned == 1, "one section: the second graph has the plan of the first"
        assert (weave, kept, reason) == ("weave", "off", "not woven: fewer than 256 tokens")
        assert "5*s" in split[0]
        _, [(mode, _, reason)] = none
        assert mode == "off"
        assert reason == "not woven: autotuning measured no speed-up on this machine"


def of_ranks_with_different_plans(cases):
    """Each rank in processes that find the plan of its rank on its disk, or none."""
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        with Rank(folder, _autotune=faster_from(1000)):
            compiled(Block())(*mlp_inputs(40)[:2])
        (path,) = Path(folder).iterdir()
        for plans in cases:
            plan = plans[dist.get_rank()]
            path.unlink() if plan is None else path.write_text(json.dumps({"value": asdict(plan)}))
            with Rank(folder, _autotune=faster_from(2000)) as rank:
                compiled(Block())(*mlp_inputs(40)[:2])
                (report,) = rank.reports
                seen.append((len(rank.tuned), Plan(**report.rehearsal["plan"]), report.mode))
    return seen


A, B = Plan(8, 0, 0.5, 1.2), Plan(512, 0, 0.5, 1.2)


CASES = {  # each rank's plan -> tuned, what they agree on, mode
    (A, B): (0, A, "weave"),
    (None, B): (0, B, "off"),
    (None, None): (1, Plan(2000, 4, 0.625, 1.1), "off"),
}


@pytest.mark.slow
def test_ranks_with_different_plans_agree(ranks):
    for seen in ranks(of_ranks_with_different_plans, list(CASES)):
        assert seen == list(CASES.values())
