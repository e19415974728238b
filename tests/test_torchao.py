"""Quantised Llamas on real ranks: examples/llama.py with --fp8, and torchao's configurations on it and through Hugging Face.

An error is against the model with its dequantised weights in float64, and beside it that of eager PyTorch. TW_FULL=1 runs all of them.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import zoo
from graphs import without_codegen
from zoo import distance

import tw_compile
from tw_compile import backend

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import llama

LAYERS, TOKENS = 2, 48
FULL = bool(os.environ.get("TW_FULL"))
ONE_SCALE = "not woven: a quantisation has one scale for all tokens"


@dataclass(frozen=True)
class Kind:
    """A way to quantise a model.

    config:    the configuration of torchao; '' for that of the example
    per:       its granularity; '' for none
    output:    how the sites quantise their norms, but for the last one, which no quantised linear reads
    not_woven: the beginning of the reason why it is fused, or ''
    """

    config: str = ""
    per: str = ""
    output: str = ""
    not_woven: str = ""

    def made(self):
        if self.config == INT4:
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            return PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
        import torchao.quantization as torchao

        return getattr(torchao, self.config)(**({"granularity": getattr(torchao, self.per)()} if self.per else {}))

    def quantise(self, model):
        if not self.config:
            return llama.quantise(model)
        from torchao.quantization import quantize_

        quantize_(model, self.made(), lambda module, path: isinstance(module, torch.nn.Linear) and path.startswith("layers"))
        return model


FP8, INT8 = "Float8DynamicActivationFloat8WeightConfig", "Int8DynamicActivationInt8WeightConfig"
INT4 = "PrototypeInt4WeightOnlyConfig"  # that of torchao for CPUs
KINDS = {
    "fp8": Kind(output="FP8 per token"),
    "torchao int8 dynamic": Kind(INT8, output="INT8 per token"),
    "torchao int8 weight-only": Kind("Int8WeightOnlyConfig"),
    "torchao int4 weight-only": Kind(INT4),
    "torchao fp8 per row": Kind(FP8, "PerRow", "FP8 per token"),
    "torchao fp8 per tensor": Kind(FP8, "PerTensor", not_woven=ONE_SCALE),
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


def dequantised(module, name):
    weight = getattr(module, name).detach()
    if hasattr(module, "scale"):
        return weight.double() * module.scale
    if type(weight).__name__ == "Int4OpaqueTensor":  # has no dequantize
        return torch.nn.functional.linear(torch.eye(weight.shape[-1], dtype=torch.bfloat16), weight).t()
    return weight if type(weight) is torch.Tensor else weight.dequantize()


def copy_dequantised(model, double):
    """Give a model in float64 the dequantised weights of another one on this rank."""
    modules = dict(model.named_modules())
    for path, module in double.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data.copy_(dequantised(modules[path], name))
    return double


def on_cpus(kind):
    """torchao looks at the GPU before it quantises to FP8, and not at what CPUs can do."""
    if KINDS[kind].config == FP8:
        import torchao.quantization.quant_api as api

        return mock.patch.multiple(api, _check_hardware_support=lambda *_: None, is_sm_at_least_89=lambda: True)
    return mock.patch.dict({})


def compared(model, forward, exact) -> Outcome:
    """forward: a model -> its result; exact: that in float64"""
    torch._dynamo.reset()
    before = len(tw_compile.reports())
    with torch.no_grad(), without_codegen():
        eager = forward(model)
        fullgraph = torch.__version__ >= "2.13"  # before, Dynamo does not trace the all-gather of the logits in examples/llama.py
        out = forward(torch.compile(model, backend=backend.tokenweave, fullgraph=fullgraph, options={"tokenweave.min_tokens": 2}))
    (report,) = tw_compile.reports()[before:]
    return Outcome(report, distance(out, eager), distance(out, exact), distance(eager, exact))


def by_hand(kind) -> Outcome:
    """On a rank: examples/llama.py."""
    with on_cpus(kind):
        model = KINDS[kind].quantise(build(torch.bfloat16))
        ids = torch.randint(0, 1024, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            exact = copy_dequantised(model, build(torch.float64))(ids)[0]
        return compared(model, lambda model: model(ids)[0], exact)


def through_hugging_face(kind, path) -> Outcome:
    """On a rank: a checkpoint of transformers, quantised where it is loaded. The float64 is of the weights as they are in the file."""
    import transformers

    with on_cpus(kind):
        quantised = transformers.TorchAoConfig(KINDS[kind].made())
        model = zoo.load(path, torch.bfloat16, quantization_config=quantised)
        ids = torch.randint(3, zoo.VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            exact = zoo.load(path, torch.float64, parallel=False)(ids, use_cache=False).logits
        return compared(model, lambda model: model(ids, use_cache=False).logits, exact)


def check(kind, outcomes):
    """All of it is woven, or fused with the reason, and nothing runs whole. The error is eager's, but for values between two numbers."""
    first, second = outcomes
    assert first.report == second.report
    assert (first.report.mode, first.report.joins) == ("fuse" if KINDS[kind].not_woven else "weave", [])
    assert len(first.report.sites) == 1 + 2 * LAYERS and not first.report.refusals
    assert [site.output for site in first.report.sites] == [KINDS[kind].output] * 2 * LAYERS + [""]
    assert any(reason.startswith(KINDS[kind].not_woven) for reason in first.report.reasons)
    assert first.error <= 1.05 * first.eager_error


@pytest.mark.parametrize("kind", KINDS if FULL else ["torchao int8 dynamic"])
def test_a_quantised_llama(ranks, kind):
    if KINDS[kind].config:
        pytest.importorskip("torchao.prototype.quantization.int4" if KINDS[kind].config == INT4 else "torchao")
    if "fp8" in kind and torch.__version__ < "2.12":
        pytest.skip("the CPU kernel of this version of torch has no scales for rows")
    check(kind, ranks(by_hand, kind))


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].config])
def test_a_llama_that_hugging_face_quantises(ranks, kind, tmp_path):
    pytest.importorskip("torchao.prototype.quantization.int4" if KINDS[kind].config == INT4 else "torchao")
    pytest.importorskip("transformers")
    check(kind, ranks(through_hugging_face, kind, zoo.make("Llama", tmp_path)))
