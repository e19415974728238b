"""The examples of docs/models.md: an all-reduce and an op of one's own, made known to the backend."""

import importlib

import pytest
import torch
import torch.distributed as dist
from graphs import capture, rewrite
from sites import H, all_reduce, hf_norm, values

import tw_compile
from tw_compile import passes
from tw_compile.passes.find import Match


@pytest.fixture(autouse=True)
def registrations_end_with_the_test(world, monkeypatch):
    for module, registry in ("find", "_ALL_REDUCES"), ("rules.token_axis", "_RULES"):
        module = importlib.import_module(f"tw_compile.passes.{module}")
        monkeypatch.setattr(module, registry, dict(getattr(module, registry)))


# --- an all-reduce ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("tests_extending::my_all_reduce", mutates_args=())
def my_all_reduce(x: torch.Tensor, group: str) -> torch.Tensor:
    return all_reduce(x, group=group) + 0


@my_all_reduce.register_fake
def _(x, group):
    return torch.empty_like(x)


def reduced_by_it(x, residual, weight):
    return hf_norm(residual + my_all_reduce(x, dist.group.WORLD.group_name), weight)


def test_an_all_reduce_of_ones_own_is_a_site():
    tw_compile.register_all_reduce(
        torch.ops.tests_extending.my_all_reduce.default,
        lambda node: tw_compile.AllReduce(x=node.args[0], reduce_op="sum", group=node.args[1]),
    )
    (match,) = passes.find(capture(reduced_by_it, values(8, H), values(8, H), values(H)))
    assert isinstance(match, Match) and match.group == dist.group.WORLD.group_name


@pytest.mark.parametrize(
    "op, read, said",
    [
        (torch.ops.tests_extending.my_all_reduce, len, "takes an OpOverload, such as torch.ops.library.op.default, not <OpOverloadPacket"),
        (my_all_reduce, len, "takes an OpOverload, such as torch.ops.library.op.default, not "),
        (torch.ops.tests_extending.my_all_reduce.default, 3, "takes a function that returns an AllReduce, not 3"),
    ],
    ids=("packet", "function", "no function"),
)
def test_what_is_no_all_reduce(op, read, said):
    with pytest.raises(tw_compile.TokenWeaveError, match=f"^register_all_reduce {said}"):
        tw_compile.register_all_reduce(op, read)


def test_without_that_it_is_not():
    assert passes.find(capture(reduced_by_it, values(8, H), values(8, H), values(H))) == []


# --- an op -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("tests_extending::shift", mutates_args=())
def shift(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """x [..., tokens, H] with each token's row rotated by its own number of places."""
    columns = (torch.arange(x.shape[-1]) - by[..., None]) % x.shape[-1]
    return x.gather(-1, columns.expand(x.shape))


@shift.register_fake
def _(x, by):
    return torch.empty_like(x)


def shifted_between_two_sites(x, residual, weight, by):
    residual = residual + all_reduce(x)
    x = shift(hf_norm(residual, weight), by)
    return hf_norm(residual + all_reduce(x * 2), weight)


def shifting(tokens=8):
    inputs = values(1, tokens, H), values(1, tokens, H), values(H), torch.arange(tokens)[None]
    new = rewrite(shifted_between_two_sites, *inputs, mode="weave")
    new.check()
    return new.report


def test_an_op_without_a_rule_is_not_split():
    (unsplit,) = shifting().joins
    assert (unsplit.op, unsplit.reason) == ("tests_extending.shift.default", "no token-axis rule for this op")


def test_an_op_with_a_rule_stays_cut():
    @tw_compile.register_token_rule(torch.ops.tests_extending.shift.default)
    def rule(node, axes):
        x, by = node.args
        if x not in axes or axes[x].dim == x.meta["val"].dim() - 1:
            return None  # cut along the rows themselves, or only ``by`` is cut: it runs whole, and the report says so
        return tw_compile.Split(axes[x], slices={} if by in axes else {by: axes[x]})

    assert not shifting().joins


@pytest.mark.parametrize(
    "targets", [(), (len,), (shift,), (torch.ops.tests_extending.shift,), ("shift",), (torch.ops.aten.mm.default, None)], ids=repr
)
def test_what_cannot_have_a_rule(targets):
    with pytest.raises(tw_compile.TokenWeaveError, match="^register_token_rule takes OpOverloads, such as .*, or names such as"):
        tw_compile.register_token_rule(*targets)


def test_what_is_no_rule():
    with pytest.raises(tw_compile.TokenWeaveError, match=r"^register_token_rule decorates a function rule\(node, axes\), not None$"):
        tw_compile.register_token_rule(torch.ops.tests_extending.shift.default)(None)
