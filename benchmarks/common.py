"""The common part of the benchmarks of whole models: the sides, their measurements, and the result files.

A result file has one row for each size and side, with

    model, layers, tp, batch, tokens   the size. tokens: tokens of each sequence
    quant                              how the linear layers are quantised: see quantisation.py; "none" for 16 bits
    link                               of prefill.py: the fastest link that NCCL may use
    high_priority, nccl_ctas           of prefill.py: whether NCCL's streams have a high priority, and the most CTAs of its kernels; only
                                       where they are set
    wire                               bits of a value over the process group
    side, mode                         mode: the mode in force for a tokenweave side, from its report
    speedup, vs_nocomm                 time of the side inductor, and of no-comm, divided by the time of this side
    ms                                 time of a forward pass: the median over samples of the slowest rank
    cuda_graphs
    peak_gb                            the most memory that the allocator holds during a pass, less what it held before
    workspace_gb                       symmetric memory that a pass uses, and that stays allocated
"""

import functools
import gc
import math

import result_file
import timing
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import variants
from variants import llama

import tw_compile
from tw_compile.options import parse
from tw_compile.site import SLOT_WHOLE
from tw_compile.transports import choose

# All sides compile the same functions, each for small and for large sizes.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True

# --- sides -----------------------------------------------------------------------------------------------------------

# name -> backend, options, what is made of the model
SIDES: dict[str, tuple] = {
    "eager": (None, {}, None),
    "inductor": ("inductor", {}, None),
    "inductor-symm": ("inductor", {}, variants.with_symmetric_rows),
    "fuse": ("tokenweave", {"tokenweave.mode": "fuse"}, None),
    "weave": ("tokenweave", {"tokenweave.mode": "weave"}, None),
    "auto": ("tokenweave", {"tokenweave.cuda_graphs": True}, None),  # captured below
    "no-comm": ("inductor", {}, variants.without_all_reduces),
}


def waited(model):
    """The model in eager mode, with all collectives waited for: a CUDA graph cannot be captured with one that is not."""

    def run(*inputs):
        return [out.wait() if isinstance(out, funcol.AsyncCollectiveTensor) else out for out in model(*inputs)]

    return run


class Side:
    """A model under one of SIDES. It must be called with sizes in ascending order: see ``mode``.

    options: further ones of tokenweave's
    wire:    bits of a value over the process group, of tokenweave's sides
    """

    def __init__(self, name, model, dynamic=True, options=None, wire=16):
        backend, of_side, change = SIDES[name]
        options = of_side | ((options or {}) | {"tokenweave.wire": wire} if backend == "tokenweave" else {})
        self.label, self.wire = (name if wire == 16 else f"{name}, {wire} bits"), wire
        model = change(model) if change else model
        self.name, self.transport_and_wire = name, parse(options)[0].transport_and_wire
        self.run = torch.compile(model, backend=backend, options=options, dynamic=dynamic) if backend else waited(model)
        # The mode of the newest graph. Its guards are lower bounds of the tokens, so that larger sizes run this graph.
        self.mode = None

    def warm_up(self, *inputs):
        """Compile for the inputs. Returns {"peak_gb": ..., "workspace_gb": ...}; {} on the CPU."""
        before = len(tw_compile.reports())
        self.run(*inputs)
        for report in tw_compile.reports()[before:]:
            llama.say(f"{self.label}: {report}")
            self.mode = report.mode
        device = inputs[0].device
        if device.type == "cpu":
            self.run(*inputs)
            return {}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        self.run(*inputs)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        return {"peak_gb": round(peak / 1e9, 3), "workspace_gb": round(self._workspace_bytes(device) / 1e9, 3)}

    def _workspace_bytes(self, device):
        if self.name == "inductor-symm":
            return max(buffer.nbytes for buffer in variants.buffers.values())
        if self.mode not in ("fuse", "weave"):
            return 0
        transport, _ = choose.choose(self.transport_and_wire, dist.group.WORLD.group_name, device)
        largest = dict.fromkeys((0, 1) if self.mode == "weave" else (SLOT_WHOLE,), 0)
        for (slot, *_), workspace in getattr(transport, "_workspaces", {}).items():
            if slot in largest:
                largest[slot] = max(largest[slot], workspace.bytes)
        return sum(largest.values())


# --- measurements ----------------------------------------------------------------------------------------------------


def measure(sides, inputs, samples):
    """label of a side -> its figures on the inputs: side, wire, ms, mode and memory."""
    device = inputs[0].device
    memory = {side.label: side.warm_up(*inputs) for side in sides}
    runs = {side.label: timing.recorded(functools.partial(side.run, *inputs), device) for side in sides}
    times = timing.median_times(runs, device, samples, calls=4 if inputs[0].numel() <= 4096 else 1)
    del runs  # the CUDA graphs, and their memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        side.label: {"side": side.name, "wire": side.wire, "ms": times[side.label] * 1e3}
        | ({"mode": side.mode} if side.mode else {})
        | memory[side.label]
        for side in sides
    }


# --- results ---------------------------------------------------------------------------------------------------------


def rows(size, measured, device):
    """The rows of a result file. size: model, layers, batch and tokens; measured: the result of ``measure``"""
    for figures in measured.values():
        ratios = {
            field: round(measured[other]["ms"] / figures["ms"], 3)
            for field, other in (("speedup", "inductor"), ("vs_nocomm", "no-comm"))
            if other in measured
        }
        figures = {**figures, "ms": round(figures["ms"], 4)}
        yield {**size, "tp": dist.get_world_size(), **ratios, "cuda_graphs": device.type == "cuda", **figures}


def write(name, device, note, rows):
    """Write results/<name>.json, with the transports that are used."""
    transports = sorted({report.transport for report in tw_compile.reports() if report.transport})
    result_file.write(name, device, note, rows, transport=transports)


def show(size, measured):
    """Print one line: the speed-up of each side over Inductor."""
    inductor = measured.get("inductor", {}).get("ms", math.nan)
    cells = [f"{side} {inductor / figures['ms']:.2f}× ({figures['ms']:.3f} ms)" for side, figures in measured.items()]
    llama.say(f"{size['batch']:3} × {size['tokens']:<6}", "  ".join(cells))
