"""report.html(): a page that is whole, needs nothing else, and says what the report says."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_report import a_report

from tw_compile import html
from tw_compile.report import Break, Refusal, Report, UnsplitOp

VOID = {"meta"}


class Page(HTMLParser):
    """The text of a page; raises AssertionError where its tags are not closed in order."""

    def __init__(self, source):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def __str__(self):
        return " ".join(self.text)


def trace(*kernels):
    """A Chrome trace of (name, stream, start, µs)."""
    events = [{"name": n, "cat": "kernel", "pid": 0, "tid": stream, "ts": start, "dur": us} for n, stream, start, us in kernels]
    return {"traceEvents": [{"name": "aten::mm", "cat": "cpu_op", "ts": 0, "dur": 1}, {"ph": "M"}, *events]}


A_TRACE = trace(("nvjet_tst", 7, 0, 100), ("two_shot", 13, 50, 100), ("flash_fwd", 7, 100, 25), ("ncclDevKernel", 7, 200, 10))


def test_it_says_what_the_report_says():
    report = a_report()
    report.broken = Break("model.py:9, in forward: g()", "a call")
    said = str(Page(report.html()))
    head = "weave", "mode=weave, split=512", "512 | 1536", "peer"
    for wanted in (*head, "multimem: no multicast", "graph break at model.py:9", "1×s27×8192"):
        assert wanted in said
    for title, row in {"Refused": "all_reduce_2", "Unsplit ops": "aten.fft", "Sites": "all-reduce + add + RMSNorm"}.items():
        assert row in said.rsplit(title, maxsplit=1)[-1]
    assert "Timeline" not in said


def test_it_needs_nothing_else():
    source = a_report().html(A_TRACE).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script|<link", source)


def test_what_is_empty_is_left_out():
    said = Page(Report(requested={"mode": "auto"}).html())
    assert not {"table", "ul", "svg"} & set(said.tags) and "off" in str(said)


def test_code_of_the_model_stays_text():
    code = 'x = "<script>" & y'
    report = Report(requested={}, refusals=[Refusal("a", code, code)], joins=[UnsplitOp("b", code, code)], reasons=[code])
    report.broken = Break(code, code)
    page = Page(report.html(trace((code, 1, 0, 1))))
    assert "script" not in page.tags and str(page).count(code) >= 6


@pytest.mark.parametrize("kind", ["data", "path", "profile"])
def test_a_timeline(kind, tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(A_TRACE))
    profile = SimpleNamespace(export_chrome_trace=lambda where: Path(where).write_text(path.read_text()))
    page = Page(a_report().html({"data": A_TRACE, "path": path, "profile": profile}[kind]))
    assert page.tags.count("rect") == 4 and "4 kernels; compute ran during 68 % of 0.11 ms of communication." in str(page)


def test_what_is_hidden():
    """Of communication on the stream of compute, too; and on each GPU by itself."""
    assert html.hidden(html.kernels_of(A_TRACE)) == (110.0, 75.0)
    other = A_TRACE["traceEvents"] + [{"name": "gemm", "cat": "kernel", "pid": 1, "tid": 7, "ts": 0, "dur": 300}]
    assert html.hidden(html.kernels_of({"traceEvents": other})) == (110.0, 75.0)


def test_of_many_kernels_those_in_the_middle_are_shown():
    many = trace(*((("two_shot" if i % 4 == 0 else "gemm"), 7, 10 * i, 9) for i in range(5000)))
    page = Page(a_report().html(many))
    assert page.tags.count("rect") == html.MAX_KERNELS and f"5000 kernels, of which {html.MAX_KERNELS} are shown" in str(page)


def test_a_profile_without_a_gpu():
    assert "The profile has no GPU kernels." in str(Page(a_report().html(trace())))


@pytest.mark.parametrize(
    "junk, why",
    [({}, "has no list"), ({"traceEvents": 1}, "has no list"), ([], "has no list"), (3, "has no list"),
     ({"traceEvents": [3]}, "an event cannot be read"), ({"traceEvents": [{"cat": "kernel", "name": "gemm"}]}, "an event cannot be read"),
     ({"traceEvents": [{"cat": "kernel", "name": "gemm", "ts": "now", "dur": 1}]}, "an event cannot be read")],
    ids=str,
)  # fmt: skip
def test_what_is_no_profile(junk, why):
    with pytest.raises(ValueError, match=f"the profile is not a Chrome trace: .*{why}"):
        a_report().html(junk)


@pytest.mark.parametrize("content, why", [(b"host\n", "it is not JSON"), (b"\x1f\x8b\xff", "it is not JSON"), (b"{}", "it has no list")])
def test_a_file_that_is_no_profile(tmp_path, content, why):
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(ValueError, match=f"trace is not a Chrome trace: {why}"):
        a_report().html(str(tmp_path / "trace"))
    with pytest.raises(FileNotFoundError):
        a_report().html(tmp_path / "nothing")


def test_a_profiler_that_still_runs():
    with torch.profiler.profile() as profile, pytest.raises(ValueError, match="call html after the profiler has ended"):
        a_report().html(profile)


def test_equal_unsplit_ops_are_one_row():
    report = a_report()
    report.joins *= 3
    rows = str(Page(report.html())).rsplit("Unsplit ops", maxsplit=1)[-1]
    assert rows.count("aten.fft") == 1 and "3 aten.fft" in " ".join(rows.split())


@pytest.mark.parametrize("span, step", [(9.0, 1.0), (100.0, 10.0), (110.0, 10.0), (130.0, 20.0), (9040.0, 1000.0), (50000.0, 5000.0)])
def test_the_axis_has_round_numbers(span, step):
    assert html._step(span) == step
