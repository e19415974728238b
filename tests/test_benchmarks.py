"""What the benchmarks make of what they have measured."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import plot  # noqa: E402
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


# --- models of experts -----------------------------------------------------------------------------------------------


def test_the_models_of_moe_are_models_with_a_plan():
    """Made without weights."""
    transformers = pytest.importorskip("transformers", "5.0")
    import moe

    for name in moe.MODELS:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(moe.config_of(name, layers=1), dtype=torch.bfloat16)
        assert model.base_model._tp_plan and len(model.base_model.layers) == 1


# --- plots -----------------------------------------------------------------------------------------------------------


def committed(name):
    return json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())


def rows(tokens, batches, sides=("inductor", "auto")):
    """A result of so many tokens and sequences. The speedup is the tokens of the forward pass."""
    return {
        "machine": {"gpu": "GPU"},
        "rows": [
            {"model": "70B", "layers": 4, "tp": 2, "side": side, "mode": "fuse", "batch": batch, "tokens": n, "speedup": batch * n}
            for batch in batches for n in tokens for side in sides
        ],
    }  # fmt: skip


def test_a_prefill_file_has_a_line_for_each_side():
    """Also where one of its numbers of tokens is 1."""
    lines = plot.sides(rows(tokens=(1, 4, 16), batches=(1,)))
    points = [(1, 1), (4, 4), (16, 16)]
    assert lines == {"Inductor, NCCL": ("inductor", 0, points), "auto": ("auto", 0, points)}


def test_a_prefill_file_of_several_batch_sizes_has_a_line_for_each():
    lines = plot.sides(rows(tokens=(4, 16), batches=(1, 4), sides=("auto",)))
    assert lines == {"auto, batch 1": ("auto", 0, [(4, 4), (16, 16)]), "auto, batch 4": ("auto", 1, [(16, 16), (64, 64)])}


def test_a_decode_file_has_a_line_over_its_batch_sizes():
    lines = plot.sides(rows(tokens=(1,), batches=(1, 4, 16), sides=("auto",)))
    assert lines == {"auto": ("auto", 0, [(1, 1), (4, 4), (16, 16)])}


SPEEDUPS = [path.stem for path in sorted((BENCHMARKS / "results").glob("*.json")) if path.stem.startswith(("prefill", "decode"))]


@pytest.mark.parametrize("name", SPEEDUPS)
def test_committed_files_have_a_line_for_each_side(name):
    """A prefill file has one batch size."""
    result = committed(name)
    assert len(plot.sides(result)) == len({row["side"] for row in result["rows"]})


def test_the_overview_has_a_panel_for_each_number_of_ranks():
    names = [f"prefill-{model}-tp{ranks}" for model in ("70B", "8B") for ranks in (2, 4)]
    panels = plot.panels(list(map(committed, names)))
    assert {ranks: [model for model, *_ in lines] for ranks, lines in panels.items()} == {4: ["8B", "70B"], 2: ["8B", "70B"]}
    (_, auto, bound), _ = panels[4]
    assert auto[0] == (1, 1.251, False) and auto[-1] == (32768, 1.321, True)
    assert bound[0] == (1, 1.36)


@pytest.mark.parametrize("name", [path.stem for path in sorted((BENCHMARKS / "results").glob("*.svg"))])
def test_committed_plots_are_drawn_from_the_committed_results(name, tmp_path, monkeypatch):
    """The version of matplotlib changes the file, so that only its texts are compared: they are comments in it."""
    pytest.importorskip("matplotlib")
    names = [f"prefill-{model}-tp{ranks}" for model in ("8B", "70B") for ranks in (2, 4)] if name == "overview" else [name]
    paths = [tmp_path / f"{n}.json" for n in names]
    for path in paths:
        path.write_text(json.dumps(committed(path.stem)))
    options = ["--overview"] if name == "overview" else []
    monkeypatch.setattr(sys, "argv", ["plot.py", *options, *map(str, paths)])
    plot.main()
    drawn, kept = ((folder / f"{name}.svg").read_text() for folder in (tmp_path, BENCHMARKS / "results"))
    assert texts(drawn) == texts(kept)


def texts(svg):
    return [line.strip() for line in svg.splitlines() if line.strip().startswith("<!--")]
