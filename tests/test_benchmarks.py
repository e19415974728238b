"""What the benchmarks make of what they have measured."""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import timeline  # noqa: E402

LAYERS = 4
GEMM, ACTIVATION, SITE = "nvjet_tst_128x256", "triton_poi_fused_mul_silu_scaled_dot_product_attention_3", "two_shot"


def trace(passes, stray=()):
    """A Chrome trace of woven passes, 10 µs for a GEMM or a site and 1 for all else. stray: what is before the last site"""
    now, events = 0.0, []

    def add(name, us, cat="kernel"):
        nonlocal now
        events.append({"name": name, "cat": cat, "ts": now, "dur": us, "args": {"correlation": len(events)}})
        now += us

    for number in range(passes):
        for site in range(2 * LAYERS + 1):
            for half in range(2):
                add(ACTIVATION, 1.0)
                if site:
                    add(GEMM, 10.0)
                if (number, site, half) == (passes - 1, 2 * LAYERS, 1):
                    for name in stray:
                        add(name, 1.0)
                add(SITE, 10.0)
                add("cudaLaunchKernel", 0.0, "cuda_runtime")
    return events


def test_kinds():
    flash = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>(Flash_fwd_params)"
    names = {
        "two_shot": "all-reduce + norm",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "NCCL",
        ACTIVATION: "elementwise",
        flash: "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
        GEMM: "GEMM",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16>()": "GEMM",
        "Memcpy DtoD (Device -> Device)": "elementwise",
    }
    assert {name: timeline.kind_of(name) for name in names} == names


def test_between():
    launches = timeline.kernels(trace(passes=2, stray=["Memcpy DtoD (Device -> Device)"]))
    clean, copied = (GEMM, SITE), (GEMM, "Memcpy DtoD ", SITE)
    assert Counter(timeline.between(launches, LAYERS)) == {clean: 2 * 2 * 2 * LAYERS - 1, copied: 1}


def test_inner_layer():
    """Also where the profiler has missed the beginning: from the end of one site to that of the second after it."""
    events = timeline.kernels(trace(passes=3))
    for seen in (events, events[7:]):
        rows = timeline.inner_layer(seen, LAYERS)
        assert Counter(row["kind"] for row in rows) == {"all-reduce + norm": 4, "GEMM": 4, "elementwise": 4}
        assert rows[0]["start"] == 0 and rows[-1]["start"] + rows[-1]["us"] == 4 * 21
        assert {row["lane"] for row in rows if row["kind"] == "all-reduce + norm"} == {"communication"}
