"""Where a graph is cut, and from how many tokens on: pure functions of shapes, options and measured times."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..options import Options

# Tokens and columns of a GEMM tile on the supported GPUs. A cut at a multiple of TILE leaves no partly filled tile at the cut.
TILE = 128
TILE_COLUMNS = 256

# Without tuning: the least number of waves of the row-parallel GEMM of each half. With fewer waves the halves lose more time in their last,
# partly filled waves than the overlap saves.
WAVES = 1.9
# Without tuning, and with an unknown number of SMs. TokenWeave (arXiv 2505.11329) weaves dense models from 1024 tokens on.
WEAVE_MIN_TOKENS = 1024

# Without tuning: the least number of rows that an expert of a half has on average where experts are cut. Each half reads the weights of all
# experts. A GEMM of fewer rows takes as long as the read: on an H200 in bfloat16, 990 TFLOP/s / 4.8 TB/s.
EXPERT_ROWS = 206

# Split ratios that are tried. All are exact as floats: see ``first_half``.
SPLIT_RATIOS = 3 / 8, 4 / 8, 5 / 8

# The least gain of a woven section, as a part of the fused one's time. Tuning leaves out other kernels, of which a woven graph has more and
# smaller ones.
MARGIN = 0.02


@dataclass(frozen=True)
class Plan:
    """How a graph is woven.

    min_tokens:   number of tokens from which the graph is woven; None if it never is
    ctas:         CTAs of a communication kernel beside GEMMs; 0 leaves the number to the kernel. Over a process group, the SMs that GEMMs
                  leave to its kernels
    split_ratio:  part of the tokens in the first half, exact as a float: 0.375, 0.5
    gain:         fused time / woven time of the section, at the most tokens that were measured; None for a plan by rule
    experts_from: number of tokens from which a woven graph cuts its experts too; None if it never does, or if it has none
    """

    min_tokens: int | None
    ctas: int = 0
    split_ratio: float = 0.5
    gain: float | None = None
    experts_from: int | None = None


def by_rule(hidden: int, sms: int | None, experts: Iterable[tuple[int, int]] = ()) -> Plan:
    """The plan of a graph that is not autotuned.

    hidden:  columns of the reduced values
    sms:     SMs of the GPU, or None
    experts: (experts, choices of a token) of each layer that has experts
    """
    experts_from = max((math.ceil(2 * EXPERT_ROWS * number / choices) for number, choices in experts), default=None)
    if sms is None:
        return Plan(WEAVE_MIN_TOKENS, experts_from=experts_from)
    return Plan(2 * TILE * math.ceil(WAVES * sms * TILE_COLUMNS / hidden), experts_from=experts_from)


Times = dict[tuple[int, float], list[float]]


def by_times(sizes: tuple[int, ...], fused: list[float], woven: Times, cut: Times | None = None) -> Plan:
    """The plan with the largest gain over all sizes together. A variant is woven from the size on from which it is always faster.

    sizes: numbers of tokens, ascending
    fused: seconds of the fused section at each size
    woven: (ctas, split_ratio) -> seconds of the woven section at each size
    cut:   the same of the section with its experts cut; None if it has none
    """

    def plan(ctas: int, split_ratio: float, times: list[float]) -> tuple[float, Plan]:
        halves = cut[ctas, split_ratio] if cut else []
        experts = _from(halves, times) if cut else len(sizes)
        times = times[:experts] + halves[experts:]
        first = _from(times, [(1 - MARGIN) * whole for whole in fused])
        gain = sum(math.log(whole / halves) for whole, halves in zip(fused[first:], times[first:]))
        least, experts_from = (sizes[at] if at < len(sizes) else None for at in (first, experts))
        return gain, Plan(least, ctas, split_ratio, round(fused[-1] / times[-1], 3), experts_from)

    return max((plan(*variant, times) for variant, times in woven.items()), key=lambda p: (p[0], p[1].gain))[1]


def _from(times: list[float], others: list[float]) -> int:
    """The first index from which on no time is more than the other."""
    first = len(times)
    while first and times[first - 1] <= others[first - 1]:
        first -= 1
    return first


def min_tokens(options: Options, plan: Plan) -> int | None:
    """The number of tokens from which a graph is woven; None if it never is."""
    if isinstance(options.min_tokens, int):
        return max(options.min_tokens, 2)
    return 2 if options.mode == "weave" else plan.min_tokens


@dataclass(frozen=True)
class Place:
    """Where a graph is cut, for the sizes of a call.

    dim:     the dimension of the reduced values that is cut
    rule:    "tiles": ``Plan.split_ratio`` of the tokens, rounded down to whole tiles; "half"; or the number of entries in the first half
    experts: whether experts are cut too
    """

    dim: int
    rule: str | int
    experts: bool = False


def place_of_cut(batch: list[int], options: Options, plan: Plan) -> Place | str:
    """Where to cut reduced values, or why they are not cut.

    batch: their shape without the last dimension
    """
    if options.fused_only:
        return options.fused_only
    dim = next((i for i, size in enumerate(batch) if size != 1), None)
    if dim is None:
        return "one token cannot be split"
    if (least := min_tokens(options, plan)) is None:
        return "autotuning measured no speed-up on this machine"
    if math.prod(batch) < least:
        return f"fewer than {least} tokens"
    rule = rule_of_cut(batch[dim], math.prod(batch[dim + 1 :]), options, plan.split_ratio)
    experts = plan.experts_from is not None and math.prod(batch) >= plan.experts_from
    return rule if isinstance(rule, str) and rule not in ("tiles", "half") else Place(dim, rule, experts)


def why_experts_are_whole(plan: Plan) -> str:
    """Why the experts of a woven graph run on all tokens."""
    least = f"with fewer than {plan.experts_from} tokens: " if plan.experts_from else ""
    if plan.gain is not None:
        return f"{least}autotuning measured that experts are faster on all tokens"
    return f"{least}each half would wait for the weights of all experts (a rule, as the graph is not autotuned)"


def rule_of_cut(length: int, tokens_per_step: int, options: Options, split_ratio: float) -> str | int:
    """The rule of a Place, or why the requested cut is not possible.

    length:          length of the axis that is cut: tokens of one sequence, or sequences of a batch
    tokens_per_step: tokens of one entry of this axis: 1, or the length of a sequence
    """
    if isinstance(options.split, int):
        steps, left = divmod(options.split, tokens_per_step)
        if left:
            return f"split={options.split} is not a multiple of the {tokens_per_step} tokens of a sequence"
        return steps if steps < length else f"split={options.split} leaves nothing for the second half"
    return "tiles" if tokens_per_step == 1 and length >= 2 * TILE and length * split_ratio >= TILE else "half"


def first_half(length: Any, rule: str | int, split_ratio: float) -> Any:
    """The number of entries of the cut axis in the first half, int or SymInt as ``length``. length: length of the axis"""
    if rule == "tiles":
        over, under = split_ratio.as_integer_ratio()
        return length * over // (under * TILE) * TILE
    return length // 2 if rule == "half" else rule
