"""Models of 8 bits on one GPU: one process plays two ranks, as in test_kernel_gpu.py. The graphs are compiled by Inductor."""

import functools
import itertools

import pytest
import torch
from graphs import OPS, rewrite, trace_with_inputs
from quantised import FP8
from sites import all_reduce, hf_norm
from test_kernel_gpu import BF16, Ranks, reserve_memory
from torch._inductor.compile_fx import compile_fx_inner
from torch.fx import GraphModule
from torch.profiler import ProfilerActivity, profile
from workspace import Workspace

from tw_compile import ops
from tw_compile.ops import direct, lowering
from tw_compile.quantise import GROUP
from tw_compile.site import Site
from tw_compile.transports.symmetric import nvrtc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(nvrtc.missing() is not None, reason=f"no NVRTC: {nvrtc.missing()}"),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no 8-bit floats"),
    pytest.mark.usefixtures("world"),
]

HIDDEN, INNER, ROWS, LAYERS, RANKS, CTAS = 512, 768, 1024, 2, 2, 4


def quantised(x, dtype, most):
    scale = (x.abs().amax(-1, keepdim=True).float() + 1e-6) / most
    x = x.float() / scale
    return (x.round().clamp(-most, most) if dtype is torch.int8 else x).to(dtype), scale


def fp8(x, weight, scale):
    rows, own = quantised(x, FP8, 448.0)
    return torch._scaled_mm(rows, weight.t(), own, scale.t(), out_dtype=BF16)


def int8(x, weight, scale):
    rows, own = quantised(x, torch.int8, 127.0)
    return (torch._int_mm(rows, weight.t()).float() * own * scale.t()).to(BF16)


def fp8_groups(x, weight, scale):
    """A GEMM in 16 bits behind it, as one of groups needs CUDA 12.9."""
    groups = x.reshape(-1, x.shape[-1] // GROUP, GROUP)
    own = groups.abs().amax(-1, keepdim=True).float().clamp_min(1e-4) / 448.0
    q = (groups.float() / own).to(FP8)
    return (q.float() * own).to(BF16).view(x.shape) @ (weight.float() * scale).to(BF16).t()


def model(linear, x, residual, norm_weight, *weights):
    weights = iter(weights)
    for _ in range(LAYERS):
        residual = residual + all_reduce(x)
        norm = hf_norm(residual, norm_weight)
        x = linear(torch.nn.functional.silu(linear(norm, next(weights), next(weights))), next(weights), next(weights))
    return (hf_norm(residual + all_reduce(x), norm_weight),)


def inputs(dtype, most):
    draw = lambda *shape: torch.randn(*shape, device="cuda").to(BF16)  # noqa: E731
    weights = [quantised(draw(*shape), dtype, most) for _ in range(LAYERS) for shape in ((INNER, HIDDEN), (HIDDEN, INNER))]
    return [draw(ROWS, HIDDEN), draw(ROWS, HIDDEN), draw(HIDDEN), *(tensor for pair in weights for tensor in pair)]


def use(monkeypatch, functions):
    for name, function in functions.items():
        monkeypatch.setattr(direct, name, function)


def over(group):
    """The ops over the rank whose code runs: ``group.here``."""

    def rank():
        return group.ranks[group.here]

    def partials(shape, dtype, device, slot, *where):
        return rank().partials(slot, dtype, torch.Size(shape))

    def start(site, *where):
        return rank().start(Site._make(site)._replace(ctas=CTAS))

    def wait(x, slot, in_workspace, *where):
        return rank().wait(slot, in_workspace)

    def fused(site, in_workspace, *where):
        return rank().fused(Site._make(site)._replace(ctas=CTAS), in_workspace)

    return {"partials": partials, "start": start, "wait": wait, "fused": fused}


@pytest.mark.parametrize("mode", ["fuse", "weave"])
@pytest.mark.parametrize("linear, dtype, most, op, output", [
    (fp8, FP8, 448.0, ops.scaled_linear, "fp8"), (int8, torch.int8, 127.0, ops.placed, "int8"),
    (fp8_groups, FP8, 448.0, ops.linear, "fp8_128"),
])  # fmt: skip
def test_nothing_is_copied_between_gemm_and_kernel(monkeypatch, linear, dtype, most, op, output, mode):
    given = inputs(dtype, most)
    new = rewrite(functools.partial(model, linear), *given, symmetric=True, mode=mode, split=ROWS // 2, by=trace_with_inputs)
    halves = 2 if mode == "weave" else 1
    assert new.count(op) == LAYERS * halves
    name = {"fp8": "FP8 per token", "int8": "INT8 per token", "fp8_128": "FP8 per group of 128"}[output]
    assert [site.output for site in new.report.sites] == [*[name] * LAYERS, ""]
    wanted = new.expected()[0]
    lowering.register()
    fakes = [node.meta["val"] for node in new.after.nodes if node.op == "placeholder"]
    run = compile_fx_inner(GraphModule(new.after.owning_module, new.after), fakes)

    # Inductor benchmarks its kernels in the first run, and must not wait there for a kernel that waits for the other rank.
    workspace = Workspace("cuda", ROWS * HIDDEN)
    with monkeypatch.context() as patch:
        use(patch, {name: getattr(workspace, name) for name in (*OPS, "partials")})
        for _ in range(2):
            run(list(given))
    torch.cuda.synchronize()

    reserve_memory()
    group = Ranks(RANKS)
    for slot, kind in itertools.product((0, 1) if mode == "weave" else (2,), ("", output)):
        group.workspaces(BF16, HIDDEN, ROWS // halves, slot, output=kind)
    use(monkeypatch, over(group))

    def step(transport, rank):
        with transport.call():
            return run(list(given))[0]

    group.each(step)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        results = group.each(step)
        torch.cuda.synchronize()
    for result in results:
        error = (result.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < 0.1, f"relative error {error}"  # a value may be quantised to the neighbouring number
    kernels = [event.name for event in prof.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    compiled = [name for name in kernels if name.startswith("triton")]
    others = [name for name in kernels if name not in compiled]
    # The first x is an input of the graph, and the last norm a result.
    copies = [name for name in others if "copy" in name.lower() or "memcpy" in name.lower()]
    assert len(copies) <= 2 * halves * RANKS < len(kernels), copies
    if op is ops.linear:
        return  # how many kernels Inductor makes of the dequantised values is not the matter
    # In front of the second GEMM of a layer one kernel that quantises, as the site does it for the first one; of int8 one more that scales
    # the product and writes where the site reads.
    most_compiled = LAYERS * halves * RANKS * (2 if op is ops.placed else 1)
    assert len(compiled) <= most_compiled + RANKS * halves, compiled  # at the ends: halves of what comes in, one result of two halves
