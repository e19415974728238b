"""Where to cut, and from how many tokens on."""

import pytest

from tw_compile.options import Options
from tw_compile.planning import TILE, WEAVE_MIN_TOKENS, ctas_beside_gemms, first_half, loses, min_tokens


def test_the_threshold():
    assert min_tokens(Options(), 8192, None) == WEAVE_MIN_TOKENS
    for sms in (None, 132):
        assert min_tokens(Options(mode="weave"), 8192, sms) == 2
        assert min_tokens(Options(min_tokens=100), 8192, sms) == 100
        assert min_tokens(Options(mode="weave", min_tokens=100), 8192, sms) == 100
        assert min_tokens(Options(min_tokens=1), 8192, sms) == 2, "one token cannot be split"


def test_each_half_fills_the_gpu():
    """H200: 132 SMs. A row of tiles is 32 of them for 70B shapes, 16 for those of 8B."""
    assert min_tokens(Options(), 8192, 132) == 2048
    assert min_tokens(Options(), 4096, 132) == 4096
    assert all(min_tokens(Options(), hidden, 132) % (2 * TILE) == 0 for hidden in range(64, 32768, 8))


# A layer's weights, hidden size and ranks; and whether weaving is ever faster than fusing on H200s, as it was measured.
@pytest.mark.parametrize("weights, hidden, world, pays", [(855.6e6, 8192, 2, False), (855.6e6, 8192, 4, True), (218.1e6, 4096, 2, True)])
def test_hiding_the_communication_must_be_worth_the_sms(weights, hidden, world, pays):
    sites, bytes_of_element = 2, 2
    wire_bytes = sites * 2 * (world - 1) / world * hidden * bytes_of_element
    reason = loses(2 * weights / world, wire_bytes, 132, ctas_beside_gemms(world))
    assert (reason is None) == pays, reason


def test_compute_of_unknown_size_is_no_reason():
    assert loses(0, 1e4, 132, 8) is None


@pytest.mark.parametrize("options", [Options(), Options(mode="weave"), Options(min_tokens=2 * TILE)])
@pytest.mark.parametrize("per_step", [1, 5])
def test_both_halves_have_something_at_every_length(options, per_step):
    for length in range(2, 5000):
        assert 0 < first_half(length, per_step, options, min_tokens(options, 8192, None)) < length


def test_from_the_threshold_on_the_cut_is_on_a_tile_near_the_middle():
    for length in range(WEAVE_MIN_TOKENS, 10000, 7):
        first = first_half(length, 1, Options(), WEAVE_MIN_TOKENS)
        assert first % TILE == 0 and abs(first - length / 2) <= TILE


def test_a_batch_is_cut_between_sequences():
    assert first_half(5, 1000, Options(), WEAVE_MIN_TOKENS) == 2


def test_an_explicit_split():
    assert first_half(10, 1, Options(split=3), WEAVE_MIN_TOKENS) == 3
    assert first_half(10, 4, Options(split=8), WEAVE_MIN_TOKENS) == 2
    assert first_half(10, 1, Options(split=10), WEAVE_MIN_TOKENS) == "split=10 leaves nothing for the second half"
    assert first_half(10, 4, Options(split=6), WEAVE_MIN_TOKENS) == "split=6 is not a multiple of the 4 tokens of a sequence"
