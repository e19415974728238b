"""Where to cut and from how many tokens on: pure functions of shapes, options and what was measured."""

import math
from dataclasses import dataclass

from .options import Options

# GEMM tiles are 128 tokens high on the GPUs this is for, and 256 columns wide: a cut on a multiple of TILE adds no wave to
# either half beyond what rounding costs anyway.
TILE = 128
TILE_COLUMNS = 256

# Where nothing can be rehearsed: waves that the row-parallel GEMM of each half has at the least. With fewer, what two halves
# lose to their last, unfilled ones is more than what hides behind them.
WAVES = 1.9
# And where the number of SMs is not known (TokenWeave, arXiv 2505.11329, weaves dense models from 1024 tokens on).
WEAVE_MIN_TOKENS = 1024

# Of a rehearsal: what a weave must be faster by. It also has more, and smaller, kernels of those that are not rehearsed.
MARGIN = 0.02


@dataclass(frozen=True)
class Plan:
    """How a graph is woven.

    min_tokens: from which on; None for never
    ctas:       of a communication kernel beside GEMMs; 0 leaves it to the kernel
    eighths:    of the tokens that go to the first half
    gain:       time of the fused graph over the woven one's, at the most tokens that were rehearsed; None for a plan by rule
    """

    min_tokens: int | None
    ctas: int = 0
    eighths: int = 4
    gain: float | None = None


def by_rule(hidden: int, sms: int | None) -> Plan:
    """The plan for what is not rehearsed.

    hidden: columns of the reduced values
    sms:    SMs of the GPU, or None
    """
    if sms is None:
        return Plan(WEAVE_MIN_TOKENS)
    return Plan(2 * TILE * math.ceil(WAVES * sms * TILE_COLUMNS / hidden))


def by_times(sizes: tuple[int, ...], fused: list[float], woven: dict[tuple[int, int], list[float]]) -> Plan:
    """The plan that makes all sizes together fastest: each is woven from the size on from which it is always faster.

    sizes: numbers of tokens, ascending
    fused: seconds at each size
    woven: the same, of each (ctas, eighths)
    """

    def plan(ctas, eighths, times):
        first = len(sizes)
        while first and times[first - 1] <= (1 - MARGIN) * fused[first - 1]:
            first -= 1
        gain = sum(math.log(whole / halves) for whole, halves in zip(fused[first:], times[first:]))
        return gain, Plan(sizes[first] if first < len(sizes) else None, ctas, eighths, round(fused[-1] / times[-1], 3))

    return max((plan(*variant, times) for variant, times in woven.items()), key=lambda p: (p[0], p[1].gain))[1]


def min_tokens(options: Options, plan: Plan) -> int | None:
    """The number of tokens from which a graph is woven; None if it never is."""
    if options.min_tokens != "auto":
        return max(options.min_tokens, 2)
    return 2 if options.mode == "weave" else plan.min_tokens


def two_shot_ctas(world: int) -> int:
    """CTAs of a two-shot kernel of many rows, if nobody says: as few as keep the wire busy, since each takes an SM from the GEMMs.

    The fewer the ranks, the more rows each has to norm for as many bytes on the wire (benchmarks/results/kernel-*.json).
    """
    return max(8, 32 // world)


def first_half(length, tokens_per_step, options: Options, least: int, eighths: int = 4):
    """Steps of the cut axis that go to the first half.

    length:           length of the axis that is cut (tokens of one sequence, or sequences of a batch); int or SymInt
    tokens_per_step:  tokens in one step of it (1, or the length of a sequence); int or SymInt
    least:            tokens that there are at least
    eighths:          how many of them, about, where the axis is one of tokens
    Returns an int or SymInt, or a str that says why the requested cut is not possible.
    """
    if options.split != "auto":
        if not options.split % tokens_per_step == 0:
            return f"split={options.split} is not a multiple of the {tokens_per_step} tokens of a sequence"
        steps = options.split // tokens_per_step
        # Torch makes a constant of a symbolic length that is 1, and of all those that it comes from.
        needed, too_few = (1, "nothing") if isinstance(length, int) else (2, "fewer than 2 entries of a dynamic length")
        return steps if steps + needed <= length else f"split={options.split} leaves {too_few} for the second half"
    # One rule for all sizes above the threshold: a branch on a symbolic length would cost a graph.
    if tokens_per_step != 1 or least < 2 * TILE:
        return length // 2
    # The last term is 0 where the first is a tile or more. Below the threshold it keeps the cut from being 0: Inductor's cache
    # evaluates the guards of a woven graph there too, and they divide by both halves.
    tiles = length * eighths // (8 * TILE)
    return tiles * TILE + 1 // (1 + tiles)
