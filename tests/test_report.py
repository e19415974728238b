"""The report: complete, readable, plain data, and there also when the compilation comes from a cache."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import expecttest
import pytest
import torch
from graphs import rewrite, without_codegen
from models import VOCAB, parallel
from sites import H, all_reduce, hf_norm, values
from test_split import mlp, mlp_inputs

import tw_compile
from tw_compile.report import Refusal, Report, Site, UnsplitOp


def a_report():
    site = dict(source="model.py:7, in forward: x = x + self.attention(h)", group="0", device="cuda:0", dtype="bfloat16")
    return Report(
        requested={"mode": "weave", "transport": "auto", "min_tokens": "auto", "split": 512, "ctas": "auto"},
        mode="weave",
        transport="peer",
        split=(512, 1536),
        sites=[
            Site("all_reduce", shape=(1, 2048, 8192), residual=True, norm="RMSNorm", woven=True, **site),
            Site("all_reduce_1", shape=(1, "s27", 8192), residual=False, norm="LayerNorm", woven=False, **site),
        ],
        refusals=[Refusal("all_reduce_2", "model.py:9, in forward: y = reduce(z)", "no RMSNorm or LayerNorm follows")],
        joins=[UnsplitOp("aten.fft", "model.py:8, in forward: f(x)", "no token-axis rule for this op")],
        reasons=["multimem: no multicast"],
    )


class AsText(expecttest.TestCase):
    def test_a_table(self):
        self.assertExpectedInline(str(a_report()), """\
tokenweave: weave (requested: mode=weave, split=512), transport peer, split 512 | 1536
  2 sites, 1 refused, 1 unsplit op
  because multimem: no multicast
  woven    1×2048×8192 bfloat16  model.py:7, in forward: x = x + self.attention(h)  all-reduce + add + RMSNorm
  fused    1×s27×8192 bfloat16   model.py:7, in forward: x = x + self.attention(h)  all-reduce + LayerNorm
  refused  all_reduce_2          model.py:9, in forward: y = reduce(z)              no RMSNorm or LayerNorm follows
  unsplit  aten.fft              model.py:8, in forward: f(x)                       no token-axis rule for this op""")

    def test_a_tuned_schedule(self):
        def line(**given):
            plan = {"min_tokens": None, "ctas": 0, "split_ratio": 0.5, "gain": None} | given
            report = Report(requested={}, rehearsal={"section": {}, "plan": plan})
            text = str(report).splitlines()[2]
            assert text.startswith("  autotuned: ")
            return text.removeprefix("  autotuned: ")

        lines = line(min_tokens=1024, ctas=6, split_ratio=0.625, gain=1.1234), line(ctas=8, gain=0.9), line(min_tokens=2048)
        self.assertExpectedInline("\n".join(lines), """\
woven from 1024 tokens on, with split ratio 0.625, 6 CTAs: 1.12 times as fast as fused at the most tokens
not woven at any number of tokens; the best woven form is 0.90 times as fast as fused at the most tokens, with split ratio 0.5, 8 CTAs
no, as a warning says; a rule weaves from 2048 tokens on""")

    def test_nothing_found(self):
        report = Report(requested={"mode": "auto"}, reasons=["it contains no all-reduce"])
        self.assertExpectedInline(str(report), """\
tokenweave: off (requested: auto)
  0 sites, 0 refused, 0 unsplit ops
  because it contains no all-reduce""")


def test_plain_data_and_back():
    report = a_report()
    data = json.loads(json.dumps(report.to_dict()))
    assert data == report.to_dict()
    assert Report.from_dict(data) == report


@pytest.mark.parametrize("change", [{"speed": 1}, {"sites": [{}]}, {"sites": 3}, {"broken": 3}, {"split": 3}], ids=repr)
def test_what_is_no_report(change):
    for data in ({**a_report().to_dict(), **change}, change, None):
        assert_is_no_report(data)


def assert_is_no_report(data):
    with pytest.raises(ValueError, match=r"it is not what Report.to_dict returns: \w+Error: "):
        Report.from_dict(data)


@pytest.mark.parametrize(
    "dtypes, wire", [(["bfloat16"], "16 bits"), (["float32"], "32 bits"), (["float32", "bfloat16"], "16 and 32 bits")], ids=str
)
def test_the_bits_of_a_wire_are_those_of_the_model(world, dtypes, wire):
    dtypes = [getattr(torch, name) for name in dtypes]

    def norms(weight, *xs):
        return [hf_norm(all_reduce(x), weight.to(x.dtype)) for x in xs]

    with without_codegen():
        (report,) = tw_compile.explain(norms, values(H), *(values(8, H, dtype=dtype) for dtype in dtypes))
    assert f"  wire: {wire}, " in str(report)


def test_the_report_of_a_graph_is_plain_data_too(world):
    for dynamic in (False, True):
        report = rewrite(mlp, *mlp_inputs(8), mode="weave", dynamic=dynamic).report
        again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
        assert again == report and str(again) == str(report)


def test_each_site_has_its_place_in_the_model(world):
    report = rewrite(parallel("functional", dtype=torch.float32), torch.randint(0, VOCAB, (1, 8))).report
    codes = [site.source.split("models.py:")[1].split(": ", 1)[1] for site in report.sites]
    assert codes == [
        "x = x + self.attention(self.attention_norm(x), rope)",
        "x = x + self.attention(self.attention_norm(x), rope)",
        "return x + self.mlp(self.mlp_norm(x))",
        "x = x + self.attention(self.attention_norm(x), rope)",
        "return x + self.mlp(self.mlp_norm(x))",
    ]


def test_what_was_requested_and_what_is_in_force(world):
    report = rewrite(mlp, *mlp_inputs(8), mode="auto", min_tokens=100, ctas=4).report
    autos = dict.fromkeys(("mode", "transport", "wire", "split", "cuda_graphs", "timeout"), "auto")
    assert report.requested == autos | {"min_tokens": 100, "ctas": 4}
    assert report.mode == "fuse" and report.reasons == ["not woven: fewer than 100 tokens"]


def test_explain_runs_the_model_and_returns_its_reports(world):
    calls = []

    def block(x, residual, weight, up, down):
        calls.append(torch.compiler.is_compiling())
        return mlp(x, residual, weight, up, down)

    with without_codegen():
        tw_compile.explain(lambda x: x.sin(), values(3))
        (report,) = tw_compile.explain(block, *mlp_inputs(8))
    assert calls and len(report.sites) == 2
    assert len(tw_compile.reports()) == 2, "explain's graphs count as any others"


def test_explain_takes_keywords_and_models_with_gradients(world):
    model = parallel("functional", 1)
    with without_codegen():
        (report,) = tw_compile.explain(model, ids=torch.randint(0, VOCAB, (1, 8)))
    assert len(report.sites) == 3


def test_reports_cannot_be_changed_from_outside(world):
    tw_compile.reports().append(None)
    assert tw_compile.reports() == []


def test_the_same_graph_compiled_twice_has_two_reports(world):
    for _ in range(2):
        torch._dynamo.reset()
        with without_codegen():
            torch.compile(mlp, backend="tokenweave")(*mlp_inputs(8))
    first, second = tw_compile.reports()
    assert first == second


# --- caches ----------------------------------------------------------------------------------------------------------


def new_constant():
    """A factor that makes a graph one that is in no cache. Most of its C++ is, which saves most of the time."""
    return 0.5 + time.time_ns() % 2**20 / 2**21


def run_in_a_process(autograd_cache, *arguments):
    """What a Python with Inductor's caches prints."""
    root = Path(__file__).parent
    environment = {
        **os.environ,
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": str(int(autograd_cache)),
        "PYTHONPATH": os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compile_in_a_process(constant, autograd_cache, **options):
    """What ``compile_once.py`` says."""
    options = {f"tokenweave.{name}": value for name, value in options.items()}
    script = Path(__file__).with_name("compile_once.py")
    said = run_in_a_process(autograd_cache, str(script), json.dumps(options), str(constant))
    return json.loads(said.splitlines()[-1])


@pytest.mark.full
def test_a_cache_hit_has_the_same_report():
    constant = new_constant()
    first = compile_in_a_process(constant, autograd_cache=True, min_tokens=32)
    assert first["graph hits"] == first["autograd hits"] == 0
    assert [report["mode"] for report in first["reports"]] == ["weave", "off"]
    again = compile_in_a_process(constant, autograd_cache=True, min_tokens=32)
    assert (again["graph hits"], again["autograd hits"]) == (2, 0), "what AOTAutograd caches does not know of the ranks"
    assert again["reports"] == first["reports"]
    assert again["sums"] == first["sums"]


RULE = """
import sys, torch, torch.distributed as dist, tw_compile
from sites import all_reduce, hf_norm, values
from torch.testing._internal.distributed.fake_pg import FakeStore
from tw_compile import backend
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)

@torch.library.custom_op("tests::shift", mutates_args=())
def shift(x: torch.Tensor) -> torch.Tensor:
    return x * 2

shift.register_fake(torch.empty_like)
if sys.argv[1] == "with":
    tw_compile.register_token_rule(torch.ops.tests.shift.default)(lambda node, axes: tw_compile.Split(axes[node.args[0]]))

def f(x, r, w):
    r = r + all_reduce(x)
    return hf_norm(r + all_reduce(shift(hf_norm(r, w)) * float(sys.argv[2])), w)

with torch.no_grad():
    torch.compile(f, backend=backend.tokenweave, options={"tokenweave.mode": "weave"})(values(1, 64, 16), values(1, 64, 16), values(16))
print(len(tw_compile.reports()[-1].joins))
"""


@pytest.mark.slow
def test_a_rule_that_is_registered_later_is_not_hidden_by_a_cache():
    constant = str(new_constant())
    unsplit = [run_in_a_process(True, "-c", RULE, which, constant) for which in ("without", "with")]
    assert unsplit == ["1\n", "0\n"]
