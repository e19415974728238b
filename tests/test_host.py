"""The host's part of a site: which driver calls it makes, in which order and with what, over a driver that only notes them."""

import ctypes
import shutil
import subprocess
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tw_compile.ops import host, symmetric
from tw_compile.ops.symmetric import Arguments, Symmetric
from tw_compile.ops.tuning import by_rule

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
    """calls: the module over this driver; noted(): what was called since the last time; fail(name): from now on"""
    loaded = ctypes.CDLL(library)
    notes, failing = (ctypes.c_char * (1 << 16)).in_dll(loaded, "notes"), (ctypes.c_char * 64).in_dll(loaded, "failing")

    def noted():
        lines, notes.value = notes.value.decode().split("\n")[:-1], b""
        return [(name, *map(int, numbers)) for name, *numbers in map(str.split, lines)]

    def fail(name):
        failing.value = name.encode()

    fail("")
    noted()
    return SimpleNamespace(calls=host.calls(library), noted=noted, fail=fail)


def launched(stream, ctas):
    return "launch", FUNCTION, ctas, THREADS << 40 | GROUPS << 32 | SHARED, stream


def test_a_start_is_four_calls_of_the_driver(driver):
    driver.calls.start(FUNCTION, THREADS, GROUPS, SHARED, 8, 0, CURRENT, SIDE, 1, 2)
    assert driver.noted() == [("record", 1, CURRENT, 0, 0), ("wait", SIDE, 1, 0, 0), launched(SIDE, 8), ("record", 2, SIDE, 0, 0)]


@pytest.mark.parametrize("name, calls", [("record", 1), ("wait", 2), ("launch", 3)])
def test_the_first_that_fails_is_the_last_and_an_error_with_its_name(driver, name, calls):
    driver.fail(name)
    with pytest.raises(RuntimeError, match="^CUDA call failed: CUDA_ERROR_LAUNCH_FAILED$"):
        driver.calls.start(FUNCTION, THREADS, GROUPS, SHARED, 8, 0, CURRENT, SIDE, 1, 2)
    assert len(driver.noted()) == calls


def test_what_is_no_number_is_an_error(driver):
    with pytest.raises(TypeError):
        driver.calls.wait(CURRENT, "event")
    with pytest.raises(TypeError):
        driver.calls.wait(CURRENT)
    assert driver.noted() == []


def test_what_is_missing_is_said(library, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="is not a CUDA driver"):
        host.calls("libc.so.6")
    with pytest.raises(RuntimeError, match="no such driver"):
        host.calls("no such driver")
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", "cc -include no-such-header.h")
    with pytest.raises(RuntimeError, match="cannot compile: .*no-such-header.h"):
        host.calls.__wrapped__(library)


def test_a_cache_that_cannot_be_written_does_no_harm(library, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path / "file"))
    assert host.calls.__wrapped__(library).event()


def test_it_is_compiled_once(driver, library, monkeypatch):
    monkeypatch.setattr(host, "_compile", lambda: pytest.fail("compiled again"))
    assert host.calls.__wrapped__(library).event()


# --- Symmetric -------------------------------------------------------------------------------------------------------


class Workspace:
    """Of this rank alone, in this process's memory."""

    def __init__(self, owner, dtype, hidden, rows):
        self.activations, self.whole_residual = (torch.zeros(rows, hidden, dtype=dtype) for _ in range(2))
        self.carried = torch.zeros(rows, hidden)
        self.tuning = by_rule(owner.world)
        self.arguments, self.max_ctas = Arguments(0, [0, 0], [0, 0], 0, 0, 0, 1.0, 0, 0), 64
        loaded = FUNCTION, THREADS, GROUPS, SHARED
        calls = owner._host
        kernel = SimpleNamespace(start=partial(calls.start, *loaded), launch=partial(calls.launch, *loaded), cluster=1)
        self.kernels = lambda center: {"one_shot": kernel, "two_shot": kernel}


@pytest.fixture
def symmetric_sites(driver, world, monkeypatch):
    monkeypatch.setattr(host, "calls", lambda: driver.calls)
    monkeypatch.setattr(symmetric, "_Workspace", Workspace)
    monkeypatch.setattr(symmetric, "_ErrorRecord", lambda: SimpleNamespace(words=[0], raise_if_set=lambda *_: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: SimpleNamespace(cuda_stream=SIDE))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(symmetric, "current_raw_stream", lambda index: CURRENT)
    return Symmetric(world.group_name, torch.device("cuda", 0), multicast=False)


def packed(sites, x):
    """What the last launch on x's shape was given (csrc/site.cuh): what a call changes."""
    arguments = sites._call(SLOT, x.dtype, x.shape).arguments
    names = (
        "rows", "x", "residual", "bias", "weight", "norm_out", "residual_out", "site", "weight_is_float", "takes_carried", "whole",
        "eps", "scale", "offset", "shift_is_float", "shift",
    )  # fmt: skip
    return SimpleNamespace(**dict(zip(names, Arguments._CALL.unpack(arguments._buffer[-Arguments._CALL.size :]))))


def site(weight=None, bias=None, shift=None, center=False):
    return weight, bias, shift, 1e-5, 1.0, 0.0, center


def test_a_start_and_a_wait(symmetric_sites, driver):
    x = torch.randn(64, H)
    for _ in range(2):
        token = symmetric_sites.start(x, None, *site(), 8, SLOT, 7, False, False)
        norm, residual = symmetric_sites.wait(SLOT, True)
    assert (token.shape, token.dtype) == ((0,), x.dtype) and norm.shape == residual.shape == x.shape
    (_, fork, *_), (_, done, *_), *calls = driver.noted()
    once = [("record", fork, CURRENT, 0, 0), ("wait", SIDE, fork, 0, 0), launched(SIDE, 8), ("record", done, SIDE, 0, 0)]
    assert calls == 2 * [*once, ("wait", CURRENT, done, 0, 0)]
    assert torch.equal(symmetric_sites._call(SLOT, x.dtype, x.shape).partials, x), "two_shot reads it in the workspace"
    assert packed(symmetric_sites, x).rows == 64 and packed(symmetric_sites, x).site == 7


def test_gemms_are_told_while_kernels_may_run_beside_them(symmetric_sites, monkeypatch):
    log, x = [], torch.randn(64, H)
    monkeypatch.setattr(symmetric.gemms, "leave_out", lambda ctas: log.append(ctas) or "before")
    monkeypatch.setattr(symmetric.gemms, "as_before", log.append)

    def start(slot):
        symmetric_sites.start(x, None, *site(), 4, slot, 0, False, False)

    start(0), start(1), symmetric_sites.wait(0, True), start(0), symmetric_sites.wait(1, True)
    assert log == [4]
    symmetric_sites.wait(0, True)
    assert log == [4, "before"]
    start(0), start(0)
    assert log == [4, "before", 4, "before", 4], "a run that failed between start and wait is forgotten first"


def test_no_tokens_need_no_driver(symmetric_sites, driver):
    x = torch.zeros(0, H)
    symmetric_sites.start(x, None, *site(), 0, SLOT, 0, True, True)
    assert [t.shape for t in symmetric_sites.wait(SLOT, False)] == [x.shape] * 2 and driver.noted() == []


@pytest.mark.parametrize("rows", [3, 64], ids=by_rule(2).kernel_of)
def test_the_kernel_is_given_what_it_can_read(symmetric_sites, driver, rows):
    """Vectors as they are where they are aligned; a residual of the slot's last site as such."""
    x, aligned, odd = torch.randn(rows, H, dtype=torch.bfloat16), torch.randn(H), torch.randn(H + 1, dtype=torch.bfloat16)[1:]
    bias = torch.randn(2 * H, dtype=torch.bfloat16)[::2]
    _, residual = symmetric_sites.fused(x, None, *site(), 0, SLOT, 0, True, True, True)
    assert driver.noted() == [launched(CURRENT, {3: 3, 64: 32}[rows])]
    symmetric_sites.start(x, residual, *site(aligned, bias, odd, True), 4, SLOT, 0, True, True)
    given, (held_x, *_, held_bias, held_shift) = packed(symmetric_sites, x), symmetric_sites._pending[SLOT][2]
    assert (given.takes_carried, given.residual, given.residual_out) == (1, residual.data_ptr(), residual.data_ptr())
    assert (given.weight, given.weight_is_float) == (aligned.data_ptr(), 1)
    assert (given.bias, given.shift, given.shift_is_float) == (held_bias.data_ptr(), held_shift.data_ptr(), 0)
    assert torch.equal(held_bias, bias) and torch.equal(held_shift, odd) and given.bias % 16 == given.shift % 16 == 0
    assert held_x is x and given.x == (x.data_ptr() if rows == 3 else 0)


@pytest.mark.parametrize(
    "residual, inputs, message",
    [
        (torch.zeros(3, H), site(), "residual is torch.float32"),
        (torch.zeros(2, H, dtype=torch.bfloat16), site(), "residual is torch.bfloat16 \\[2, 64\\]"),
        (None, site(weight=torch.zeros(H, dtype=torch.float16)), "weight is torch.float16"),
        (None, site(shift=torch.zeros(H, dtype=torch.float16), center=True), "shift is torch.float16"),
        (None, site(shift=torch.zeros(H)), "only a LayerNorm has a shift"),
        (None, site(bias=torch.zeros(H)), "bias is torch.float32"),
    ],
)
def test_what_the_kernel_cannot_take_is_an_error(symmetric_sites, driver, residual, inputs, message):
    with pytest.raises(RuntimeError, match=message):
        symmetric_sites.start(torch.zeros(3, H, dtype=torch.bfloat16), residual, *inputs, 0, SLOT, 0, True, True)
    assert driver.noted() == []


def test_a_start_that_was_never_waited_for_is_forgotten(symmetric_sites, driver):
    x = torch.randn(64, H)
    symmetric_sites.start(x, None, *site(), 0, SLOT, 0, False, False)
    driver.noted()
    driver.fail("wait")  # as after a capture that failed
    with pytest.raises(RuntimeError, match="CUDA_ERROR_LAUNCH_FAILED"):
        symmetric_sites.start(x, None, *site(), 0, SLOT, 0, False, False)
    assert [name for name, *_ in driver.noted()] == ["wait", "record", "wait"] and not symmetric_sites._pending
