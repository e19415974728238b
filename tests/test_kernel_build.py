"""The kernels without a GPU: what NVRTC makes of them, and what they compute when their threads run on a CPU.

The second half compiles the kernel templates with g++ against a stand-in for csrc/ptx.cuh, in which every thread of every
CTA of every rank is a coroutine, scheduled in random order. That executes the real source, barriers, addressing and
arithmetic included; what it cannot show is what a weaker memory than the CPU's would do.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tw_compile.quantise import DTYPES as EIGHT_BITS
from tw_compile.quantise import quantised, read
from tw_compile.site import WITHOUT_NORM, all_reduce_add_norm
from tw_compile.transports.symmetric import nvrtc
from tw_compile.transports.symmetric.arguments import Arguments, numbers_of
from tw_compile.transports.symmetric.arguments import macros as all_macros
from tw_compile.transports.symmetric.layout import Layout, own_rows
from tw_compile.transports.symmetric.tuning import by_rule

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = ("two_shot", "one_shot")
SHARED = 227 * 1024  # of a CTA on sm_90 and sm_100
HIDDEN = (8, 64, 4096, 5120, 8192, 16384, 32768)


def macros(dtype, hidden, world, transport, center, rank=0, layouts=Layout, output=""):
    layout = layouts.of(hidden, dtype.itemsize, world, transport, center, SHARED)
    return all_macros(dtype, hidden, world, rank, transport, center, layout, output)


def layouts(groups, depth):
    """Of at most so many groups in a CTA, if several with so many rows of each in flight."""
    return type(f"Layout{groups}{depth}", (Layout,), {"MAX_GROUPS": groups, "GROUPS_DEPTH": depth})


needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=f"no NVRTC: {nvrtc.missing()}")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


# ---- What the compilers make of them


def disassemble(cubin: bytes, directory: Path) -> str:
    """SASS, by the cuobjdump of the toolkit or of triton."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="neither a CUDA toolkit nor triton: no cuobjdump")
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        if not tool.exists():
            pytest.skip("this triton has no cuobjdump")
    path = directory / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([tool, "-sass", path], check=True, capture_output=True, text=True).stdout


@pytest.mark.one_in(5)
@needs_nvrtc
@pytest.mark.parametrize(
    "transport, kernel", [("peer", "two_shot"), ("peer", "one_shot"), ("multimem", "two_shot"), ("multimem", "one_shot")]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ("sm_90a", "sm_100a"))
def test_sass(arch, kernel, dtype, transport, tmp_path):
    check_sass(arch, kernel, dtype, transport, False, tmp_path)


@needs_nvrtc
@pytest.mark.parametrize("kernel, output", [*((kernel, "") for kernel in KERNELS), ("two_shot", "fp8"), ("one_shot", "fp8_128")])
@pytest.mark.parametrize("arch, shared", [("sm_80", 163 * 1024), ("sm_86", 99 * 1024), ("sm_120a", 99 * 1024)])
def test_other_gpus_that_peer_is_for(arch, shared, kernel, output):
    """Without clusters, with less shared memory, and without an instruction for FP8."""
    layout = Layout.of(8192, 2, 4, "peer", False, shared)
    wanted = all_macros(torch.bfloat16, 8192, 4, 1, "peer", False, layout, output)
    assert layout.cluster == 1
    _, messages = nvrtc.compile_kernel(kernel, nvrtc.options(arch, wanted))
    assert messages == ""


@needs_nvrtc
@pytest.mark.parametrize(
    "kernel, dtype, transport", [("two_shot", torch.bfloat16, "peer"), ("one_shot", torch.float32, "multimem")], ids=str
)
def test_sass_of_a_layer_norm(kernel, dtype, transport, tmp_path):
    check_sass("sm_90a", kernel, dtype, transport, True, tmp_path)


@pytest.mark.one_in(3)
@needs_nvrtc
@pytest.mark.parametrize(
    "kernel, transport, output, center",
    [
        *(("two_shot", transport, "fp8", False) for transport in ("peer", "multimem")),
        *(("two_shot", "peer", "int8", True), ("one_shot", "peer", "fp8", False), ("one_shot", "multimem", "int8", False)),
        *(("two_shot", "peer", "fp8_128", False), ("two_shot", "multimem", "int8_128", True), ("one_shot", "peer", "fp8_128", False)),
    ],
)
def test_sass_of_a_norm_that_is_quantised(kernel, transport, output, center, tmp_path):
    """Vectors of 8 bytes, and words for scales."""
    check_sass("sm_90a", kernel, torch.bfloat16, transport, center, tmp_path, output)


def check_sass(arch, kernel, dtype, transport, center, tmp_path, output=""):
    command = nvrtc.options(arch, macros(dtype, 8192, 8, transport, center, output=output))
    cubin, messages = nvrtc.compile_kernel(kernel, [*command, "--ptxas-options=-v"])
    assert set(re.findall(r"(\d+) bytes spill", messages)) == {"0"}, messages
    sass = disassemble(cubin, tmp_path)
    assert "LDL" not in sass  # the only local memory is the argument list of printf, which only the printf reads

    loads = re.findall(r"(LDG\S*STRONG\.SYS)", sass)
    multicast_loads = re.findall(r"(LDGMC\S*)", sass)
    stores = [store for store in re.findall(r"(STG\S*STRONG\.SYS)", sass) if "128" in store]
    assert stores
    # All wide accesses are 16 bytes wide, and what is not wide is a flag, an epoch or an error word.
    assert set(re.findall(r"(?:LDG|STG)\.E\.(\d+|[A-Z])", sass)) <= {"128", "S", *(["64"] if output else [])}
    assert bool(output) == ("F2FP.SATFINITE.E4M3" in sass or "F2I" in sass)
    if transport == "peer":
        assert not multicast_loads
        # Each thread has a vector of each of the 7 other ranks in flight, for each vector of its own part of the row.
        copies = re.findall(r"LDGSTS\S*", sass) or [load for load in loads if "128" in load]
        assert len(copies) >= 7 * Layout.of(8192, dtype.itemsize, 8, transport, center, SHARED).unroll
        assert all("BYPASS.128" in copy or "128.STRONG.SYS" in copy for copy in copies), set(copies)
    else:
        assert not [load for load in loads if "128" in load]
        expected = {torch.bfloat16: r"(F32|HP)ADD\.BF16x8", torch.float16: r"(F32|HP)ADD\.F16x8", torch.float32: r"ADD.*F32"}[dtype]
        assert multicast_loads and all(re.search(expected, load) and "SYS" in load for load in multicast_loads)


@pytest.mark.one_in(4)
@needs_nvrtc
@pytest.mark.parametrize("world, dtype", [(2, torch.bfloat16), (5, torch.float32), (8, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_no_spills_at_any_size(hidden, world, dtype):
    check_no_spills(hidden, world, dtype, False)


@pytest.mark.one_in(4)
@needs_nvrtc
@pytest.mark.parametrize("world, dtype", [(2, torch.bfloat16), (5, torch.float32), (8, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("hidden", (64, 8192, 32768))
def test_no_spills_in_a_layer_norm(hidden, world, dtype):
    check_no_spills(hidden, world, dtype, True)


@pytest.mark.one_in(6)
@needs_nvrtc
@pytest.mark.parametrize("output", ("fp8", "int8_128"))
@pytest.mark.parametrize("hidden, world, center", [
    *((8192, world, center) for world in (2, 8) for center in (False, True)), (5120, 8, False), (32768, 8, False), (256, 2, False),
])  # fmt: skip
def test_no_spills_in_a_norm_that_is_quantised(hidden, world, center, output):
    check_no_spills(hidden, world, torch.bfloat16, center, output)


def check_no_spills(hidden, world, dtype, center, output=""):
    for kernel in KERNELS:
        command = nvrtc.options("sm_90a", macros(dtype, hidden, world, "peer", center, output=output))
        _, messages = nvrtc.compile_kernel(kernel, [*command, "--ptxas-options=-v"])
        assert set(re.findall(r"(\d+) bytes spill", messages)) == {"0"}, messages


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("kernel", KERNELS)
def test_nvcc_compiles_too(kernel, tmp_path):
    defines = [f"-D{name}={value}" for name, value in macros(torch.bfloat16, 4096, 4, "multimem", True).items()]
    source = nvrtc.SOURCES / f"{kernel}.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_90a", "-cubin", "-o", tmp_path / "k.cubin", *defines, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_nvrtc
def test_cubins_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    wanted = macros(torch.bfloat16, 64, 2, "peer", False)
    first = nvrtc.cubin("one_shot", "sm_90a", wanted)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *_: pytest.fail("compiled again"))
    assert nvrtc.cubin("one_shot", "sm_90a", wanted) == first
    with pytest.raises(pytest.fail.Exception):
        nvrtc.cubin("one_shot", "sm_90a", {**wanted, "TW_HIDDEN": 128})


@needs_nvrtc
def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path / "file"))
    assert nvrtc.cubin("one_shot", "sm_90a", macros(torch.bfloat16, 64, 2, "peer", False))


@needs_nvrtc
def test_a_compile_error_shows_the_compilers_message():
    with pytest.raises(RuntimeError, match="whole number of vectors"):
        nvrtc.compile_kernel("one_shot", nvrtc.options("sm_90a", {**macros(torch.bfloat16, 64, 2, "peer", False), "TW_HIDDEN": 12}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_covers_every_row_within_shared_memory(dtype):
    for hidden, world, limit in itertools.product(range(8, 32768 + 1, 8), (2, 8), (SHARED, 163 * 1024)):
        layout = Layout.of(hidden, dtype.itemsize, world, "peer", False, limit)
        vectors = hidden * dtype.itemsize // 16
        assert vectors <= layout.threads * layout.unroll * layout.chunks
        assert layout.threads % 32 == 0 and layout.threads <= 512 and layout.block[0] * layout.groups <= 1024
        assert layout.depth >= 1 and layout.shared[1] <= layout.shared[0] <= limit


def test_a_row_that_shared_memory_cannot_hold_is_refused():
    with pytest.raises(RuntimeError, match="use transport 'process_group'"):
        Layout.of(32768, 2, 8, "peer", False, 99 * 1024)


# ---- What they compute, on a CPU

STAND_IN = r"""
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using u32 = unsigned int;
using u64 = unsigned long long;
using std::min;
#define __device__
#define __forceinline__ inline
#define __noinline__

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
struct uint3 { u32 x, y, z; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
inline u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }
inline float __fdiv_rn(float a, float b) { volatile float r = a / b; return r; }
inline int __float2int_rn(float a) { return std::isnan(a) ? 0 : std::lrint(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

namespace cpu {
struct Barrier {
  u32 arrived = 0, generation = 0;
};
struct Cta {
  uint3 index, grid;
  u32 threads;
  Barrier all;
  std::vector<Barrier> named, warps;
  std::vector<float> exchange;
  std::vector<float4> shared;
};
struct Copy { u32 to; const void* from; };
using Group = std::vector<Copy>;
struct Fiber {
  ucontext_t beginning;
  jmp_buf place;
  bool begun;
  std::vector<char> stack;
  Cta* cta;
  u32 number;  // of the thread in the CTA
  uint3 thread;
  const void* site;
  void (*kernel)(const void*);
  std::vector<Group> groups;  // of copies that are still out, the open one last
  u32 stalled = 0;
  bool done;
};
inline Fiber* self;
inline jmp_buf scheduler;
inline bool trapped;
inline std::mt19937 chance;
// swapcontext would do, but makes a system call each time.
inline void yield() {
  if (_setjmp(self->place) == 0) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  self = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.beginning);
}
inline void pause() { if (chance() % 8 == 0) yield(); }
inline void meet(Barrier& barrier, u32 count) {
  const u32 generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}
// The memory behind the multicast address, by rank.
inline std::vector<char*> workspaces;
inline char* const kMulticast = reinterpret_cast<char*>(1ull << 60);
}  // namespace cpu

#define threadIdx (cpu::self->thread)
#define blockIdx (cpu::self->cta->index)
#define gridDim (cpu::self->cta->grid)
inline void __syncthreads() { cpu::meet(cpu::self->cta->all, cpu::self->cta->threads); }
inline void __trap() {
  cpu::trapped = true;
  for (;;) cpu::yield();
}
inline float __shfl_xor_sync(u32, float value, int mask) {
  cpu::Cta& cta = *cpu::self->cta;
  const u32 me = cpu::self->number;
  cta.exchange[me] = value;
  cpu::meet(cta.warps[me / 32], 32);
  const float other = cta.exchange[me ^ mask];
  cpu::meet(cta.warps[me / 32], 32);
  return other;
}

namespace ptx {
template <int kThreads>
void sync_some(u32 barrier) { cpu::meet(cpu::self->cta->named[barrier], kThreads); }
inline u32 uniform(u32 value) { return value; }
inline uint4 load(const void* p) { uint4 v; memcpy(&v, p, 16); return v; }
inline void store(void* p, uint4 v) { memcpy(p, &v, 16); }
inline uint4 load_sys(const void* p) { cpu::pause(); return load(p); }
template <class T>
void store_sys(void* p, T v) { cpu::pause(); memcpy(p, &v, sizeof v); }
inline void store(void* p, uint2 v) { memcpy(p, &v, 8); }
inline uint4 load_constant(const void* p) { return load(p); }
// Copies are made as late as they may be.
inline u32 shared_address(const void* p) { return (const char*)p - (const char*)cpu::self->cta->shared.data(); }
inline char* at_address(u32 shared) { return (char*)cpu::self->cta->shared.data() + shared; }
inline uint4 load_shared(u32 shared) { return load(at_address(shared)); }
inline void copy_async(u32 shared, const void* p) {
  if (cpu::self->groups.empty()) cpu::self->groups.emplace_back();
  cpu::self->groups.back().push_back({shared, p});
}
inline void close_copies() {
  if (cpu::self->groups.empty()) cpu::self->groups.emplace_back();
  cpu::self->groups.emplace_back();
}
template <int kStillOut>
void copies_arrived() {
  auto& groups = cpu::self->groups;
  for (; groups.size() > kStillOut + 1; groups.erase(groups.begin()))
    for (const cpu::Copy& copy : groups.front()) { cpu::pause(); memcpy(at_address(copy.to), copy.from, 16); }
}
inline void prefetch(const void* p) { load(p); }  // must be there to be read
inline void fence_alias() {}
inline u32 load_acquire_sys(const u32* p) { cpu::yield(); return *(const volatile u32*)p; }
inline void store_release_sys(u32* p, u32 v) { cpu::yield(); *(volatile u32*)p = v; }
inline u32 load_word(const u32* p) { return *p; }
inline void store_word(u32* p, u32 v) { *p = v; }
inline u64 global_timer() { static u64 t = 0; return t += 1000; }
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
inline char* shared_memory() { return reinterpret_cast<char*>(cpu::self->cta->shared.data()); }

inline u32 bf16_of(float f) {
  const u32 v = __float_as_uint(f);
  return std::isnan(f) ? 0x7fc0u : (v + 0x7fffu + (v >> 16 & 1)) >> 16;
}
inline u32 fp16_of(float f) { _Float16 h = f; uint16_t v; memcpy(&v, &h, 2); return v; }
inline float of_fp16(u32 v) { uint16_t w = v; _Float16 h; memcpy(&h, &w, 2); return h; }
inline u32 pack_bf16(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }
inline u32 pack_fp16(float low, float high) { return fp16_of(low) | fp16_of(high) << 16; }
inline float unpack_fp16_low(u32 v) { return of_fp16(v & 0xffffu); }
inline float unpack_fp16_high(u32 v) { return of_fp16(v >> 16); }

template <class Unpack, class Pack>
uint4 add_all(const void* p, int count, Unpack unpack, Pack pack) {
  float sum[8] = {};
  for (char* workspace : cpu::workspaces) {
    const uint4 v = load(workspace + ((const char*)p - cpu::kMulticast));
    for (int i = 0; i < count; ++i) sum[i] += unpack(v, i);
  }
  return pack(sum);
}
inline u32 word(const uint4& v, int i) { u32 w[4]; memcpy(w, &v, 16); return w[i]; }
inline uint4 multimem_load_add_bf16(const void* p) {
  return add_all(p, 8, [](uint4 v, int i) { return __uint_as_float(word(v, i / 2) >> (i % 2 * 16) << 16); },
                 [](float* s) { return make_uint4(pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]),
                                                  pack_bf16(s[6], s[7])); });
}
inline uint4 multimem_load_add_fp16(const void* p) {
  return add_all(p, 8, [](uint4 v, int i) { return of_fp16(word(v, i / 2) >> (i % 2 * 16) & 0xffffu); },
                 [](float* s) { return make_uint4(pack_fp16(s[0], s[1]), pack_fp16(s[2], s[3]), pack_fp16(s[4], s[5]),
                                                  pack_fp16(s[6], s[7])); });
}
inline uint4 multimem_load_add_fp32(const void* p) {
  return add_all(p, 4, [](uint4 v, int i) { return __uint_as_float(word(v, i)); },
                 [](float* s) { uint4 v; memcpy(&v, s, 16); return v; });
}
template <class T>
void multimem_store(void* p, T v) {
  for (char* workspace : cpu::workspaces) store_sys(workspace + ((char*)p - cpu::kMulticast), v);
}
}  // namespace ptx
"""

DRIVER = r"""
#include "one_shot.cuh"
#include "two_shot.cuh"

constexpr int kWorld = TW_WORLD;
using Site = tw::Site<kWorld>;
using Layout = tw::Layout<tw::TW_ELEMENT, TW_HIDDEN, TW_THREADS, TW_UNROLL, TW_CHUNKS>;
static_assert(sizeof(Site) == TW_SITE_BYTES, "the host packs the argument differently");

// A transport that also writes down what it was asked for.
struct Access { u32 rank, is_store; u64 at; };
static std::vector<Access> accesses;
template <class Element, int kWorld, int kRank>
struct Recorder : tw::TW_TRANSPORT<Element, kWorld, kRank> {
  using Base = tw::TW_TRANSPORT<Element, kWorld, kRank>;
  template <class Places>
  void load_reduce(typename Base::Pending& pending, Places places, u64 at) const {
    accesses.push_back({Base::site.rank, 0, at});
    Base::load_reduce(pending, places, at);
  }
  template <class Vector>
  void store(u64 at, Vector vector) const {
    accesses.push_back({Base::site.rank, 1, at});
    Base::store(at, vector);
  }
};

template <int kRank = 0>
static void two_shot(const void* p) {
  const Site& site = *(const Site*)p;
  using Group = tw::Group<TW_THREADS, TW_GROUPS>;
  if (site.rank == kRank) return tw::two_shot<Recorder, tw::TW_NORM, tw::TW_OUTPUT, Layout, Group, kWorld, kRank, TW_DEPTH>(site);
  if constexpr (kRank + 1 < kWorld) two_shot<kRank + 1>(p);
}
template <int kRank = 0>
static void one_shot(const void* p) {
  const Site& site = *(const Site*)p;
  if (site.rank == kRank) return tw::one_shot<Recorder, tw::TW_NORM, tw::TW_OUTPUT, Layout, kWorld, kRank>(site);
  if constexpr (kRank + 1 < kWorld) one_shot<kRank + 1>(p);
}
static void (*const kernels[])(const void*) = {two_shot<>, one_shot<>};
static const uint3 blocks[] = {{TW_THREADS, TW_GROUPS, 1}, {TW_THREADS, 1, 1}};

// One call of one rank: what a stream does before, the launch, what it does after.
struct Copy { char *to; const char *from; u64 bytes; };
struct Step { const void* site; u64 kernel, grid; Copy before, after[4]; };

static void body() {
  cpu::self->kernel(cpu::self->site);
  cpu::self->done = true;
  for (;;) cpu::yield();
}

struct Stream {
  const Step* steps;
  u64 next = 0;
  u32 stalled = 0;
  std::vector<cpu::Cta> ctas;
  std::vector<cpu::Fiber> fibers;
  std::vector<u32> live;

  void begin() {
    const Step& step = steps[next];
    if (step.before.bytes) memcpy(step.before.to, step.before.from, step.before.bytes);
    ctas.assign(step.grid, {});
    const uint3 block = blocks[step.kernel];
    const u32 threads = block.x * block.y;
    fibers.resize(step.grid * threads);
    for (u32 b = 0; b < step.grid; ++b) {
      cpu::Cta& cta = ctas[b];
      cta.index = {b, 0, 0}, cta.grid = {u32(step.grid), 1, 1}, cta.threads = threads, cta.named.resize(16);
      cta.warps.resize(threads / 32), cta.exchange.resize(threads), cta.shared.resize(TW_SHARED_BYTES / 16);
      for (u32 t = 0; t < threads; ++t) {
        cpu::Fiber& fiber = fibers[b * threads + t];
        fiber.stack.resize(48 * 1024);
        fiber.cta = &cta, fiber.number = t, fiber.thread = {t % block.x, t / block.x, 0}, fiber.site = step.site;
        fiber.kernel = kernels[step.kernel], fiber.begun = fiber.done = false;
        getcontext(&fiber.beginning);
        fiber.beginning.uc_stack.ss_sp = fiber.stack.data();
        fiber.beginning.uc_stack.ss_size = fiber.stack.size();
        fiber.beginning.uc_link = nullptr;
        makecontext(&fiber.beginning, body, 0);
        live.push_back(b * threads + t);
      }
    }
  }
  void end() {
    for (const Copy& copy : steps[next].after)
      if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
    ++next;
  }
};

// 0: all calls ended; 1: a kernel trapped; 2: no end in sight
extern "C" int run(const Step* steps, u64 count, char** workspaces, u32 seed) {
  std::mt19937& random = cpu::chance;
  random.seed(seed);
  accesses.clear();
  cpu::trapped = false;
  cpu::workspaces.assign(workspaces, workspaces + kWorld);
  std::vector<Stream> streams(kWorld);
  for (int r = 0; r < kWorld; ++r) streams[r].steps = steps + r * count;
  for (u64 pass = 0; pass < 10000 * count + 100000; ++pass) {
    bool busy = false;
    for (Stream& stream : streams) {
      if (stream.next == count) continue;
      busy = true;
      if (stream.stalled == 0 && random() % 32 == 0) stream.stalled = random() % 64;  // ranks fall behind each other
      if (stream.stalled != 0 && stream.stalled-- != 0) continue;
      if (stream.live.empty()) stream.begin();
      std::shuffle(stream.live.begin(), stream.live.end(), random);
      for (u32 f : stream.live) {
        u32& stalled = stream.fibers[f].stalled;
        if (stalled == 0 && random() % 256 == 0) stalled = random() % 32;  // and so do threads
        if (stalled != 0 && stalled-- != 0) continue;
        cpu::resume(stream.fibers[f]);
        if (cpu::trapped) return 1;
      }
      std::erase_if(stream.live, [&](u32 f) { return stream.fibers[f].done; });
      if (stream.live.empty()) stream.end();
    }
    if (!busy) return 0;
  }
  return 2;
}

extern "C" u64 access_count() { return accesses.size(); }
extern "C" const Access* access_list() { return accesses.data(); }
"""


class Copy(ctypes.Structure):
    _fields_ = [("to", ctypes.c_void_p), ("from_", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]


class Step(ctypes.Structure):
    _fields_ = [
        ("site", ctypes.c_void_p),
        ("kernel", ctypes.c_uint64),
        ("grid", ctypes.c_uint64),
        ("before", Copy),
        ("after", Copy * 4),
    ]


class Access(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_uint32), ("is_store", ctypes.c_uint32), ("at", ctypes.c_uint64)]


class Machine:
    """W ranks with a workspace each, whose kernels run on the CPU."""

    ROWS = 64  # of a workspace
    CTAS = 32
    MULTICAST = 1 << 60

    def __init__(self, directory: Path, dtype, hidden, world, transport, center=False, layouts=Layout, output=""):
        self.dtype, self.hidden, self.world, self.transport, self.center = dtype, hidden, world, transport, center
        wanted = macros(dtype, hidden, world, transport, center, layouts=layouts, output=output)
        defines = [f"-D{name}={value}" for name, value in wanted.items()]
        # a name of its own, as the loader takes one file for another of the same name
        self.library = directory / f"{dtype}-{hidden}-{world}-{transport}-{center}-{layouts.__name__}{output}".replace("torch.", "")
        if not self.library.exists():
            for path in nvrtc.SOURCES.glob("*.cuh"):
                shutil.copy(path, directory)
            (directory / "ptx.cuh").write_text(STAND_IN)
            (directory / "driver.cpp").write_text(DRIVER)
            options = ["-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC"]  # fortified, longjmp stays on its stack
            command = ["g++", *options, *defines, "driver.cpp", "-o", self.library]
            subprocess.run(command, check=True, cwd=directory)
        self.run_steps = ctypes.CDLL(str(self.library))
        self.run_steps.access_list.restype = ctypes.POINTER(Access)
        self.run_steps.access_count.restype = ctypes.c_uint64

        row = hidden * dtype.itemsize
        self.carried_at = self.ROWS * row
        self.whole_at = self.carried_at + self.ROWS * hidden * 4
        self.staging_at = self.whole_at + self.ROWS * row
        self.workspaces = [torch.zeros(self.staging_at + 2 * self.CTAS * row, dtype=torch.uint8) for _ in range(world)]
        self.pads = [torch.full((self.CTAS * world,), -3 << 28, dtype=torch.int32) for _ in range(world)]
        self.epochs = [torch.full((self.CTAS,), -3, dtype=torch.int32) for _ in range(world)]  # soon wraps through 0
        self.error = torch.zeros(7, dtype=torch.int32)

    def arguments(self, rank, timeout_s=1e3) -> Arguments:
        return Arguments(
            rank,
            [w.data_ptr() for w in self.workspaces],
            [p.data_ptr() for p in self.pads],
            self.MULTICAST if self.transport == "multimem" else 0,
            self.epochs[rank].data_ptr(),
            self.error.data_ptr(),
            timeout_s,
            self.whole_at,
            self.staging_at,
            self.whole_at + self.ROWS * self.hidden,
        )

    def region(self, rank, begin, rows, dtype=None):
        dtype = dtype or self.dtype
        return self.workspaces[rank][begin : begin + rows * self.hidden * dtype.itemsize].view(dtype).view(rows, self.hidden)

    def run(self, calls, seed=0, kernel=None, ctas=3, whole=True, carried=False, timeout_s=1e3, lost=(), fewer=(), elsewhere=()):
        """Run calls back to back on all ranks, without any meeting between them other than the kernels' own.

        calls: dicts of partials [W][T, H], residual, weight, bias, shift, eps, scale, offset, center, which is that of the kernels; also
               quantise and static_scale, as a Site has them, and then whole is False
        kernel:  of all calls, or None for the one that each has on GPUs
        whole:   whether the last residual leaves whole, and not carried
        carried: whether all calls but the last carry their residual to the next, whatever that has as ``residual``
        lost:    ranks that never come
        fewer:   ranks that run one row less than the others
        elsewhere: ranks that are at site 9, where the others are at site 7
        Returns [calls][ranks] of (norm, residual); of a carried residual, in float32, rows of others are NaN. With quantise of
        (norm, or the partial sums where it is not kept, residual, q, scales, or bytes of 0x7F where there are none).
        """
        steps = (Step * (self.world * len(calls)))()
        results, alive = [], []
        for number, call in enumerate(calls):
            results.append([])
            for rank in range(self.world):
                rows = call["partials"][0].shape[0] - (rank in fewer)
                name = kernel or by_rule(self.world).kernel_of(rows)
                small = name != "two_shot"
                begin, end = (0, rows) if small else own_rows(rank, self.world, rows)
                is_whole, takes_carried = whole and not (carried and number < len(calls) - 1), carried and number > 0
                x, kept = self.region(rank, 0, rows), self.region(rank, self.carried_at, end - begin, torch.float32)
                residual = self.region(rank, self.whole_at, rows) if is_whole else kept
                norm_out = torch.full_like(x, torch.nan)
                residual_out = torch.full((rows, self.hidden), torch.nan, dtype=residual.dtype)
                arguments = self.arguments(rank, timeout_s)
                mine = [call[name] for name in ("residual", "bias", "weight", "shift")]
                if takes_carried:
                    mine[0] = kept
                elif mine[0] is not None:  # of others' rows nothing may be read
                    mine[0] = torch.full_like(mine[0], torch.nan)
                    mine[0][begin:end] = call["residual"][begin:end]
                alive += [arguments, *mine]
                *pointers, shift = [0 if t is None else t.data_ptr() for t in mine]
                weight_is_float, shift_is_float = (t is not None and t.dtype == torch.float32 for t in mine[2:])
                assert call["center"] == self.center
                text, static_scale = call.get("quantise", ""), call.get("static_scale")
                memory = self.workspaces[rank][self.whole_at :]
                scales = max(1, read(text).scales(self.hidden)) if text else 0
                eight_bits = [memory[: rows * self.hidden], memory[self.ROWS * self.hidden :][: 4 * rows * scales]] if text else []
                assert not (text and is_whole)
                static_at = static_scale.data_ptr() if text and not read(text).per_token else 0
                arguments.set(
                    rows, x.data_ptr(), *pointers, x.data_ptr(), residual.data_ptr(), 9 if rank in elsewhere else 7,
                    weight_is_float, takes_carried, is_whole, call["eps"], call["scale"], call["offset"], shift_is_float, shift,
                )  # fmt: skip
                if text:
                    arguments.set_quantised(*(t.data_ptr() for t in eight_bits), static_at, *numbers_of(text))
                step = steps[rank * len(calls) + number]
                step.site = ctypes.addressof(arguments._buffer)
                step.kernel = KERNELS.index(name)
                step.grid = 0 if rank in lost else min(ctas, rows if small else -(-rows // self.world))
                partial, size = call["partials"][rank], x.numel() * x.itemsize
                step.before = Copy(x.data_ptr(), partial.data_ptr(), size)
                step.after[0] = Copy(norm_out.data_ptr(), x.data_ptr(), size)
                of_residual = residual_out if is_whole else residual_out[begin:end]
                step.after[1] = Copy(of_residual.data_ptr(), residual.data_ptr(), residual.numel() * residual.itemsize)
                outs = [torch.full_like(t, 0x7F) for t in eight_bits]
                for copy, (out, there) in enumerate(zip(outs, eight_bits)):
                    there.fill_(0x7F)
                    step.after[2 + copy] = Copy(out.data_ptr(), there.data_ptr(), there.numel())
                if text:
                    how = read(text)
                    outs = [outs[0].view(EIGHT_BITS[how.dtype][0]).view(rows, -1), outs[1].view(torch.float32).view(rows, scales)]
                results[-1].append((norm_out, residual_out, *outs))
        pointers = (ctypes.c_void_p * self.world)(*(w.data_ptr() for w in self.workspaces))
        self.status = self.run_steps.run(steps, ctypes.c_uint64(len(calls)), pointers, ctypes.c_uint32(seed))
        return results

    def accesses(self):
        found = self.run_steps.access_list()
        return [(found[i].rank, found[i].is_store, found[i].at) for i in range(self.run_steps.access_count())]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kernels")
    return lambda *args: Machine(directory, *args)


def example(dtype, hidden, world, rows, seed=0, residual=True, bias=False, weight="same", scale=1.0, offset=0.0, shift=None, center=False):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "partials": [draw(rows, hidden).to(dtype) for _ in range(world)],
        "residual": draw(rows, hidden).to(dtype) if residual else None,
        "bias": draw(hidden).to(dtype) if bias else None,
        "weight": {"same": draw(hidden).to(dtype), "float": draw(hidden), None: None}[weight],
        "shift": {"same": draw(hidden).to(dtype), "float": draw(hidden), None: None}[shift],
        "eps": 1e-5,
        "scale": scale,
        "offset": offset,
        "center": center,
    }


def in_order(carried, itemsize):
    """A carried residual has the front halves of all 16-byte vectors of a row first, where these have 16-bit elements."""
    return carried.unflatten(-1, (4 // itemsize, -1, 4)).transpose(-2, -3).flatten(-3)


def assert_right(results, call, world, whole=True, one_shot=False):
    rows = call["partials"][0].shape[0]
    norm, residual = all_reduce_add_norm(**call)
    norms = torch.stack([of_rank[0] for of_rank in results])
    assert (norms.view(torch.uint8) == norms[:1].view(torch.uint8)).all(), "ranks differ"
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[norm.dtype]
    lost = 1e-6 if call["center"] else 0.0  # where a difference, or a sum with the shift, is small
    torch.testing.assert_close(norms[0].float(), norm.float(), rtol=2 * tolerance, atol=tolerance / 16 + lost)
    for rank, (_, mine) in enumerate(results):
        begin, end = (0, rows) if whole or one_shot else own_rows(rank, world, rows)
        mine = mine if whole else in_order(mine, norm.itemsize)
        assert mine.dtype == (norm.dtype if whole else torch.float32)
        if call["scale"] == 1.0:  # no reduction over the row: every bit
            assert torch.equal(mine[begin:end], residual[begin:end].to(mine.dtype))
        else:  # the kernels multiply and add in one, with one rounding
            torch.testing.assert_close(mine[begin:end].float(), residual[begin:end].float(), rtol=2 * tolerance, atol=1e-6)


@pytest.mark.one_in(2)
@needs_gxx
@pytest.mark.parametrize(
    "world, dtype", [*((3, dtype) for dtype in DTYPES), *((world, torch.bfloat16) for world in (2, 5, 8)), (8, torch.float32)], ids=str
)
def test_numbers(machine, world, dtype):
    kernels = machine(dtype, 64, world, "peer")
    for seed, rows in enumerate((1, 2, 7, 31, 32, 33, 64)):
        variant = dict(
            residual=seed % 2 == 0,
            bias=seed % 3 == 0,
            weight=("same", "float", None)[seed % 3],
            scale=(1.0, 0.5)[seed % 2],
            offset=(0.0, 1.0)[seed // 2 % 2],
        )
        call = example(dtype, 64, world, rows, seed, **variant)
        for whole in (True, False):
            (result,) = kernels.run([call], seed, whole=whole)
            assert kernels.status == 0
            assert_right(result, call, world, whole, by_rule(world).kernel_of(rows) == "one_shot")


@needs_gxx
@pytest.mark.parametrize("kernel", ["one_shot", "two_shot"])
def test_a_site_without_a_norm_gives_the_residual_in_the_dtype_of_the_model(machine, kernel):
    kernels = machine(torch.bfloat16, 64, 3, "peer")
    call = example(torch.bfloat16, 64, 3, 7, weight=None) | {"eps": WITHOUT_NORM}
    (result,) = kernels.run([call], kernel=kernel, ctas=2)
    assert kernels.status == 0
    assert_right(result, call, 3)
    assert all(torch.equal(norm, residual) for norm, residual in result)


@pytest.mark.one_in(2)
@needs_gxx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_a_layer_norm(machine, dtype):
    world = 3
    kernels = machine(dtype, 64, world, "peer", True)
    for seed, rows in enumerate((1, 7, 31, 32, 33, 64)):
        variant = dict(
            residual=seed % 2 == 0,
            bias=seed % 3 == 0,
            weight=("same", "float", None)[seed % 3],
            shift=("float", None, "same", "same")[seed % 4],
            scale=(1.0, 0.5)[seed % 2],
            offset=(0.0, 1.0)[seed // 2 % 2],
        )
        call = example(dtype, 64, world, rows, seed, **variant, center=True)
        for whole in (True, False):
            (result,) = kernels.run([call], seed, whole=whole)
            assert kernels.status == 0
            assert_right(result, call, world, whole, by_rule(world).kernel_of(rows) == "one_shot")


@pytest.mark.one_in(2)
@needs_gxx
@pytest.mark.parametrize("hidden, dtype", [(72, torch.bfloat16), (9216, torch.bfloat16), (4104, torch.float32)], ids=str)
def test_layouts_of_a_layer_norm(machine, hidden, dtype):
    kernels = machine(dtype, hidden, 2, "peer", True)
    for rows, kernel in ((3, "one_shot"), (7, "two_shot")):
        call = example(dtype, hidden, 2, rows, bias=True, weight="float", offset=1.0, shift="same", center=True)
        (result,) = kernels.run([call], kernel=kernel, ctas=2)
        assert kernels.status == 0
        assert_right(result, call, 2)


@needs_gxx
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_layer_norm_of_a_large_mean(machine, kernel):
    """What is left of the row after its mean is as exact as the row: E(x²) - E(x)² would be wrong in its first digit."""
    kernels = machine(torch.float32, 520, 2, "peer", True)
    call = example(torch.float32, 520, 2, 5, residual=False, shift="same", center=True)
    call["partials"] = [partial + 2.0**10 for partial in call["partials"]]
    (results,) = kernels.run([call], kernel=kernel)
    right = torch.nn.functional.layer_norm(sum(call["partials"]).double(), (520,), call["weight"].double(), call["shift"].double())
    for norm, _ in results:
        torch.testing.assert_close(norm.double(), right, rtol=1e-4, atol=1e-3)


@pytest.mark.one_in(2)
@needs_gxx
@pytest.mark.parametrize(
    "hidden, dtype",
    [(8, torch.float16), (72, torch.bfloat16), (520, torch.float32), (5120, torch.bfloat16), (9216, torch.bfloat16), (4104, torch.float32)],
    ids=str,
)
def test_layouts(machine, hidden, dtype):
    """Rows that do not fill the last vectors, one chunk or several."""
    kernels = machine(dtype, hidden, 2, "peer")
    for rows, kernel in ((3, "one_shot"), (7, "two_shot")):
        call = example(dtype, hidden, 2, rows, bias=True, weight="float", offset=1.0)
        (result,) = kernels.run([call], kernel=kernel, ctas=2)
        assert kernels.status == 0
        assert_right(result, call, 2)


@pytest.mark.one_in(2)
@needs_gxx
@pytest.mark.parametrize("hidden, dtype", [(8192, torch.bfloat16), (4096, torch.float32)], ids=str)
def test_layouts_that_have_few_registers(machine, hidden, dtype):
    """The weight is fetched for each row, and with 16-bit elements what is near when it is needed."""
    kernels = machine(dtype, hidden, 2, "peer")
    call = example(dtype, hidden, 2, 9, bias=True, weight="float", offset=1.0)
    (result,) = kernels.run([call], kernel="two_shot", ctas=2)
    assert kernels.status == 0
    assert_right(result, call, 2)


@pytest.mark.one_in(2)
@needs_gxx
@pytest.mark.parametrize("world, hidden", [(3, 64), (2, 256)])
def test_back_to_back_calls(machine, world, hidden):
    """Many calls on one workspace with changing sizes and data, no rank waiting for another outside the kernels."""
    kernels = machine(torch.bfloat16, hidden, world, "peer")
    sizes = (1, 33, 32, 5, 5, 64, 31, 2, 40, 1, 1, 1)
    for seed in range(8):
        calls = [example(torch.bfloat16, hidden, world, rows, seed * 100 + i) for i, rows in enumerate(sizes)]
        for result, call in zip(kernels.run(calls, seed, ctas=4), calls):
            assert_right(result, call, world)
        assert kernels.status == 0


@pytest.mark.slow
@pytest.mark.one_in(5)
@needs_gxx
@pytest.mark.parametrize("dtype, hidden", [(torch.bfloat16, 512), (torch.float16, 64), (torch.float32, 64)], ids=str)
@pytest.mark.parametrize("rows, kernel", [(1, "one_shot"), (31, "one_shot"), (7, "two_shot"), (63, "two_shot")])
def test_a_residual_is_carried_unrounded(machine, dtype, hidden, rows, kernel):
    """From site to site, until the last one rounds it."""
    world, total = 3, 4
    kernels = machine(dtype, hidden, world, "peer")
    calls = [example(dtype, hidden, world, rows, seed=seed, residual=seed != 0) for seed in range(total)]
    results = kernels.run(calls, kernel=kernel, ctas=2, carried=True)
    assert kernels.status == 0
    residual = None
    for number, (result, call) in enumerate(zip(results, calls)):
        call = {**call, "residual": residual}
        assert_right(result, call, world, whole=number == total - 1, one_shot=kernel != "two_shot")
        _, residual = all_reduce_add_norm(**call)


@pytest.mark.slow
@needs_gxx
@pytest.mark.parametrize("center, hidden", [(False, 1024), (True, 520)], ids=("RMSNorm", "LayerNorm"))
@settings(max_examples=3, deadline=None, database=None, derandomize=True)
@given(
    rows=st.tuples(st.integers(0, 49), st.integers(1, 50)).map(lambda r: slice(r[0], min(sum(r), 50))),
    kernel=st.sampled_from(KERNELS), ctas=st.integers(1, 4), layouts=st.sampled_from((layouts(1, 1), layouts(3, 2), Layout)),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_bits_of_a_row_depend_on_its_data_alone(machine, center, hidden, rows, kernel, ctas, layouts, seed):
    """Not on the batch, the kernel, the number of CTAs and of their groups, the rank, or who is late."""
    kernels = machine(torch.bfloat16, hidden, 3, "peer", center)
    call = example(torch.bfloat16, hidden, 3, 50, shift="same" if center else None, center=center)
    (((norm, residual), *_),) = kernels.run([call])
    part = {**call, "partials": [p[rows].contiguous() for p in call["partials"]], "residual": call["residual"][rows].contiguous()}
    (results,) = machine(torch.bfloat16, hidden, 3, "peer", center, Layout if center else layouts).run([part], seed, kernel, ctas)
    for of_rank in results:
        assert torch.equal(of_rank[0], norm[rows]) and torch.equal(of_rank[1], residual[rows])


@needs_gxx
@pytest.mark.parametrize("kernel", ("one_shot", "two_shot"))
def test_both_transports_touch_every_vector_once_at_the_same_addresses(machine, kernel):
    world, rows, hidden, dtype = 3, 31, 64, torch.float16
    row = hidden * dtype.itemsize
    call = example(dtype, hidden, world, rows)
    seen = {}
    for transport in ("peer", "multimem"):
        kernels = machine(dtype, hidden, world, transport)
        (results,) = kernels.run([call], kernel=kernel)
        assert kernels.status == 0
        norm, _ = all_reduce_add_norm(**call)
        for rank in range(world):
            torch.testing.assert_close(results[rank][0].float(), norm.float(), rtol=1e-2, atol=1e-2)
        seen[transport] = kernels.accesses()
    assert sorted(seen["peer"]) == sorted(seen["multimem"])

    loads = [(rank, at) for rank, is_store, at in seen["peer"] if not is_store]
    stores = [at for _, is_store, at in seen["peer"] if is_store]
    vectors = [*range(0, rows * row, 16)]
    if kernel == "one_shot":
        assert not stores
        for rank in range(world):  # its staging places may be used again, by another row
            assert len([at for r, at in loads if r == rank]) == len(vectors)
            assert all(at >= kernels.staging_at for _, at in loads)
    else:
        assert sorted(at for _, at in loads) == vectors
        assert sorted(stores) == vectors + [kernels.whole_at + at for at in vectors]
        for rank, at in loads:
            begin, end = own_rows(rank, world, rows)
            assert begin * row <= at < end * row


QUANTISATIONS = {  # what the kernels take of a Quantise, in turns
    "fp8": ["1 divide 1 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 0", "1 divide 0 0.0 1e-12 448.0 0.0 -448.0 448.0 0.0 0",
            "1 divide 0 0.0 0.0 448.0 0.0 -448.0 448.0 1.0 0",
            "0 multiply 0 0.0 0.0 1.0 0.0 -448.0 448.0 0.0 0"],
    "int8": ["1 inverse 1 0.0 0.0 127.5 1.1920928955078125e-07 -128.0 127.0 0.0 0", "1 divide 0 1e-3 1e-2 127.0 1e-3 -127.0 127.0 0.0 0",
             "0 divide 0 0.0 0.0 1.0 0.0 -128.0 127.0 0.0 0"],
    "fp8_128": ["1 divide 1 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 128", "1 inverse 0 0.0 1e-4 448.0 0.0 -448.0 448.0 0.0 128"],
    "int8_128": ["1 divide 0 1e-3 0.0 127.0 0.0 -127.0 127.0 0.0 128"],
}  # fmt: skip


@pytest.mark.one_in(3)
@needs_gxx
@pytest.mark.parametrize("transport, dtype, output, hidden, center", [
    ("peer", torch.float16, "int8", 520, True), ("peer", torch.bfloat16, "fp8", 9216, False),
    ("multimem", torch.bfloat16, "int8", 64, False), ("peer", torch.bfloat16, "fp8_128", 640, True),
    ("multimem", torch.float16, "int8_128", 640, False), ("peer", torch.bfloat16, "fp8_128", 9216, False),
], ids=str)  # fmt: skip
def test_a_norm_is_quantised(machine, transport, dtype, output, hidden, center):
    """To the bits of the reference, also where the norm does not come out, and of a row or group of zeros.

    Of 640 channels the last warp that has some has them in one half alone.
    """
    world = 2
    kernels = machine(dtype, hidden, world, transport, center, Layout, output)
    for (i, numbers), (kernel, rows) in itertools.product(enumerate(QUANTISATIONS[output]), (("one_shot", 2), ("two_shot", 5))):
        call = example(dtype, hidden, world, rows, i, center=center)
        for values in (*call["partials"], call["residual"]):
            values[1] = 0
            values[0, :128] *= "_" not in output
        scale = torch.tensor([[0.011, 90.0]["multiply" in numbers]])
        how = read(f"{output.partition('_')[0]} {numbers} 1")
        assert how.output == output
        kept, alone = (
            kernels.run([call | {"quantise": str(each), "static_scale": scale}], i, kernel, 2, whole=False)[0]
            for each in (how, how._replace(keeps_norm=False))
        )
        assert kernels.status == 0
        if transport == "peer":
            assert_right([of_rank[:2] for of_rank in kept], call, world, False, kernel == "one_shot")
        norm = kept[0][0]
        q, scales = quantised(norm, how, scale)
        assert norm.isfinite().all() and not q[1].float().any()
        for _, _, ours, of_rows in (*kept, *alone):
            assert torch.equal(ours.view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(of_rows, scales) if how.per_token else of_rows.view(torch.uint8).eq(0x7F).all()
        for (unwritten, *_), partial in zip(alone, call["partials"]):
            assert torch.equal(unwritten, partial)


@needs_gxx
def test_a_rank_that_never_comes_is_named(machine):
    world = 3
    kernels = machine(torch.bfloat16, 64, world, "peer")
    kernels.run([example(torch.bfloat16, 64, world, 40)], timeout_s=1e-6, lost=(1,))
    assert kernels.status == 1
    magic, rank, site, peer, phase, *_ = kernels.error.tolist()
    assert magic & 0xFFFFFFFF == 0x7457F417
    assert rank in (0, 2) and site == 7 and peer == 1 and phase == 0


@needs_gxx
@pytest.mark.parametrize("kernel, rows", [("two_shot", 63), ("one_shot", 31)])
def test_another_number_of_tokens_is_noticed(machine, kernel, rows):
    """By whoever comes last, even where both have the same number of CTAs and barriers."""
    world = 3
    for odd in range(world):
        kernels = machine(torch.bfloat16, 64, world, "peer")
        kernels.run([example(torch.bfloat16, 64, world, rows)], odd, kernel, ctas=2, fewer=(odd,))
        assert kernels.status == 1
        magic, rank, _, peer, phase, mine, call = kernels.error.tolist()
        assert magic & 0xFFFFFFFF == 0x7457F417 and phase == 2 and odd in (rank, peer)
        assert [mine, call] == ([rows - 1, 7 << 18 | rows] if rank == odd else [rows, 7 << 18 | rows - 1])


@needs_gxx
@pytest.mark.parametrize("kernel, rows", [("two_shot", 63), ("one_shot", 31)])
def test_another_site_is_noticed(machine, kernel, rows):
    """With as many tokens: nothing else is the matter."""
    world = 3
    for odd in range(world):
        kernels = machine(torch.bfloat16, 64, world, "peer")
        kernels.run([example(torch.bfloat16, 64, world, rows)], odd, kernel, ctas=2, elsewhere=(odd,))
        assert kernels.status == 1
        magic, rank, site, peer, phase, mine, call = kernels.error.tolist()
        assert magic & 0xFFFFFFFF == 0x7457F417 and phase == 2 and odd in (rank, peer) and mine == rows
        assert [site, call] == ([9, 7 << 18 | rows] if rank == odd else [7, 9 << 18 | rows])
