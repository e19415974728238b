"""Quantised Llamas on real ranks: examples/llama.py with --fp8, and torchao's configurations on it and through Hugging Face.

An error is against the model with its dequantised weights in float64, and beside it that of eager PyTorch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from graphs import without_codegen
from zoo import distance

import tw_compile
from tw_compile import backend

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import llama

LAYERS, TOKENS = 2, 48
ROWS_ON_CPUS = torch.__version__ >= "2.12"  # before, the CPU kernel of _scaled_mm has no scale for each row


def by_torchao(config):
    """A function that quantises a model as a configuration of torchao says: name of the configuration and its arguments."""

    def quantise(model):
        quantization = pytest.importorskip("torchao.quantization")
        name, arguments = config
        linears = lambda module, path: isinstance(module, torch.nn.Linear) and path.startswith("layers")  # noqa: E731
        quantization.quantize_(model, getattr(quantization, name)(**arguments(quantization)), filter_fn=linears)

    return quantise


KINDS = {
    "fp8": llama.quantise,
    "int8 weight-only": by_torchao(("Int8WeightOnlyConfig", lambda q: {})),
    "int8 dynamic": by_torchao(("Int8DynamicActivationInt8WeightConfig", lambda q: {})),
}


@dataclass
class Outcome:
    report: object
    difference: float  # of compiled and eager
    error: float
    eager_error: float


def build(dtype):
    with torch.device("meta"):
        model = llama.Llama(llama.SIZES["tiny"], dist.group.WORLD).to(dtype).eval().requires_grad_(False)
    llama.fill(model, llama.SIZES["tiny"], torch.device("cpu"), None)
    return model


def exact(model):
    """The same model in float64, with the dequantised weights."""
    double, modules = build(torch.float64), dict(model.named_modules())
    for path, module in double.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = getattr(modules[path], name).detach()
            if hasattr(modules[path], "scale"):
                weight = weight.double() * modules[path].scale
            elif type(weight) is not torch.Tensor:
                weight = weight.dequantize()
            parameter.data.copy_(weight)
    return double


def run(kind) -> Outcome:
    """On a rank."""
    torch._dynamo.reset()
    before = len(tw_compile.reports())
    model = build(torch.bfloat16)
    KINDS[kind](model)
    ids = torch.randint(0, 1024, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), without_codegen():
        right, eager = exact(model)(ids)[0], model(ids)[0]
        out = torch.compile(model, backend=backend.tokenweave, fullgraph=True, options={"tokenweave.min_tokens": 2})(ids)[0]
    (report,) = tw_compile.reports()[before:]
    return Outcome(report, distance(out, eager), distance(out, right), distance(eager, right))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if ROWS_ON_CPUS or kind != "fp8"])
def test_a_quantised_llama(ranks, kind):
    """All of it is woven, and nothing runs whole."""
    first, second = ranks(run, kind)
    assert first.report == second.report
    assert (first.report.mode, len(first.report.sites), first.report.joins) == ("weave", 1 + 2 * LAYERS, [])
    assert first.error <= 1.05 * first.eager_error
