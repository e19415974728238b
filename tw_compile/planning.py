"""Where to cut and from how many tokens on: pure functions of shapes and options."""

import math

from .options import Options

# GEMM tiles are 128 tokens high on the GPUs this is for, and 256 columns wide: a cut on a multiple of TILE adds no wave to
# either half beyond what rounding costs anyway.
TILE = 128
TILE_COLUMNS = 256

# Waves that the row-parallel GEMM of each half has at the least. Those in front of a site have as many columns as the model
# has hidden channels, whatever the number of ranks. With fewer waves, what two halves lose to their last, unfilled ones is
# more than what hides behind them (benchmarks/results/prefill-*.json: 70B shapes gain from 2048 tokens on).
WAVES = 1.9

# What an SM computes in large 16-bit GEMMs, in floating-point operations a second, and what the wire carries in each
# direction, in bytes a second, on an H200; only their ratio counts. The wire as in benchmarks/results/kernel-*.json. The SM is
# an estimate: whole layers without all-reduces reach 3.9e12 to 4.6e12 (prefill-*.json), with norms and attention in their time.
SM_FLOPS = 4.9e12
WIRE_BYTES = 310e9

# Where the number of SMs is not known (TokenWeave, arXiv 2505.11329, weaves dense models from 1024 tokens on).
WEAVE_MIN_TOKENS = 1024


def min_tokens(options: Options, hidden: int, sms: int | None) -> int:
    """The number of tokens from which a graph is woven: the same on all ranks that have the same GPU.

    hidden: columns of the reduced values
    sms:    SMs of the GPU, or None
    """
    if options.min_tokens != "auto":
        return max(options.min_tokens, 2)
    if options.mode == "weave":
        return 2
    if sms is None:
        return WEAVE_MIN_TOKENS
    return 2 * TILE * math.ceil(WAVES * sms * TILE_COLUMNS / hidden)


def ctas_beside_gemms(world: int) -> int:
    """CTAs of a two-shot kernel beside GEMMs, if the caller leaves it open.

    As few as keep the wire busy, since each takes an SM from them. The fewer the ranks, the more rows each has to norm for as
    many bytes on the wire: with two ranks 8 CTAs reach 160 GB/s and 16 reach 260, with four ranks 8 reach 290 of the 327 that
    an H200 can (benchmarks/results/kernel-*.json).
    """
    return max(8, 32 // world)


def loses(flops: float, wire_bytes: float, sms: int, ctas: int) -> str | None:
    """Why weaving is slower than fusing at any number of tokens; None where it is not.

    Fused, the communication stands beside the compute. Woven, it is hidden, and takes ``ctas`` SMs from the compute.

    flops, wire_bytes: of one token on one rank: in GEMMs, and over the wire in each direction
    """
    if not flops:
        return None
    hidden, given = wire_bytes / WIRE_BYTES * (SM_FLOPS * sms) / flops, ctas / (sms - ctas)
    if hidden >= given:
        return None
    return f"communication takes {hidden:.0%} of the time of the compute, which would be {given:.0%} slower on the SMs left beside it"


def first_half(length, tokens_per_step, options: Options, least: int):
    """Steps of the cut axis that go to the first half.

    length:           length of the axis that is cut (tokens of one sequence, or sequences of a batch); int or SymInt
    tokens_per_step:  tokens in one step of it (1, or the length of a sequence); int or SymInt
    least:            tokens that there are at least
    Returns an int or SymInt, or a str that says why the requested cut is not possible.
    """
    if options.split != "auto":
        if not options.split % tokens_per_step == 0:
            return f"split={options.split} is not a multiple of the {tokens_per_step} tokens of a sequence"
        steps = options.split // tokens_per_step
        return steps if steps < length else f"split={options.split} leaves nothing for the second half"
    # One rule for all sizes above the threshold: a branch on a symbolic length would cost a graph.
    if tokens_per_step != 1 or least < 2 * TILE:
        return length // 2
    # The last term is 0 from two tiles on. Below the threshold it keeps the cut from being 0: Inductor's cache evaluates
    # the guards of a woven graph there too, and they divide by both halves.
    pairs = length // (2 * TILE)
    return pairs * TILE + 1 // (1 + pairs)
