"""Where to cut, and from how many tokens on."""

import pytest

from tw_compile.autotune.plan import (
    MARGIN,
    SPLIT_RATIOS,
    TILE,
    WEAVE_MIN_TOKENS,
    Place,
    Plan,
    by_rule,
    by_times,
    first_half,
    min_tokens,
    place_of_cut,
    rule_of_cut,
    why_experts_are_whole,
)
from tw_compile.options import Options

SIZES, FUSED = (256, 512, 1024), [1.0, 2.0, 4.0]


def test_by_rule_each_half_fills_the_gpu():
    """H200: 132 SMs. A row of tiles is 32 of them for 70B shapes, 16 for those of 8B."""
    assert by_rule(8192, None) == Plan(WEAVE_MIN_TOKENS)
    assert by_rule(8192, 132) == Plan(2048)
    assert by_rule(4096, 132) == Plan(4096)
    assert all(by_rule(hidden, 132).min_tokens % (2 * TILE) == 0 for hidden in range(64, 32768, 8))


def test_by_rule_each_expert_of_a_half_has_rows_enough():
    """Mixtral, Qwen3-30B-A3B."""
    assert by_rule(8192, 132, [(8, 2)] * 4).experts_from == 1648
    assert by_rule(8192, None, [(128, 8), (8, 2)]).experts_from == 6592


@pytest.mark.parametrize("cut, experts_from, gain", [
    ([2.0, 2.0, 2.0], 256, 2.0), ([9.0, 2.5, 2.0], 512, 2.0), ([1.0, 1.0, 3.5], None, 1.333), ([9.0, 9.0, 9.0], None, 1.333),
])  # fmt: skip
def test_by_times_experts_are_cut_from_where_on_that_is_faster(cut, experts_from, gain):
    plan = by_times(SIZES, FUSED, {(4, 0.5): [3.0, 3.0, 3.0]}, {(4, 0.5): cut})
    assert (plan.min_tokens, plan.experts_from, plan.gain) == (1024, experts_from, gain)


@pytest.mark.parametrize("plan, experts", [(Plan(8), False), (Plan(8, experts_from=64), True), (Plan(8, experts_from=65), False)])
def test_the_number_of_tokens_decides_whether_experts_are_cut(plan, experts):
    assert place_of_cut([1, 64], Options(), plan) == Place(1, "half", experts)


def test_why_experts_are_whole():
    reasons = [why_experts_are_whole(plan) for plan in (Plan(8, 0, 0.5, 1.1, 64), Plan(8, 0, 0.5, 1.1), Plan(8, experts_from=64))]
    assert reasons[0] == f"with fewer than 64 tokens: {reasons[1]}" and reasons[2].startswith("with fewer than 64 tokens: each half")


@pytest.mark.parametrize("plan", [Plan(512), Plan(None)])
def test_what_the_user_says_of_the_threshold_goes_before_a_plan(plan):
    assert min_tokens(Options(), plan) == plan.min_tokens
    assert min_tokens(Options(mode="weave"), plan) == 2
    assert min_tokens(Options(min_tokens=100), plan) == 100
    assert min_tokens(Options(mode="weave", min_tokens=100), plan) == 100
    assert min_tokens(Options(min_tokens=1), plan) == 2, "one token cannot be split"


@pytest.mark.parametrize("woven, plan", [
    ({(4, 0.5): [2.0, 2.0, 2.0]}, Plan(1024, 4, 0.5, 2.0)),
    ({(4, 0.5): [0.9, 1.5, 2.0]}, Plan(256, 4, 0.5, 2.0)),
    ({(4, 0.5): [0.5, 2.0, 2.0]}, Plan(1024, 4, 0.5, 2.0)),  # faster at few tokens again: the threshold is one
    ({(4, 0.5): [0.5, 1.0, 4.0]}, Plan(None, 4, 0.5, 1.0)),
    ({(4, 0.5): [2.0, 4.0, 8.0], (8, 0.5): [2.0, 4.0, 5.0]}, Plan(None, 8, 0.5, 0.8)),
    ({(4, 0.5): [9.0, 9.0, 2.0], (8, 0.5): [9.0, 1.2, 2.1]}, Plan(512, 8, 0.5, 1.905)),  # all sizes together
    ({(4, 0.375): [9.0, 9.0, 2.0], (4, 0.625): [9.0, 9.0, 1.9]}, Plan(1024, 4, 0.625, 2.105)),
    ({(4, 0.5): [9.0, 9.0, (1 - MARGIN / 2) * 4.0]}, Plan(None, 4, 0.5, 1.01)),
])  # fmt: skip
def test_by_times_the_fastest_plan_for_all_sizes_together(woven, plan):
    assert by_times(SIZES, FUSED, woven) == plan


def first_of(length, per_step, options, split_ratio=0.5):
    """Entries of the first half, or why there is none."""
    rule = rule_of_cut(length, per_step, options, split_ratio)
    return rule if isinstance(rule, str) and rule not in ("half", "tiles") else first_half(length, rule, split_ratio)


@pytest.mark.parametrize("per_step", [1, 5])
@pytest.mark.parametrize("split_ratio", SPLIT_RATIOS)
def test_both_halves_have_something_at_every_length(per_step, split_ratio):
    for length in range(2, 5000):
        assert 0 < first_of(length, per_step, Options(), split_ratio) < length


@pytest.mark.parametrize("split_ratio", SPLIT_RATIOS)
def test_many_tokens_are_cut_on_a_tile_near_the_middle(split_ratio):
    for length in range(WEAVE_MIN_TOKENS, 10000, 7):
        first = first_of(length, 1, Options(), split_ratio)
        assert first % TILE == 0 and 0 <= length * split_ratio - first <= TILE


def test_a_batch_is_cut_between_sequences():
    assert first_of(5, 1000, Options()) == 2


def test_an_explicit_split():
    assert first_of(10, 1, Options(split=3)) == 3
    assert first_of(10, 4, Options(split=8)) == 2
    assert first_of(10, 1, Options(split=10)) == "split=10 leaves nothing for the second half"
    assert first_of(10, 4, Options(split=6)) == "split=6 is not a multiple of the 4 tokens of a sequence"


def test_where_a_call_is_cut():
    plan = Plan(1024, 0, 0.5)
    assert place_of_cut([1, 2048], Options(), plan) == Place(1, "tiles")
    assert place_of_cut([3, 1000], Options(), plan) == Place(0, "half")
    assert place_of_cut([1, 100], Options(mode="weave"), plan) == Place(1, "half")
    assert place_of_cut([2048], Options(split=512), plan) == Place(0, 512)
    assert place_of_cut([1, 1023], Options(), plan) == "fewer than 1024 tokens"
    assert place_of_cut([0], Options(), plan) == "fewer than 1024 tokens"
    assert place_of_cut([1, 1], Options(mode="weave"), plan) == "one token cannot be split"
    assert place_of_cut([4096], Options(), Plan(None)) == "autotuning measured no speed-up on this machine"
    assert place_of_cut([4096], Options(mode="fuse"), plan) == "mode is fuse"
