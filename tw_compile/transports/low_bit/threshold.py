"""Measures from how many bytes of partial sums on a wire with fewer bits is faster than the process group's all-reduce."""

import json
import logging
import statistics
from typing import Any

import torch

from ... import records
from ...wording import memory_text
from .. import agree
from ..hierarchical import Hierarchical
from ..symmetric.tuning import MARGIN, SAMPLES, seconds_of_call
from .transport import LowBit

log = logging.getLogger("tw_compile")

# Numbers of tokens that are measured, of this hidden size and dtype. The process group's sites are several kernels, so that the host
# needs a head start.
TOKENS, HIDDEN, DTYPE = (32, 128, 512, 2048, 8192), 4096, torch.bfloat16
HEAD_START = 40_000_000
# The threshold where a rank has too little memory to measure it; others measured 2 to 4 MB over fast links.
RULE = 4 << 20


def least_bytes(transport: LowBit | Hierarchical, link: str) -> int | None:
    """The bytes from which on a wire is always faster; None if it never is. A collective of a CUDA group. link: see ``link.measured``"""
    key = {
        "transport": transport.name, "wire": transport.bits, "link": link, "gpu": torch.cuda.get_device_name(transport.device),
        "ranks": transport.world, "version": agree.version(),
    }  # fmt: skip
    said = agree.exchange(transport.group_name, "the threshold of a wire", json.dumps((records.read("wire", key), _lacking(transport))))
    kept, lacking = zip(*map(json.loads, said))
    found = next((theirs for theirs in kept if is_valid(theirs)), None)
    if found is None and any(lacking):
        log.warning("the threshold of a wire is not measured, and is %d KB by a rule: %s", RULE >> 10, max(lacking))
        return RULE
    if found is None:
        seconds = _seconds(transport.another(0))
        found = {"least_bytes": by_times(*seconds)}
        log.info("a wire of %d bits over %s: %s tokens take %s s, not %s s", transport.bits, link, TOKENS, *reversed(seconds))
    if found != records.read("wire", key):
        records.write("wire", key, found)
    return found["least_bytes"]


def _lacking(transport: LowBit | Hierarchical) -> str:
    """Why this rank cannot measure; '' if it can. It may take half of the free memory."""
    needed, (free, _) = 16 * max(TOKENS) * HIDDEN * DTYPE.itemsize, torch.cuda.mem_get_info(transport.device)
    return memory_text(needed, free) if needed > free / 2 else ""


def is_valid(value: Any) -> bool:
    """Whether a record is one of this module."""
    least = value.get("least_bytes", 0) if isinstance(value, dict) else 0  # without a threshold it is not valid
    return least is None or (type(least) is int and least > 0)


def by_times(whole: list[float], packed: list[float]) -> int | None:
    """The bytes from which on ``packed`` is always faster. Both: seconds at TOKENS"""
    first = len(TOKENS)
    while first and packed[first - 1] <= (1 - MARGIN) * whole[first - 1]:
        first -= 1
    return TOKENS[first] * HIDDEN * DTYPE.itemsize if first < len(TOKENS) else None


def _seconds(packed: LowBit | Hierarchical) -> tuple[list[float], list[float]]:
    """Seconds of a call at TOKENS, of the slowest rank: (in 16 bits, with the wire)."""
    transports = packed.in_full(), packed
    transports[0].in_place = True
    weight = torch.ones(HIDDEN, dtype=DTYPE, device=packed.device)
    runs = [(transport, weight, tokens, 0, HEAD_START) for transport in transports for tokens in TOKENS]
    taken = [[seconds_of_call(*run) for run in runs] for _ in range(SAMPLES + 1)]
    mine = [statistics.median(samples) for samples in zip(*taken[1:])]
    said = agree.exchange(packed.group_name, "the end of the threshold of a wire", json.dumps(mine))
    slowest = [max(theirs) for theirs in zip(*map(json.loads, said))]
    return slowest[: len(TOKENS)], slowest[len(TOKENS) :]
