"""Where to cut and from how many tokens on: pure functions of shapes, options and what was measured."""

import math
from dataclasses import dataclass

from ..options import Options

# GEMM tiles are 128 tokens high on the GPUs this is for, and 256 columns wide: a cut on a multiple of TILE adds no wave to
# either half beyond what rounding costs anyway.
TILE = 128
TILE_COLUMNS = 256

# Where nothing can be tuned: waves that the row-parallel GEMM of each half has at the least. With fewer, what two halves
# lose to their last, unfilled ones is more than what hides behind them.
WAVES = 1.9
# And where the number of SMs is not known (TokenWeave, arXiv 2505.11329, weaves dense models from 1024 tokens on).
WEAVE_MIN_TOKENS = 1024

# Parts of the tokens in the first half that are tried. All are floats that are exact, see ``first_half``.
SPLIT_RATIOS = 3 / 8, 4 / 8, 5 / 8

# What a weave must be faster by when it is tuned. It also has more, and smaller, kernels of those that are not run then.
MARGIN = 0.02


@dataclass(frozen=True)
class Plan:
    """How a graph is woven.

    min_tokens:  from which on; None for never
    ctas:        of a communication kernel beside GEMMs; 0 leaves it to the kernel
    split_ratio: part of the tokens that goes to the first half, as a float that is exact: 0.375, 0.5
    gain:        time of the fused graph over the woven one's, at the most tokens that were tuned for; None for a plan by rule
    """

    min_tokens: int | None
    ctas: int = 0
    split_ratio: float = 0.5
    gain: float | None = None


def by_rule(hidden: int, sms: int | None) -> Plan:
    """The plan for what is not tuned.

    hidden: columns of the reduced values
    sms:    SMs of the GPU, or None
    """
    if sms is None:
        return Plan(WEAVE_MIN_TOKENS)
    return Plan(2 * TILE * math.ceil(WAVES * sms * TILE_COLUMNS / hidden))


def by_times(sizes: tuple[int, ...], fused: list[float], woven: dict[tuple[int, float], list[float]]) -> Plan:
    """The plan that makes all sizes together fastest: each is woven from the size on from which it is always faster.

    sizes: numbers of tokens, ascending
    fused: seconds at each size
    woven: the same, of each (ctas, split_ratio)
    """

    def plan(ctas, split_ratio, times):
        first = len(sizes)
        while first and times[first - 1] <= (1 - MARGIN) * fused[first - 1]:
            first -= 1
        gain = sum(math.log(whole / halves) for whole, halves in zip(fused[first:], times[first:]))
        return gain, Plan(sizes[first] if first < len(sizes) else None, ctas, split_ratio, round(fused[-1] / times[-1], 3))

    return max((plan(*variant, times) for variant, times in woven.items()), key=lambda p: (p[0], p[1].gain))[1]


def min_tokens(options: Options, plan: Plan) -> int | None:
    """The number of tokens from which a graph is woven; None if it never is."""
    if options.min_tokens != "auto":
        return max(options.min_tokens, 2)
    return 2 if options.mode == "weave" else plan.min_tokens


@dataclass(frozen=True)
class Place:
    """Where a graph is cut, for the sizes of a call.

    dim:  of the shape of the reduced values
    rule: "tiles", ``Plan.split_ratio`` of the tokens, rounded down to whole tiles; "half"; or the number of entries in front
    """

    dim: int
    rule: str | int


def place_of_cut(batch: list[int], options: Options, plan: Plan) -> Place | str:
    """Where to cut reduced values, or why not at all.

    batch: their shape without the last dimension, as numbers
    """
    if options.fused_only:
        return options.fused_only
    dim = next((i for i, size in enumerate(batch) if size != 1), None)
    if dim is None:
        return "one token cannot be split"
    if (least := min_tokens(options, plan)) is None:
        return "it was not faster when it was tuned on this machine"
    if math.prod(batch) < least:
        return f"fewer than {least} tokens"
    rule = rule_of_cut(batch[dim], math.prod(batch[dim + 1 :]), options, plan.split_ratio)
    return rule if isinstance(rule, str) and rule not in ("tiles", "half") else Place(dim, rule)


def rule_of_cut(length: int, tokens_per_step: int, options: Options, split_ratio: float) -> str | int:
    """The rule of a Place, or why the requested cut is not possible.

    length:          of the axis that is cut (tokens of one sequence, or sequences of a batch)
    tokens_per_step: tokens in one step of it (1, or the length of a sequence)
    """
    if options.split != "auto":
        steps, left = divmod(options.split, tokens_per_step)
        if left:
            return f"split={options.split} is not a multiple of the {tokens_per_step} tokens of a sequence"
        return steps if steps < length else f"split={options.split} leaves nothing for the second half"
    return "tiles" if tokens_per_step == 1 and length >= 2 * TILE and length * split_ratio >= TILE else "half"


def first_half(length, rule: str | int, split_ratio: float):
    """Entries of the cut axis that go to the first half. length: of the axis; int or SymInt, as is what is returned"""
    if rule == "tiles":
        over, under = split_ratio.as_integer_ratio()
        return length * over // (under * TILE) * TILE
    return length // 2 if rule == "half" else rule
