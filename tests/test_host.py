"""The host's part of a site: which driver calls it makes, in which order and with what, over a driver that only notes them."""

import contextlib
import ctypes
import itertools
import shutil
import subprocess
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tw_compile.site import NEXT_SITE, Planned, Site
from tw_compile.transports.symmetric import gemms, host, transport
from tw_compile.transports.symmetric.arguments import Arguments
from tw_compile.transports.symmetric.layout import own_rows
from tw_compile.transports.symmetric.transport import Symmetric
from tw_compile.transports.symmetric.tuning import by_rule
from tw_compile.transports.together import WorkspaceError

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

CURRENT, SIDE, FUNCTION, THREADS, GROUPS, SHARED = 11, 22, 33, 128, 2, 4096
H, SLOT = 64, 0

DRIVER = r"""
#include <stdio.h>
#include <string.h>

char notes[1 << 16], failing[64];

static int note(const char *name, unsigned long a, unsigned long b, unsigned long c, unsigned long d) {
  snprintf(notes + strlen(notes), 128, "%s %lu %lu %lu %lu\n", name, a, b, c, d);
  return strcmp(name, failing) ? 0 : 719;
}

typedef unsigned long Handle;
int cuEventCreate(Handle *event, unsigned flags) {
  static Handle events;
  *event = ++events;
  return note("create", *event, flags, 0, 0);
}
int cuEventRecord(Handle event, Handle stream) { return note("record", event, stream, 0, 0); }
int cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) { return note("wait", stream, event, flags, 0); }
int cuLaunchKernel(Handle function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned groups, unsigned bz, unsigned shared,
                   Handle stream, void **arguments, void **extra) {
  if (y != 1 || z != 1 || bz != 1 || extra) return 1;
  return note("launch", function, x, (unsigned long)threads << 40 | (unsigned long)groups << 32 | shared, stream);
}
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(Handle *context, int device) { return *context = 100 + device, 0; }
int cuCtxPushCurrent_v2(Handle context) { return context < 100; }
int cuCtxPopCurrent_v2(Handle *context) { return *context = 0, 0; }

// The CUDA graphs that are being captured, by the stream.
unsigned long captures[64];
int cuStreamGetCaptureInfo_v2(Handle stream, int *status, unsigned long *id, void *graph, void *dependencies, void *count) {
  return *status = captures[stream] != 0, *id = captures[stream], graph || dependencies || count;
}
int cuGetErrorName(int status, const char **name) { return *name = status == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : NULL, 0; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    directory = tmp_path_factory.mktemp("driver")
    (directory / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "driver.c", "-o", "driver.so"], check=True, cwd=directory)
    return str(directory / "driver.so")


@pytest.fixture
def driver(library):
    """calls: the module over this driver; noted(): what was called since the last time, but for the creation of events; fail(name): from
    now on; captures: by stream"""
    loaded = ctypes.CDLL(library)
    notes, failing = (ctypes.c_char * (1 << 16)).in_dll(loaded, "notes"), (ctypes.c_char * 64).in_dll(loaded, "failing")

    def noted():
        lines, notes.value = notes.value.decode().split("\n")[:-1], b""
        return [(name, *map(int, numbers)) for name, *numbers in map(str.split, lines) if name != "create"]

    def fail(name):
        failing.value = name.encode()

    captures = (ctypes.c_ulong * 64).in_dll(loaded, "captures")
    ctypes.memset(captures, 0, ctypes.sizeof(captures))
    fail("")
    noted()
    return SimpleNamespace(calls=host.calls(library), noted=noted, fail=fail, captures=captures)


def packed_launch(ctas=8):
    return host.pack_launch(FUNCTION, (THREADS, GROUPS), SHARED, ctas, 0, SIDE, 1, 2)


def launched(stream, ctas):
    return "launch", FUNCTION, ctas, THREADS << 40 | GROUPS << 32 | SHARED, stream


def test_a_start_is_four_calls_of_the_driver(driver):
    driver.calls.start(packed_launch(), CURRENT)
    assert driver.noted() == [("record", 1, CURRENT, 0, 0), ("wait", SIDE, 1, 0, 0), launched(SIDE, 8), ("record", 2, SIDE, 0, 0)]


@pytest.mark.parametrize("name, calls", [("record", 1), ("wait", 2), ("launch", 3)])
def test_the_first_that_fails_is_the_last_and_an_error_with_its_name(driver, name, calls):
    driver.fail(name)
    with pytest.raises(RuntimeError, match="^CUDA call failed: CUDA_ERROR_LAUNCH_FAILED$"):
        driver.calls.start(packed_launch(), CURRENT)
    assert len(driver.noted()) == calls


def test_what_is_no_number_is_an_error(driver):
    with pytest.raises(TypeError):
        driver.calls.wait(CURRENT, "event")
    with pytest.raises(TypeError):
        driver.calls.wait(CURRENT)
    for arguments in ((), (packed_launch(),), (packed_launch()[:-1], CURRENT), (CURRENT, packed_launch()), (packed_launch(), CURRENT, 0)):
        with pytest.raises(TypeError):
            driver.calls.start(*arguments)
        with pytest.raises(TypeError):
            driver.calls.launch(*arguments)
    assert driver.noted() == []


def test_what_is_missing_is_said(library, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="is not a CUDA driver"):
        host.calls("libc.so.6")
    with pytest.raises(RuntimeError, match="no such driver"):
        host.calls("no such driver")
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "cc -include no-such-header.h")
    with pytest.raises(RuntimeError, match="cannot compile it: .*no-such-header.h"):
        host.calls.__wrapped__(library)


def test_a_cache_that_cannot_be_written_does_no_harm(library, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path / "file"))
    assert host.calls.__wrapped__(library).event(100)


def test_it_is_compiled_once(driver, library, monkeypatch):
    monkeypatch.setattr(host, "_compile", lambda: pytest.fail("compiled again"))
    assert host.calls.__wrapped__(library).event(100)


def test_a_compiler_that_hangs_is_given_up(monkeypatch, tmp_path):
    (tmp_path / "cc").write_text("#!/bin/sh\nexec sleep 100\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    monkeypatch.setattr(host, "_COMPILER_S", 0.2)
    with pytest.raises(RuntimeError, match="did not end within 0.2 s"):
        host._compile()
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="none cannot be run: "):
        host._compile()


# --- Symmetric -------------------------------------------------------------------------------------------------------


class Workspace:
    """Of this rank alone, in this process's memory."""

    def __init__(self, owner, dtype, hidden, rows):
        self.activations, self.whole_residual = (torch.zeros(rows, hidden, dtype=dtype) for _ in range(2))
        self.carried = torch.zeros(rows, hidden)
        self.quantised, self.scales = torch.zeros(rows, hidden, dtype=torch.uint8), torch.zeros(rows * hidden // 4)
        self.tuning, self.bytes = by_rule(owner.world), rows * hidden * 8
        self.arguments, self.max_ctas = Arguments(0, [0, 0], [0, 0], 0, 0, 0, 1.0, 0, 0, 0), 64
        kernel = SimpleNamespace(packed=partial(host.pack_launch, FUNCTION, (THREADS, GROUPS), SHARED), cluster=1)
        self.kernels = lambda center, output: {"one_shot": kernel, "two_shot": kernel}


@pytest.fixture
def symmetric_sites(driver, world, monkeypatch):
    monkeypatch.setattr(host, "calls", lambda: driver.calls)
    monkeypatch.setattr(transport, "Workspace", Workspace)
    monkeypatch.setattr(transport, "ErrorRecord", lambda: SimpleNamespace(words=[0], raise_if_set=lambda *_: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: SimpleNamespace(cuda_stream=SIDE))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    driver.stream, driver.stream_id = CURRENT, 3
    monkeypatch.setattr(transport, "current_raw_stream", lambda index: driver.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(stream_id=driver.stream_id))
    sites = Symmetric(world.group_name, torch.device("cuda", 0), multicast=False)
    driver.noted()
    yield sites
    driver.captures[:] = [0] * 64
    driver.fail("")
    with sites.call():
        pass  # forgets what is still under way, for which GEMMs of this process have an SM carveout


def packed(sites, x, slot=SLOT):
    """What the last launch on x's shape was given (csrc/site.cuh): what a call changes."""
    arguments = sites._call(slot, x.dtype, x.shape).arguments
    names = (
        "rows", "x", "residual", "bias", "weight", "norm_out", "residual_out", "site", "weight_is_float", "takes_carried", "whole",
        "eps", "scale", "offset", "shift_is_float", "shift", "quantised_out", "scale_out", "static_scale", "added", "least", "most",
        "floor", "low", "high", "zero", "how", "narrow", "keeps_norm",
    )  # fmt: skip
    call, quantised = Arguments._CALL, Arguments._QUANTISED
    end = arguments._buffer[-call.size - quantised.size :]
    return SimpleNamespace(**dict(zip(names, (*call.unpack_from(end), *quantised.unpack_from(end, call.size)))))


def site(weight=None, bias=None, shift=None, center=False):
    return weight, bias, shift, 1e-5, 1.0, 0.0, center


def test_a_start_and_a_wait(symmetric_sites, driver):
    x = torch.randn(64, H)
    for _ in range(2):
        token = symmetric_sites.start(Site(x, None, *site(), 8, SLOT, 7, False, False))
        norm, residual = symmetric_sites.wait(SLOT, True)
    assert (token.shape, token.dtype) == ((0,), x.dtype) and norm.shape == residual.shape == x.shape
    fork, done = symmetric_sites._events[SLOT]
    once = [("record", fork, CURRENT, 0, 0), ("wait", SIDE, fork, 0, 0), launched(SIDE, 8), ("record", done, SIDE, 0, 0)]
    assert driver.noted() == 2 * [*once, ("wait", CURRENT, done, 0, 0)]
    assert torch.equal(symmetric_sites._call(SLOT, x.dtype, x.shape).partials, x), "two_shot reads it in the workspace"
    assert packed(symmetric_sites, x).rows == 64 and packed(symmetric_sites, x).site == 7


@pytest.mark.parametrize("rows", (7, 64))
def test_a_norm_that_is_quantised(symmetric_sites, rows):
    x, of_rows, given = torch.randn(rows, H).bfloat16(), "fp8 1 divide 1 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 0", torch.tensor([0.5])

    def quantised(text, in_workspace, carried=True, scale=given):
        return symmetric_sites.fused(Site(x, None, *site(), 4, SLOT, 7, carried, carried, text, scale), in_workspace)

    norm, _, q, scale = quantised(f"{of_rows} 0", True)
    assert (norm.numel(), q.dtype, q.shape, scale.shape) == (0, torch.float8_e4m3fn, x.shape, (rows, 1))
    call = packed(symmetric_sites, x)
    assert (call.quantised_out, call.scale_out, call.static_scale) == (q.data_ptr(), scale.data_ptr(), 0)
    assert (call.most, call.low, call.high, call.how, call.narrow, call.keeps_norm) == (448.0, -448.0, 448.0, 0, 1, 0)
    norm, _, mine, _ = quantised(f"{of_rows} 1", False)
    assert norm.shape == x.shape and packed(symmetric_sites, x).keeps_norm and mine.data_ptr() != q.data_ptr()
    norm, _, q = quantised("int8 0 multiply 0 0.0 0.0 1.0 0.0 -128.0 127.0 0.0 0 0", True)
    call = packed(symmetric_sites, x)
    assert q.dtype == torch.int8 and (call.scale_out, call.static_scale, call.how) == (0, given.data_ptr(), 2)
    x = torch.randn(rows, 384).bfloat16()
    norm, _, q, scales = quantised("fp8 1 divide 0 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 128 0", True)
    call = packed(symmetric_sites, x)
    assert (norm.numel(), q.shape, scales.shape, scales.is_contiguous()) == (0, x.shape, (rows, 3), True)
    assert (call.quantised_out, call.scale_out, call.static_scale) == (q.data_ptr(), scales.data_ptr(), 0)
    with pytest.raises(RuntimeError, match="must be one number in float32"):
        quantised("int8 0 multiply 0 0.0 0.0 1.0 0.0 -128.0 127.0 0.0 0 0", True, scale=None)
    with pytest.raises(RuntimeError, match="only a site with a sharded residual"):
        quantised(f"{of_rows} 0", True, carried=False)


def test_gemms_have_a_carveout_while_kernels_may_run_beside_them(symmetric_sites, monkeypatch):
    log, x = [], torch.randn(64, H)
    monkeypatch.setattr(gemms, "reserve_sms", lambda ctas: log.append(ctas) or True)
    monkeypatch.setattr(gemms, "release_sms", lambda: log.append("before"))

    def start(slot):
        symmetric_sites.start(Site(x, None, *site(), 4, slot))

    start(0), start(1), symmetric_sites.wait(0, True), start(0), symmetric_sites.wait(1, True)
    assert log == [4]
    symmetric_sites.wait(0, True)
    assert log == [4, "before"]
    start(0), start(0)
    assert log == [4, "before", 4, "before", 4], "a run that failed between start and wait is forgotten first"


def test_sites_are_numbered_on(symmetric_sites):
    x, numbers = torch.randn(64, H), []
    for slot, number in ((0, 0), (1, 0), (0, NEXT_SITE), (1, NEXT_SITE), (0, NEXT_SITE), (0, 7), (0, NEXT_SITE), (1, NEXT_SITE)):
        symmetric_sites.fused(Site(x, None, *site(), 0, slot, number), True)
        numbers.append(packed(symmetric_sites, x, slot).site)
    assert numbers == [0, 0, 1, 1, 2, 7, 8, 2]


def test_no_tokens_need_no_driver(symmetric_sites, driver):
    x = torch.zeros(0, H)
    symmetric_sites.start(Site(x, None, *site(), 0, SLOT, 0, True, True))
    assert [t.shape for t in symmetric_sites.wait(SLOT, False)] == [x.shape] * 2 and driver.noted() == []


@pytest.mark.parametrize("rows", [3, 64], ids=by_rule(2).kernel_of)
def test_the_kernel_is_given_what_it_can_read(symmetric_sites, driver, rows):
    """Vectors as they are where they are aligned; a residual of the slot's last site as such."""
    x, aligned, odd = torch.randn(rows, H, dtype=torch.bfloat16), torch.randn(H), torch.randn(H + 1, dtype=torch.bfloat16)[1:]
    bias = torch.randn(2 * H, dtype=torch.bfloat16)[::2]
    _, residual = symmetric_sites.fused(Site(x, None, *site(), 0, SLOT, 0, True, True), True)
    assert driver.noted() == [launched(CURRENT, {3: 3, 64: 32}[rows])]
    symmetric_sites.start(Site(x, residual, *site(aligned, bias, odd, True), 4, SLOT, 0, True, True))
    given, (held_x, *_, held_bias, held_shift, _) = packed(symmetric_sites, x), symmetric_sites._pending[SLOT][3]
    assert (given.takes_carried, given.residual, given.residual_out) == (1, residual.data_ptr(), residual.data_ptr())
    assert (given.weight, given.weight_is_float) == (aligned.data_ptr(), 1)
    assert (given.bias, given.shift, given.shift_is_float) == (held_bias.data_ptr(), held_shift.data_ptr(), 0)
    assert torch.equal(held_bias, bias) and torch.equal(held_shift, odd) and given.bias % 16 == given.shift % 16 == 0
    assert held_x is x and given.x == (x.data_ptr() if rows == 3 else 0)


@pytest.mark.parametrize("rows", [3, 64], ids=by_rule(2).kernel_of)
def test_a_whole_residual_in_float32_is_put_where_the_kernel_reads_one(symmetric_sites, driver, rows):
    x, residual = torch.randn(rows, H, dtype=torch.bfloat16), torch.randn(rows, H)
    symmetric_sites.start(Site(x, residual, *site(), 0, SLOT, 0, True, True))
    given, call = packed(symmetric_sites, x), symmetric_sites._calls[SLOT, x.dtype, x.shape]
    assert (given.takes_carried, given.residual) == (1, call.carried_at) and driver.noted()
    begin, end = (0, rows) if rows == 3 else own_rows(symmetric_sites.rank, 2, rows)
    in_order = call.workspace.carried[: end - begin].unflatten(-1, (2, -1, 4)).transpose(-2, -3).flatten(-3)
    assert torch.equal(in_order, residual[begin:end])


@pytest.mark.parametrize(
    "residual, inputs, message",
    [
        (torch.zeros(3, H, dtype=torch.float16), site(), "residual is torch.float16"),
        (torch.zeros(2, H, dtype=torch.bfloat16), site(), "residual is torch.bfloat16 \\[2, 64\\]"),
        (None, site(weight=torch.zeros(H, dtype=torch.float16)), "weight is torch.float16"),
        (None, site(shift=torch.zeros(H, dtype=torch.float16), center=True), "shift is torch.float16"),
        (None, site(shift=torch.zeros(H)), "only a LayerNorm has a shift"),
        (None, site(bias=torch.zeros(H)), "bias is torch.float32"),
    ],
)
def test_what_the_kernel_cannot_take_is_an_error(symmetric_sites, driver, residual, inputs, message):
    with pytest.raises(RuntimeError, match=message):
        symmetric_sites.start(Site(torch.zeros(3, H, dtype=torch.bfloat16), residual, *inputs, 0, SLOT, 0, True, True))
    assert driver.noted() == []


def test_a_start_that_was_never_waited_for_is_forgotten(symmetric_sites, driver):
    x = torch.randn(64, H)
    symmetric_sites.start(Site(x, None, *site(), 0, SLOT, 0, False, False))
    driver.noted()
    driver.fail("wait")  # as after a capture that failed
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        symmetric_sites.start(Site(x, None, *site(), 0, SLOT, 0, False, False))
    assert [name for name, *_ in driver.noted()] == ["wait", "record", "wait"] and not symmetric_sites._pending


# --- Streams and threads ---------------------------------------------------------------------------------------------


OTHER, THIRD = 12, 13


def begin_and_end(sites, x=torch.zeros(64, H), slot=SLOT):
    sites.start(Site(x, None, *site(), 4, slot))
    return sites.wait(slot, True)


def followed(driver):
    """(before, stream) of every event that was recorded on one stream and waited for on the other, but for those of starts and waits."""
    recorded_on, found = {}, []
    for name, first, second, *_ in driver.noted():
        if name == "record":
            recorded_on[first] = second
        elif name == "wait" and SIDE not in (first, recorded_on.get(second)):
            found.append((recorded_on[second], first))
    return found


def test_calls_on_one_stream_follow_each_other_for_nothing(symmetric_sites, driver):
    for _ in range(3):
        with symmetric_sites.call():
            begin_and_end(symmetric_sites)
    assert followed(driver) == []


@pytest.mark.parametrize("within", (True, False), ids=("in call()", "by hand"))
def test_a_call_on_another_stream_waits_for_the_one_before(symmetric_sites, driver, within):
    for stream in (CURRENT, CURRENT, OTHER, OTHER, CURRENT):
        driver.stream = stream
        with symmetric_sites.call() if within else contextlib.nullcontext():
            begin_and_end(symmetric_sites)
    assert followed(driver) == [(CURRENT, OTHER), (OTHER, CURRENT)]


@pytest.mark.parametrize("do", [
    lambda sites, x: sites.linear(x, torch.zeros(H, H), None, SLOT),
    lambda sites, x: sites.fused(Site(x, None, *site(), 4, SLOT, 0, True, True), True),
    lambda sites, x: sites.start(Site(x, None, *site(), 4, SLOT, 0, True, True)), lambda sites, x: sites.wait(1, True),
], ids=("linear", "fused", "start", "wait"))  # fmt: skip
def test_every_op_waits_for_the_one_before(symmetric_sites, driver, do):
    x = torch.zeros(64, H)
    symmetric_sites.start(Site(x, None, *site(), 4, 1, 0, True, True))
    driver.stream = OTHER
    do(symmetric_sites, x)
    assert followed(driver) == [(CURRENT, OTHER)]


def test_what_is_captured_and_what_is_not_do_not_wait_for_each_other(symmetric_sites, driver):
    begin_and_end(symmetric_sites)
    driver.captures[OTHER] = driver.captures[THIRD] = 5
    for stream in (OTHER, OTHER, THIRD, OTHER):  # a capture that forks
        driver.stream = stream
        begin_and_end(symmetric_sites)
    assert followed(driver) == [(OTHER, THIRD), (THIRD, OTHER)]
    driver.captures[OTHER] = driver.captures[THIRD] = 0
    driver.captures[OTHER] = 6  # another graph
    begin_and_end(symmetric_sites)
    assert followed(driver) == []
    driver.captures[OTHER] = 0
    begin_and_end(symmetric_sites)
    assert followed(driver) == [(CURRENT, OTHER)], "on the stream of the capture, and behind the last call that was not captured"


def test_a_capture_on_the_stream_of_the_calls_before(symmetric_sites, driver):
    begin_and_end(symmetric_sites)
    driver.captures[CURRENT] = driver.captures[OTHER] = 5
    for stream in (CURRENT, OTHER, CURRENT):
        driver.stream = stream
        begin_and_end(symmetric_sites)
    assert followed(driver) == [(CURRENT, OTHER), (OTHER, CURRENT)]
    driver.captures[OTHER], driver.stream = 0, THIRD
    with pytest.raises(RuntimeError, match="while another thread captures"):
        begin_and_end(symmetric_sites)


def test_a_stream_that_is_not_torchs_may_be_gone_after_the_call(symmetric_sites, driver):
    driver.stream, driver.stream_id = OTHER, OTHER * 16
    with symmetric_sites.call():
        begin_and_end(symmetric_sites)
    (*_, (_, event, recorded_on, *_), (_, waits, awaited, *_)) = driver.noted()
    assert (recorded_on, waits, awaited) == (OTHER, SIDE, event)
    for _ in range(2):  # also one that has its address
        begin_and_end(symmetric_sites)
    (_, event, recorded_on, *_), (_, waits, awaited, *_), *rest = driver.noted()
    assert (recorded_on, waits, awaited) == (SIDE, OTHER, event) and len(rest) == 10


def test_threads_take_turns_by_whole_calls(symmetric_sites):
    x, log = torch.zeros(64, H), []

    def run(name, held):
        for _ in range(20):
            with symmetric_sites.call(), symmetric_sites.call():
                log.append(name)
                symmetric_sites.start(Site(x, None, *site(), 4, SLOT, 0, False, False))
                time.sleep(1e-4)
                symmetric_sites.wait(SLOT, True)
                log.append(name)

    threads = [threading.Thread(target=run, args=(name, x)) for name in "ab"]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(log) == 80 and log[::2] == log[1::2]


# --- What is left behind ---------------------------------------------------------------------------------------------


@pytest.fixture
def blas(monkeypatch):
    """The SM carveout of GEMMs, in place of PyTorch's."""
    state = {"backend": "cublas", "carveout": None}
    monkeypatch.setattr(gemms, "_HAS_CARVEOUT", True)
    for name, key in (("blas_preferred_backend", "backend"), ("sm_carveout", "carveout")):
        monkeypatch.setattr(gemms, f"get_{name}", lambda key=key: state[key])
        monkeypatch.setattr(gemms, f"set_{name}", lambda value, key=key: state.update({key: value}))
    monkeypatch.setattr(gemms, "BlasBackend", SimpleNamespace(Cublaslt="cublaslt"))
    yield state
    assert state == {"backend": "cublas", "carveout": None} and gemms._reservations == 0


def test_an_exception_between_start_and_wait_leaves_nothing_behind(symmetric_sites, driver, blas):
    x = torch.zeros(64, H)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), symmetric_sites.call():  # noqa: PT012  # begun and failing in one call
            symmetric_sites.start(Site(x, None, *site(), 4, 0))
            symmetric_sites.start(Site(x, None, *site(), 4, 1))
            assert blas == {"backend": "cublaslt", "carveout": 4}
            driver.noted()
            raise error
        dones = [symmetric_sites._events[slot][1] for slot in range(2)]
        assert driver.noted() == [("wait", CURRENT, done, 0, 0) for done in dones], "the kernels may still read their inputs"
        assert blas["carveout"] is None and not symmetric_sites._pending
    with pytest.raises(RuntimeError, match="wait for slot . without a start"):
        symmetric_sites.wait(0, True)
    begin_and_end(symmetric_sites)


def test_two_groups_woven_in_one_graph(symmetric_sites, world, blas):
    other, x = Symmetric(world.group_name, torch.device("cuda", 0), multicast=False), torch.zeros(64, H)
    for first, _ in itertools.product((symmetric_sites, other), repeat=2):
        for sites, ctas in ((symmetric_sites, 4), (other, 8)):
            sites.start(Site(x, None, *site(), ctas, SLOT, 0, False, False))
            assert blas == {"backend": "cublaslt", "carveout": 4}
        for sites in (first, other if first is symmetric_sites else symmetric_sites):
            assert blas["carveout"] == 4
            sites.wait(SLOT, True)
        assert blas["carveout"] is None


def test_a_kernel_that_leaves_no_sms_to_others_sets_no_carveout(symmetric_sites, blas):
    symmetric_sites.start(Site(torch.zeros(64, H), None, *site(), 16, 0))
    assert blas["carveout"] is None
    symmetric_sites.start(Site(torch.zeros(64, H), None, *site(), 4, 1))
    assert blas["carveout"] == 4
    symmetric_sites.wait(1, True), symmetric_sites.wait(0, True)


@pytest.mark.parametrize("name", ("record", "wait", "launch"))
def test_a_start_that_fails_leaves_nothing_behind(symmetric_sites, driver, blas, name):
    begin_and_end(symmetric_sites)
    driver.fail(name)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        symmetric_sites.start(Site(torch.zeros(64, H), None, *site(), 4, SLOT, 0, False, False))
    assert not symmetric_sites._pending and blas["carveout"] is None


def test_shapes_are_forgotten_and_workspaces_are_not(symmetric_sites, monkeypatch):
    monkeypatch.setattr(transport, "MAX_CALLS", 8)
    often = torch.zeros(7, H)
    first = begin_and_end(symmetric_sites, often)[0].data_ptr()
    remembered = symmetric_sites._call(SLOT, often.dtype, often.shape)
    for rows in range(1, 60):
        begin_and_end(symmetric_sites, torch.zeros(rows, H))
        begin_and_end(symmetric_sites, often)
        assert len(symmetric_sites._calls) + len(symmetric_sites._older_calls) <= 8
        assert rows == 7 or symmetric_sites._call(SLOT, often.dtype, often.shape) is remembered
    assert begin_and_end(symmetric_sites, often)[0].data_ptr() == first
    assert len(symmetric_sites._workspaces) == 2 and symmetric_sites.workspace_bytes() == (32 + 64) * H * 8


# --- What all ranks make, or none ------------------------------------------------------------------------------------


CALLS = [Planned(slot, torch.float32, shape, slot == 2) for slot, shape in enumerate([(40, H), (2, 100, H), (0, H)])]


def test_workspaces_can_be_made_ahead(symmetric_sites, driver):
    symmetric_sites.prepare(CALLS)
    assert {key[0::3] for key in symmetric_sites._workspaces} == {(0, 64), (1, 256)} and driver.noted() == []


def test_workspaces_are_made_ahead_all_or_none(symmetric_sites, monkeypatch):
    begin_and_end(symmetric_sites)
    before = dict(symmetric_sites._workspaces)

    def fail(owner, dtype, hidden, rows):
        if rows == 256:
            raise WorkspaceError("no memory on rank 1")
        return Workspace(owner, dtype, hidden, rows)

    monkeypatch.setattr(transport, "Workspace", fail)
    calls = [Planned(1, torch.float32, (40, H), False), *CALLS]
    for _ in range(2):
        with pytest.raises(WorkspaceError, match="no memory on rank 1"):
            symmetric_sites.prepare(calls)
        assert symmetric_sites._workspaces == before and {key[0] for key in symmetric_sites._calls} == {0}
    monkeypatch.setattr(transport, "Workspace", Workspace)
    symmetric_sites.prepare(calls)
    assert len(symmetric_sites._workspaces) == 3
