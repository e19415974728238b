"""The wire in 8 or 4 bits: its format, and what it does to values."""

import os
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline
from hypothesis import given, settings
from hypothesis import strategies as st

from tw_compile.site import Site, all_reduce_add_norm
from tw_compile.transports.low_bit import codec

WIDTHS = 8, 4


def there_and_back(x, bits, rows=None):
    out = torch.empty_like(x)
    codec.unpack(codec.pack(x, rows or len(x), bits), out, bits)
    return out


def by_hand(x, bits):
    """The format in plain Python, value by value, in float64."""
    most, out = 2 ** (bits - 1) - 1, []
    for row in x.tolist():
        for begin in range(0, len(row), codec.GROUP[bits]):
            group = row[begin : begin + codec.GROUP[bits]]
            scale = torch.tensor(max(*map(abs, group), codec.LEAST) / most).bfloat16().item()
            out += [scale * max(-most, min(most, round(value / scale))) for value in group]
    return torch.tensor(out).view(x.shape)


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_are_those_of_the_format(bits):
    x = torch.randn(3, 256) * torch.tensor([[1e-3], [1.0], [3e5]])
    torch.testing.assert_close(there_and_back(x, bits), by_hand(x, bits), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), magnitude=st.floats(1e-25, 1e37), rows=st.integers(1, 4))
def test_the_error_of_a_group_is_a_part_of_its_largest_value(bits, seed, magnitude, rows):
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * magnitude
    errors = (there_and_back(x, bits) - x).unflatten(-1, (-1, codec.GROUP[bits])).abs().amax(-1)
    largest = x.unflatten(-1, (-1, codec.GROUP[bits])).abs().amax(-1)
    assert (errors <= largest / {8: 250, 4: 13.9}[bits]).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_does_not_depend_on_its_batch(bits):
    x = torch.randn(5, 256)
    assert torch.equal(codec.pack(x, 5, bits)[2], codec.pack(x[2:3], 1, bits)[0])


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_the_codecs_of_others_lose(bits):
    """Zero rows, one spike in a group, values beyond float16, blocks of tiny values, and those that even float32 hardly has."""
    zero, spike, tiny = torch.zeros(1, 128), torch.full((1, 128), 1e-3), torch.randn(1, 128) * 1e-4
    assert torch.equal(there_and_back(zero, bits), zero)
    spike[0, 40] = 333_824.0
    back = there_and_back(spike, bits)
    assert abs(back[0, 40] / 333_824.0 - 1) < 0.005 and (back[0, :32] != 0).all() == (bits == 4), "its group alone loses small values"
    assert ((there_and_back(tiny, bits) - tiny).norm() / tiny.norm()) < (0.15 if bits == 4 else 0.01)
    assert torch.equal(there_and_back(torch.full((1, 128), 1e-38), bits), zero)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_stays_so(bits, bad):
    x = torch.ones(2, 256)
    x[1, 130] = bad
    back = there_and_back(x, bits)
    group = slice(128, 128 + codec.GROUP[bits])
    assert back[1, group].isnan().all(), "the whole group"
    back[1, group] = 1
    torch.testing.assert_close(back, torch.ones(2, 256), rtol=0.005, atol=0)


def test_the_format():
    """The first bytes of the values, and the scales in bytes."""
    packed = {bits: codec.pack(torch.arange(-64.0, 64.0).view(1, 128), 1, bits)[0].tolist() for bits in WIDTHS}
    assert_expected_inline("\n".join(f"{bits}: {len(p)}, {p[:12]}, {p[16 * bits : 16 * bits + 10]}" for bits, p in packed.items()), """\
8: 144, [129, 131, 133, 135, 137, 139, 141, 143, 145, 147, 149, 151], [1, 63, 0, 0, 0, 0, 0, 0, 0, 0]
4: 80, [9, 9, 9, 25, 25, 26, 26, 42, 42, 42, 42, 42], [18, 65, 146, 64, 142, 64, 16, 65, 0, 0]""")


@pytest.mark.parametrize("trips", codec.TRIPS.values())
@pytest.mark.parametrize("tokens", (1, 2, 5, 9))
def test_reduce_is_the_site_of_its_rows(trips, tokens):
    """Each owner's rows, as all_reduce_add_norm computes them of what arrives."""
    world, hidden = 3, 256
    rows = -(-tokens // world)
    xs = [torch.randn(tokens, hidden) for _ in range(world)]
    residual, weight, bias, shift = torch.randn(tokens, hidden), torch.randn(hidden), torch.randn(hidden), torch.randn(hidden)
    packed = [codec.pack(x, world * rows, trips[0]).view(world, rows, -1) for x in xs]
    numerics = weight, bias, shift, 1e-5, 0.5, 1.0, True
    norms = torch.empty(world * rows, codec.row_bytes(hidden, trips[1]), dtype=torch.uint8)
    got, wanted, residuals = torch.empty(tokens, hidden), torch.empty(tokens, hidden), torch.empty(world * rows, hidden)
    for own in range(world):
        mine = slice(own * rows, min((own + 1) * rows, tokens))
        received = torch.stack([p[own] for p in packed])
        norms[own * rows : (own + 1) * rows] = codec.reduce(received, own, Site(xs[own], residual, *numerics), residuals, trips)
        arrived = [x[mine] if rank == own else there_and_back(x, trips[0])[mine] for rank, x in enumerate(xs)]
        if len(arrived[0]):
            wanted[mine], right = all_reduce_add_norm(arrived, residual[mine], *numerics)
            assert torch.equal(residuals[mine], right), "the residual is not quantised"
    codec.unpack(norms, got, trips[1])
    torch.testing.assert_close(got, there_and_back(wanted, trips[1]), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_sent():
    assert [codec.refusal(torch.float32, 128, bits) == "" for bits in (8, 6, 4)] == [True, False, False]
    assert codec.refusal(torch.bfloat16, 4096, 4) == ""
    assert codec.refusal(torch.bfloat16, 192, 8) == "a hidden size of 192 is not a multiple of 128"


# --- the kernels ------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from tw_compile.transports.low_bit import codec, kernels
from tw_compile.site import Site
device = {device!r}
torch.manual_seed(0)
for hidden in {hidden}:
    x = (torch.randn(5, hidden) * torch.tensor([[0.0], [1e-8], [1.0], [70000.0], [1e30]])).bfloat16()
    x[2, 7], x[2, 70], x[2, hidden - 1] = float("nan"), float("inf"), -float("inf")
    for bits in (8, 4):
        ours, right = kernels.pack(x.to(device), 7, bits).cpu(), codec.pack(x, 7, bits)
        end = hidden * bits // 8 + hidden // codec.GROUP[bits] * 2
        assert torch.equal(ours[:, :end], right[:, :end]), (hidden, bits, (ours != right).nonzero())
        dtype = torch.float32 if device == "cpu" else torch.bfloat16  # Triton's interpreter truncates to bfloat16
        out, wanted = torch.empty(5, hidden, dtype=dtype, device=device), torch.empty(5, hidden, dtype=dtype)
        kernels.unpack(right.to(device), out, bits), codec.unpack(right, wanted, bits)
        torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    residual = torch.randn(5, hidden).bfloat16()
    for dtype, center, trips in ((torch.bfloat16, False, (8, 8)), (torch.bfloat16, True, (4, 8)), (torch.float32, True, (4, 4))):
        x, weight, bias, shift = torch.randn(5, hidden).to(dtype), torch.randn(hidden), torch.randn(hidden).to(dtype), torch.randn(hidden)
        sites = Site(x, residual.to(dtype), weight, bias, shift if center else None, 1e-5, 0.5, 1.0, center), Site(x, None, None)
        for site in sites:
            for own in (0, 1):
                received = torch.stack([codec.pack(torch.randn(3, hidden), 3, trips[0]) for _ in range(2)])
                count, news = min(3, 5 - 3 * own), [torch.zeros(6, hidden, dtype=torch.float32, device=d) for d in (device, "cpu")]
                there = Site(*(a.to(device) if isinstance(a, torch.Tensor) else a for a in site))
                ours = kernels.reduce(received.to(device), own, there, news[0], trips).cpu()[:count]
                right = codec.reduce(received, own, site, news[1], trips)[:count]
                torch.testing.assert_close(news[0].cpu(), news[1], rtol=1e-5, atol=1e-4)
                got, wanted = (torch.empty(count, hidden) for _ in range(2))
                codec.unpack(ours, got, trips[1]), codec.unpack(right, wanted, trips[1])
                step = wanted.abs().max() / (2 ** (trips[1] - 1) - 1)
                assert ((got - wanted).abs() > 1e-4).float().mean() < 0.01 and (got - wanted).abs().max() <= 1.1 * step, (hidden, trips)
print("the same")
"""


def compared(device, hidden):
    """Runs the comparison of kernels and codec in a process of its own, as Triton reads its environment when it is imported."""
    pytest.importorskip("triton")
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    script = SCRIPT.format(device=device, hidden=hidden)
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)


def test_the_kernels_in_tritons_interpreter():
    done = compared("cpu", (384,))
    assert done.stdout == "the same\n", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_on_a_gpu():
    done = compared("cuda", (128, 384, 4096, 5120, 8192, 16384))
    assert done.stdout == "the same\n", done.stderr
