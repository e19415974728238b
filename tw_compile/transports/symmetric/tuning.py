"""Kernel tuning: up to how many tokens one_shot is faster than two_shot, and how many CTAs two_shot takes if no GEMM runs beside it.

The kernels are measured before the first workspace for a dtype and hidden size is made. The tuning is cached on disk, and is the same on
all ranks, from the times of the slowest rank. The bits of a result do not depend on it. ``compare`` measures transports in the same way.
"""

import gc
import json
import logging
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import logs, records
from ...compat import cuda_sleep, resolve_process_group
from ...site import SLOT_WHOLE, Planned, Site
from ...wording import memory_text
from .. import agree
from ..together import WorkspaceError

log = logging.getLogger("tw_compile")

# Rows of the smallest workspace. one_shot runs only with fewer rows.
LEAST_ROWS = 32

# Numbers of tokens at which one_shot and two_shot are compared, and at which two_shot is measured with several numbers of CTAs. More
# tokens are taken to behave like the last number.
ONE_SHOT_SIZES = 1, 2, 4, 6, 8, 12, 16, 24, LEAST_ROWS - 1
TWO_SHOT_SIZES = 32, 64, 128, 256, 512, 1024, 2048
CTAS = 8, 16, 32

# The rule's choice is kept unless another one is faster by this fraction. Smaller differences are noise.
MARGIN = 0.02

SAMPLES = 5
CALLS = 20  # calls in a sample
# Clock cycles that the GPU waits before each sample, so that the host has enqueued the sample, and it measures the GPU alone.
HEAD_START = 1_000_000

# Sizes at which transports are compared. The process group's sites are several kernels, so that the host needs a longer head start.
COMPARED_TOKENS, COMPARED_HIDDEN, COMPARED_DTYPE = (1, 32, 256, 2048), 4096, torch.bfloat16
COMPARED_HEAD_START = 6_000_000


@dataclass(frozen=True)
class Tuning:
    """The result of kernel tuning.

    one_shot_rows: one_shot is used up to this number of tokens; 0 for never
    ctas:          (first number of tokens, CTAs of a two_shot kernel with no GEMM beside it and no request for CTAs), in ascending
                   order from (1, ...)
    Raises ValueError if one_shot has no room for so many tokens.
    """

    one_shot_rows: int
    ctas: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not 0 <= self.one_shot_rows < LEAST_ROWS:
            raise ValueError(f"one_shot for up to {self.one_shot_rows} tokens: there is room for {LEAST_ROWS - 1}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Tuning":
        """The tuning that ``asdict`` has turned into ``data``, also with lists in place of tuples, as from JSON."""
        return cls(data["one_shot_rows"], tuple((first, ctas) for first, ctas in data["ctas"]))

    def kernel_of(self, rows: int) -> str:
        """The kernel for a number of tokens."""
        return "one_shot" if rows <= self.one_shot_rows else "two_shot"

    def ctas_alone(self, rows: int) -> int:
        """The number of CTAs of a two_shot kernel with no GEMM beside it, for a number of tokens."""
        return [ctas for first, ctas in self.ctas if first <= max(rows, 1)][-1]


def two_shot_ctas(world: int) -> int:
    """The default number of CTAs of a two_shot kernel with many rows. They just saturate the links: each takes an SM from the GEMMs.

    With fewer ranks a rank norms more rows for the same bytes on the links (benchmarks/results/kernel-*.json).
    """
    return max(8, 32 // world)


def by_rule(world: int) -> Tuning:
    """The tuning without measurements: the best one on H200s (benchmarks/results/kernel-tp*.json).

    With two ranks one_shot is used for all numbers of tokens that it has room for, with four ranks up to 16: with more peers each rank
    reads more. Up to 128 rows of a rank, two_shot has more CTAs than saturate the links, so that more rows run at the same time.
    """
    return Tuning(min(48 // (world - 1), LEAST_ROWS - 1), ((1, 32), (128 * world + 1, two_shot_ctas(world))))


def by_times(world: int, times: dict[tuple[str, int, int], float]) -> Tuning:
    """The fastest tuning, except that the rule's choice is kept if it is slower by less than MARGIN.

    times: (kernel, tokens, CTAs) -> seconds, for all of ``variants``
    """
    rule = by_rule(world)
    sizes = [tokens for kernel, tokens, _ in times if kernel == "one_shot"]

    def advantage(tokens: int) -> float:
        """The logarithm of the speed-up of one_shot over two_shot."""
        one, two = times["one_shot", tokens, 0], times["two_shot", tokens, rule.ctas_alone(tokens)]
        return 0.0 if min(one, two) >= (1 - MARGIN) * max(one, two) else math.log(two / one)

    def merit(rows: int) -> tuple[float, int]:
        """The merit of one_shot up to ``rows`` tokens. It is a sum over all sizes, so that an outlier decides nothing alone."""
        return sum(advantage(tokens) for tokens in sizes if tokens <= rows), -abs(rows - rule.one_shot_rows)

    steps = []
    for tokens in TWO_SHOT_SIZES:
        taken = {ctas: seconds for (kernel, t, ctas), seconds in times.items() if kernel == "two_shot" and t == tokens}
        ctas, rules = min(taken, key=taken.__getitem__), rule.ctas_alone(tokens)
        steps.append(ctas if taken[ctas] < (1 - MARGIN) * taken[rules] else rules)
    firsts = [1, *(tokens + 1 for tokens in TWO_SHOT_SIZES)]
    changes = [(first, ctas) for first, ctas, before in zip(firsts, steps, [None, *steps]) if ctas != before]
    return Tuning(max(sorted({0, *sizes, rule.one_shot_rows}), key=merit), tuple(changes))


def variants(world: int) -> list[tuple[str, int, int]]:
    """The (kernel, tokens, CTAs) to measure. CTAs are 0 for one_shot, which has a CTA for each token."""
    rule = by_rule(world)
    compared = [v for t in ONE_SHOT_SIZES for v in (("one_shot", t, 0), ("two_shot", t, rule.ctas_alone(t)))]
    return compared + [("two_shot", t, ctas) for t in TWO_SHOT_SIZES for ctas in sorted({*CTAS, rule.ctas_alone(t)})]


_measured: dict[Path, Tuning] = {}  # path of the record -> tuning, also if it could not be measured, or not be written to disk


def known(owner: Any, dtype: torch.dtype, hidden: int) -> Tuning | None:
    """The tuning for a Symmetric that is known in this process or cached on this machine; None if there is none."""
    key = _key(owner, dtype, hidden)
    if (path := records.path("tuning", key)) in _measured:
        return _measured[path]
    try:
        return Tuning.from_dict(records.read("tuning", key) or {})
    except (ValueError, TypeError, KeyError):  # there is no record, or it has other fields
        return None


def measure(owner: Any, dtype: torch.dtype, hidden: int, max_ctas: int) -> Tuning:
    """Measure the tuning for a Symmetric, and cache it; a rule decides where a rank cannot measure. A collective of the group.

    max_ctas: CTAs for which the signal pad has flags
    """
    begin = time.perf_counter()
    lacking = agree.exchange(owner.group_name, "kernel tuning", _lacking(owner, dtype, hidden, max_ctas) or "")
    key = _key(owner, dtype, hidden)
    reason, mine = max(lacking), None
    if not reason:
        logs.say_that_it_autotunes()
        try:
            mine = _times(owner, dtype, hidden)
        except WorkspaceError as error:  # raised on all ranks
            reason = str(error)
        gc.collect()  # frees the workspaces of the measured transports, which contain reference cycles
    if mine is None:
        tuning = by_rule(owner.world)
        message = "kernels for %s [%d] are not tuned, and by a rule one_shot is for up to %d tokens: %s"
        log.warning(message, dtype, hidden, tuning.one_shot_rows, reason)
    else:
        said = agree.exchange(owner.group_name, "the end of kernel tuning", json.dumps([*mine.values()]))
        times = dict(zip(mine, map(max, *map(json.loads, said))))
        tuning = by_times(owner.world, times)
        records.write("tuning", key, asdict(tuning))
        log.debug("seconds of (kernel, tokens, CTAs): %s", times)
        log.info("kernels for %s [%d] tuned in %.1f s: %s", dtype, hidden, time.perf_counter() - begin, tuning)
    _measured[records.path("tuning", key)] = tuning
    return tuning


def compare(transports: dict, group_name: str, device: torch.device, link: str) -> dict[str, float]:
    """name -> seconds of a fused call: the geometric mean over COMPARED_TOKENS of the slowest rank's times. A collective.

    transports: name -> Symmetric or ProcessGroup, whose workspaces are made here
    link:       what lies between the ranks: see ``link.measured``
    The times are measured once on a machine, and cached on disk. Raises WorkspaceError on all ranks if a rank cannot make a workspace.
    """
    gpu, world = torch.cuda.get_device_name(device), dist.get_world_size(resolve_process_group(group_name))
    key = {"transports": [*transports], "link": link, "gpu": gpu, "ranks": world, "version": agree.version()}
    said = agree.exchange(group_name, "a comparison of transports", json.dumps(_cached_times(key)))
    seconds = next((theirs for theirs in map(json.loads, said) if theirs), None)
    if seconds is None:
        begin = time.perf_counter()
        logs.say_that_it_autotunes()
        for transport in transports.values():
            transport.prepare([Planned(SLOT_WHOLE, COMPARED_DTYPE, (tokens, COMPARED_HIDDEN), False) for tokens in COMPARED_TOKENS])
        weight = torch.ones(COMPARED_HIDDEN, dtype=COMPARED_DTYPE, device=device)
        runs = [(transport, weight, tokens, 0, COMPARED_HEAD_START) for transport in transports.values() for tokens in COMPARED_TOKENS]
        taken = [[seconds_of_call(*run) for run in runs] for _ in range(SAMPLES + 1)]
        mine = [statistics.median(samples) for samples in zip(*taken[1:])]
        said = agree.exchange(group_name, "the end of a comparison of transports", json.dumps(mine))
        slowest = [max(theirs) for theirs in zip(*map(json.loads, said))]
        sizes = len(COMPARED_TOKENS)
        seconds = {name: math.exp(statistics.fmean(map(math.log, slowest[i * sizes :][:sizes]))) for i, name in enumerate(transports)}
        log.info("compared transports in %.1f s, seconds of %s tokens: %s", time.perf_counter() - begin, COMPARED_TOKENS, slowest)
    if seconds != _cached_times(key):
        records.write("transports", key, seconds)
    return seconds


def _cached_times(key: dict) -> dict[str, float] | None:
    try:
        seconds = records.read("transports", key) or {}
        return {name: float(seconds[name]) for name in key["transports"]}
    except (ValueError, TypeError, KeyError):  # there is no record, or it has other fields
        return None


def _key(owner: Any, dtype: torch.dtype, hidden: int) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(owner.device)
    of = {"transport": owner.name, "dtype": str(dtype).removeprefix("torch."), "hidden": hidden}
    return {**of, "gpu": gpu, "ranks": owner.world, "version": agree.version()}


def _lacking(owner: Any, dtype: torch.dtype, hidden: int, max_ctas: int) -> str | None:
    """Why this rank cannot measure; None if it can. Tuning may take half of the free memory, without what torch's allocator has cached."""
    most = max(ctas for _, _, ctas in variants(owner.world))
    if max_ctas < most:
        return f"the signal pad of symmetric memory has room for {max_ctas} CTAs, and tuning needs {most}"
    # Workspaces for all powers of two together are as large as one for the next power.
    needed = 2 * max(TWO_SHOT_SIZES) * hidden * (2 * dtype.itemsize + 4)
    free, _ = torch.cuda.mem_get_info(owner.device)
    return memory_text(needed, free) if needed > free / 2 else None


def _times(owner: Any, dtype: torch.dtype, hidden: int) -> dict[tuple[str, int, int], float]:
    """variant -> seconds on this rank: the median of samples that are taken in turns."""
    always = {"one_shot": LEAST_ROWS - 1, "two_shot": 0}
    instruments = {kernel: owner.another(Tuning(rows, by_rule(owner.world).ctas)) for kernel, rows in always.items()}
    weight = torch.ones(hidden, dtype=dtype, device=owner.device)
    wanted = variants(owner.world)
    taken = [[seconds_of_call(instruments[kernel], weight, *size) for kernel, *size in wanted] for _ in range(SAMPLES + 1)]
    return {variant: statistics.median(samples) for variant, *samples in zip(wanted, *taken[1:])}


def seconds_of_call(instrument: Any, weight: Tensor, tokens: int, ctas: int, head_start: int = HEAD_START) -> float:
    """Seconds of a fused call whose inputs are the results of the call before, in the workspace, as in the layers of a model.

    The residual is in float32, where the transport keeps it so, which Inductor's code over the process group does not.

    instrument: Symmetric or ProcessGroup
    weight:     [H], also gives the hidden size and dtype
    ctas:       see Site
    head_start: clock cycles that the GPU waits first
    """

    carries = instrument.name != "process_group"

    def site(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return instrument.fused(Site(x, residual, weight, ctas=ctas, fp32_residual=carries, sharded_residual=True), True)

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(instrument.device)
    cuda_sleep(head_start)
    carried = site(weight.repeat(tokens, 1), None)  # makes the ranks begin together
    begin.record()
    for _ in range(CALLS):
        carried = site(*carried)
    end.record()
    try:
        end.synchronize()
    except RuntimeError as error:
        instrument.raise_if_lost(error)
        raise
    return begin.elapsed_time(end) / 1e3 / CALLS
