"""The Triton kernel of add and norm, compared with ``site.add_norm``."""

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
import itertools
import torch
from tw_compile.site import WITHOUT_NORM, Site, add_norm
from tw_compile.transports import norm_kernel
device, dtypes = {device!r}, {dtypes}
torch.manual_seed(0)
draw = lambda *shape: torch.randn(*shape)
for hidden, dtype, wide, how in itertools.product({hidden}, dtypes, (False, True), ("bare", "residual", "all", "center", "sum")):
    total, residual, weight, bias, shift = draw(2, 3, hidden).to(dtype), draw(6, hidden), draw(hidden), draw(hidden), draw(hidden)
    site = {{
        "bare": Site(total), "residual": Site(total, residual.to(dtype), weight.to(dtype)),
        "all": Site(total, residual, weight, bias.to(dtype), None, 1e-6, 0.5, 1.0),
        "center": Site(total, residual, weight, bias, shift, center=True), "sum": Site(total, residual, eps=WITHOUT_NORM),
    }}[how]
    there = Site(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in site))
    norm, new = torch.empty_like(there.x), torch.empty_like(there.x, dtype=torch.float32 if wide else dtype)
    norm_kernel.add_norm(there.x, there.addends, norm, new)
    old = None if site.residual is None else site.residual.view_as(total)
    right = add_norm(total, old, *site.addends[1:])
    for got, wanted in zip((norm, new), right):
        tolerance = {{torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}}[got.dtype]
        torch.testing.assert_close(got.cpu().float(), wanted, rtol=tolerance, atol=tolerance)
empty = torch.empty(0, 128, device=device)
norm_kernel.add_norm(empty, Site(empty).addends, empty, empty)
print("the same")
"""


def compared(device, hidden, dtypes):
    """Runs the comparison in a process of its own, as Triton reads its environment when it is imported."""
    pytest.importorskip("triton")
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    script = SCRIPT.format(device=device, hidden=hidden, dtypes=dtypes)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "the same\n", done.stderr


def test_in_tritons_interpreter():
    compared("cpu", (16, 200), "(torch.float32, torch.float16)")  # the interpreter truncates to bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    compared("cuda", (128, 1000, 4096, 5120, 8192, 16384), "(torch.float32, torch.float16, torch.bfloat16)")
