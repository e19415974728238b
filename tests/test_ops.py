"""The ops: what PyTorch expects of an op, and that every way to call one computes what the specification says."""

import pytest
import torch
import torch.distributed as dist
from sites import H, values

from tw_compile import ops
from tw_compile.site import add_norm, all_reduce_add_norm
from tw_compile.transports import choose
from tw_compile.transports.process_group import ProcessGroup

EPS = 1e-5


def site(x, residual=None, weight=None, bias=None, scale=1.0, offset=0.0, shift=None, center=False):
    return x, residual, weight, bias, shift, EPS, scale, offset, center


def where():
    return dist.group.WORLD.group_name, "process_group"


def start(inputs, slot=0, fp32_residual=False, quantise=("", None)):
    """What ``start`` takes of a site with these inputs."""
    return *inputs, 0, slot, 0, fp32_residual, False, *quantise, *where()


def wait(token, inputs, slot=0, fp32_residual=False, quantise=("", None)):
    return token, *inputs[:5], None, slot, fp32_residual, False, False, *quantise, *where()


def fused(inputs, slot=0, fp32_residual=False, quantise=("", None)):
    return *inputs, 0, slot, 0, fp32_residual, False, *quantise, False, *where()


SITES = {
    "residual and weight": lambda d: site(values(6, H, dtype=d), values(6, H, dtype=d), values(H, dtype=d)),
    "nothing but x": lambda d: site(values(6, H, dtype=d)),
    "bias, factor and offset": lambda d: site(
        *(values(2, 3, H, dtype=d) for _ in range(2)), values(H, dtype=d), values(H, dtype=d), 0.5, 1.0
    ),
    "weight in float32": lambda d: site(values(6, H, dtype=d), values(6, H, dtype=d), values(H)),
    "not contiguous": lambda d: site(values(H, 6, dtype=d).t(), values(H, 6, dtype=d).t(), values(H, dtype=d)),
    "layer norm": lambda d: site(values(6, H, dtype=d), None, values(H, dtype=d), shift=values(H, dtype=d), center=True),
    "layer norm and all": lambda d: site(
        *(values(6, H, dtype=d) for _ in range(2)), values(H), values(H, dtype=d), 0.5, 1.0, values(H), True
    ),
    "layer norm of x alone": lambda d: site(values(6, H, dtype=d), center=True),
    "no tokens": lambda d: site(values(0, H, dtype=d), values(0, H, dtype=d), values(H, dtype=d)),
}
every_site = pytest.mark.parametrize("inputs", SITES.values(), ids=SITES)
either_residual = pytest.mark.parametrize("fp32_residual", [False, True], ids=["rounded", "fp32_residual"])
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


# --- what PyTorch expects --------------------------------------------------------------------------------------------


class Repeatable(dict):
    """What a slot has pending, for as many waits as a checker wants."""

    pop = dict.__getitem__


@pytest.fixture
def transport(world):
    chosen, _ = choose.choose("process_group", world.group_name, torch.device("cpu"))
    chosen.pending = Repeatable()
    return chosen


@every_site
@either_residual
def test_opcheck_fused(transport, inputs, fp32_residual):
    torch.library.opcheck(ops.fused, fused(inputs(torch.bfloat16), fp32_residual=fp32_residual))


@every_site
def test_opcheck_start(transport, inputs):
    torch.library.opcheck(ops.start, start(inputs(torch.bfloat16)))


@every_site
@either_residual
def test_opcheck_wait(transport, inputs, fp32_residual):
    given = inputs(torch.bfloat16)
    token = ops.start(*start(given, fp32_residual=fp32_residual))
    torch.library.opcheck(ops.wait, wait(token, given, fp32_residual=fp32_residual))


@pytest.mark.parametrize("quantise", [
    ("fp8 1 divide 1 0.0 0.0 448.0 0.0 -448.0 448.0 0.0 0 0", None),
    ("int8 0 multiply 0 0.0 0.0 1.0 0.0 -128.0 127.0 0.0 0 1", torch.tensor(20.0)),
], ids=str)  # fmt: skip
def test_opcheck_of_a_norm_that_is_quantised(transport, quantise):
    given = SITES["bias, factor and offset"](torch.bfloat16)
    torch.library.opcheck(ops.fused, fused(given, quantise=quantise))
    token = ops.start(*start(given, quantise=quantise))
    torch.library.opcheck(ops.wait, wait(token, given, quantise=quantise))


@pytest.mark.parametrize("bias", [None, torch.randn(5), torch.randn(6, 5)], ids=["no bias", "bias", "onto"])
def test_opcheck_linear(transport, bias):
    torch.library.opcheck(ops.linear, (values(6, H), values(H, 5), bias, 0, *where()))


def test_opcheck_of_ops_that_write_in_the_workspace(transport):
    torch.library.opcheck(ops.placed, (values(2, 3, H).transpose(0, 1), 0, *where()))
    a, b, one = values(16, H).to(torch.float8_e4m3fn), values(32, H).to(torch.float8_e4m3fn).t(), torch.ones(())
    scaled = a, b, one, one, None, None, torch.bfloat16, False
    torch.library.opcheck(ops.scaled_linear, (*scaled, 0, *where()), test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))
    assert torch.equal(ops.scaled_linear(*scaled, 0, *where()), torch.ops.aten._scaled_mm(*scaled))
    assert ops.scaled_linear(a[:0], *scaled[1:], 0, *where()).shape == (0, 32)


@pytest.mark.parametrize("op", [ops.linear, ops.start, ops.wait, ops.fused], ids=str)
def test_ops_take_buffers_as_they_are(op):
    """Without this tag Inductor copies a pointwise value for each op that takes it."""
    assert torch.Tag.flexible_layout in op.tags


EVERY = ops.linear, ops.scaled_linear, ops.scaled_linear_v2, ops.placed, ops.partials, ops.start, ops.wait, ops.fused


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_ops_promise_no_aliases_and_no_mutation(op):
    assert not op._schema.is_mutable
    assert all(a.alias_info is None for a in [*op._schema.arguments, *op._schema.returns])


# --- the specification -----------------------------------------------------------------------------------------------


def exact(total, residual, weight, bias, shift, eps, scale, offset, center):
    """In float64, by the book."""
    r = total.double()
    r = (r if bias is None else r + bias.double()) * scale
    r = r if residual is None else r + residual.double()
    row = r - r.mean(-1, keepdim=True) if center else r
    norm = row / (row.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    norm = norm if weight is None else norm * (weight.double() + offset)
    return norm if shift is None else norm + shift.double(), r


def same_in_float32(actual, expected):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@every_dtype
@every_site
def test_the_reference_is_exact_in_float32(inputs, dtype):
    given = inputs(dtype)
    norm, r = add_norm(*given)
    assert norm.shape == r.shape == given[0].shape
    for actual, expected in zip((norm, r), exact(*given)):
        same_in_float32(actual, expected)


@every_dtype
def test_the_reference_of_a_whole_site_sums_in_float32(dtype):
    partials = [values(6, H, dtype=dtype) for _ in range(8)]
    residual, weight = values(6, H, dtype=dtype), values(H, dtype=dtype)
    _, *rest = site(None, residual, weight)
    norm, r = all_reduce_add_norm(partials, *rest)
    expected = exact(sum(p.double() for p in partials), *rest)
    rounded = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(norm.double(), expected[0], rtol=rounded + 1e-5, atol=1e-5)
    same_in_float32(r, expected[1])


def test_the_reference_sums_in_rank_order():
    big, one = torch.full((1, 4), 2.0**24), torch.ones(1, 4)
    _, first = all_reduce_add_norm(*site([big, one, -big]))
    _, last = all_reduce_add_norm(*site([big, -big, one]))
    assert first[0, 0] == 0.0 and last[0, 0] == 1.0


# --- the process group, on two ranks ---------------------------------------------------------------------------------


def site_on_a_rank(name, dtype, fp32_residual):
    """(fused, start and wait, what every rank contributed and the rest of the inputs)"""
    torch.manual_seed(3)
    x, *rest = SITES[name](dtype)
    x = x * (dist.get_rank() + 1)
    before = x.clone()
    at_once = ops.fused(*fused((x, *rest), ops.SLOT_WHOLE, fp32_residual))
    token = ops.start(*start((x, *rest), fp32_residual=fp32_residual))
    waited = ops.wait(*wait(token, (x, *rest), fp32_residual=fp32_residual))
    assert torch.equal(x, before), "the inputs are left alone"
    return at_once, waited, x, rest


@every_dtype
@either_residual
@pytest.mark.parametrize("name", SITES)
def test_a_site_over_the_process_group(ranks, name, fp32_residual, dtype):
    results = ranks(site_on_a_rank, name, dtype, fp32_residual)
    partials = [x for _, _, x, _ in results]
    rest = results[0][3]
    expected = all_reduce_add_norm(partials, *rest)
    for at_once, waited, _, _ in results:
        assert (at_once[0].dtype, at_once[1].dtype) == (dtype, torch.float32 if fp32_residual else dtype)
        for actual, again, right in zip(at_once, waited, expected):
            assert torch.equal(actual, again), "start and wait give what fused gives"
            assert actual.is_contiguous()
            # The process group rounds the sum to the dtype, the specification does not.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(actual.float(), right.float(), rtol=4 * eps, atol=8 * eps)
    for one, other in zip(results[0][0], results[1][0]):
        assert torch.equal(one, other), "the ranks have the same bits"


def two_slots_under_way():
    a, b = torch.full((2, 4), 1.0), torch.full((2, 4), 3.0)
    first = ops.start(*start(site(a), 0))
    second = ops.start(*start(site(b), 1))
    _, total_b = ops.wait(*wait(second, site(b), 1))
    _, total_a = ops.wait(*wait(first, site(a), 0))
    return total_a, total_b


def test_both_slots_can_be_under_way_and_are_waited_for_in_any_order(ranks):
    for total_a, total_b in ranks(two_slots_under_way):
        assert total_a.unique() == 2.0 and total_b.unique() == 6.0


def test_linear_is_the_gemm(world):
    group = ProcessGroup(world.group_name, torch.device("cpu"))
    a, b, bias = values(6, H), values(H, 5), values(5)
    assert torch.equal(group.linear(a, b, None, 0), a @ b)
    assert torch.equal(group.linear(a, b, bias, 0), torch.addmm(bias, a, b))


# --- the choice of a transport ---------------------------------------------------------------------------------------


def test_auto_on_the_cpu_is_the_process_group_and_says_why(world):
    chosen, why_not = choose.choose("auto", world.group_name, torch.device("cpu"))
    assert isinstance(chosen, ProcessGroup)
    assert why_not.startswith("multimem: ") and "; peer: " in why_not


def test_a_group_has_one_transport(world):
    first, _ = choose.choose("auto", world.group_name, torch.device("cpu"))
    assert choose.choose("auto", world.group_name, torch.device("cpu"))[0] is first
