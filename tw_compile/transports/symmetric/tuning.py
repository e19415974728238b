"""What the kernels over symmetric memory are best at on this machine: up to how many tokens one_shot is faster than two_shot, and how
many CTAs two_shot takes where no GEMM runs beside it.

Measured before the first workspace for a dtype and hidden size is made, and kept on disk. All ranks have the same: of the times of the
slowest one. The bits of a row hang on neither, so that a change never shows in a result.
"""

import gc
import json
import logging
import math
import statistics
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from ... import logs, records
from ...compat import cuda_sleep, resolve_process_group
from ...site import SLOT_WHOLE, Site
from .. import agree
from ..together import WorkspaceError

log = logging.getLogger("tw_compile")

# Rows of the smallest workspace. For so many or more there is no room for one_shot.
LEAST_ROWS = 32

# Tokens at which the kernels are compared, and at which two_shot is run with several numbers of CTAs: more are taken to be like so many.
ONE_SHOT_SIZES = 1, 2, 4, 6, 8, 12, 16, 24, LEAST_ROWS - 1
TWO_SHOT_SIZES = 32, 64, 128, 256, 512, 1024, 2048
CTAS = 8, 16, 32

# What something else must be faster by than what the rule says: so much is noise, with which the choice is not to change.
MARGIN = 0.02

SAMPLES = 5
CALLS = 20  # of a sample
# Clocks for which the GPU waits before each sample: the host has enqueued it by then, and is not what is measured.
HEAD_START = 1_000_000

# What transports are compared at. Those over the process group are several kernels, which the host takes longer to enqueue.
COMPARED_TOKENS, COMPARED_HIDDEN, COMPARED_DTYPE = (1, 32, 256, 2048), 4096, torch.bfloat16
COMPARED_HEAD_START = 6_000_000


@dataclass(frozen=True)
class Tuning:
    """one_shot_rows: tokens up to which one_shot is used; 0 for never
    ctas:          (first number of tokens, CTAs of a two-shot kernel with nothing beside it, if the caller leaves them open),
                   ascending from (1, ...)

    Raises ValueError for more tokens than one_shot has room for.
    """

    one_shot_rows: int
    ctas: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if not 0 <= self.one_shot_rows < LEAST_ROWS:
            raise ValueError(f"one_shot for up to {self.one_shot_rows} tokens: there is room for {LEAST_ROWS - 1}")

    @classmethod
    def from_dict(cls, data: dict) -> "Tuning":
        """From ``asdict``, also after a detour through JSON, which knows no tuples."""
        return cls(data["one_shot_rows"], tuple((first, ctas) for first, ctas in data["ctas"]))

    def kernel_of(self, rows: int) -> str:
        """The kernel for a number of tokens."""
        return "one_shot" if rows <= self.one_shot_rows else "two_shot"

    def ctas_alone(self, rows: int) -> int:
        """The number of CTAs of a two-shot kernel with nothing beside it, for a number of tokens."""
        return [ctas for first, ctas in self.ctas if first <= max(rows, 1)][-1]


def two_shot_ctas(world: int) -> int:
    """CTAs of a two-shot kernel of many rows, if nobody says: as few as keep the wire busy, since each takes an SM from the GEMMs.

    The fewer the ranks, the more rows each has to norm for as many bytes on the wire (benchmarks/results/kernel-*.json).
    """
    return max(8, 32 // world)


def by_rule(world: int) -> Tuning:
    """The tuning where nothing is measured: what was best on H200s (benchmarks/results/kernel-tp*.json).

    one_shot on two ranks for all tokens that it has room for, on four up to 16: the more peers, the more comes in for each. And for
    up to 128 rows a rank more CTAs than the wire needs, as few rows are done sooner side by side.
    """
    return Tuning(min(48 // (world - 1), LEAST_ROWS - 1), ((1, 32), (128 * world + 1, two_shot_ctas(world))))


def by_times(world: int, times: dict[tuple[str, int, int], float]) -> Tuning:
    """What was fastest; what the rule says where that is as fast but for MARGIN.

    times: seconds of each (kernel, tokens, CTAs): see ``variants``
    """
    rule = by_rule(world)
    sizes = [tokens for kernel, tokens, _ in times if kernel == "one_shot"]

    def advantage(tokens):
        """Of one_shot: the logarithm of how many times as fast it is."""
        one, two = times["one_shot", tokens, 0], times["two_shot", tokens, rule.ctas_alone(tokens)]
        return 0.0 if min(one, two) >= (1 - MARGIN) * max(one, two) else math.log(two / one)

    def merit(rows):
        """Of one_shot up to there: all sizes together, so that one odd time does not decide for the rest."""
        return sum(advantage(tokens) for tokens in sizes if tokens <= rows), -abs(rows - rule.one_shot_rows)

    steps = []
    for tokens in TWO_SHOT_SIZES:
        taken = {ctas: seconds for (kernel, t, ctas), seconds in times.items() if kernel == "two_shot" and t == tokens}
        ctas, rules = min(taken, key=taken.get), rule.ctas_alone(tokens)
        steps.append(ctas if taken[ctas] < (1 - MARGIN) * taken[rules] else rules)
    firsts = [1, *(tokens + 1 for tokens in TWO_SHOT_SIZES)]
    changes = [(first, ctas) for first, ctas, before in zip(firsts, steps, [None, *steps]) if ctas != before]
    return Tuning(max(sorted({0, *sizes, rule.one_shot_rows}), key=merit), tuple(changes))


def variants(world: int) -> list[tuple[str, int, int]]:
    """What is measured: (kernel, tokens, CTAs). one_shot has a CTA for each token, which is written as 0."""
    rule = by_rule(world)
    compared = [v for t in ONE_SHOT_SIZES for v in (("one_shot", t, 0), ("two_shot", t, rule.ctas_alone(t)))]
    return compared + [("two_shot", t, ctas) for t in TWO_SHOT_SIZES for ctas in sorted({*CTAS, rule.ctas_alone(t)})]


_measured = {}  # path -> Tuning of this process: also for what could not be measured, or not be written


def known(owner, dtype: torch.dtype, hidden: int) -> Tuning | None:
    """The tuning for a Symmetric, as far as this rank knows without asking others."""
    key = _key(owner, dtype, hidden)
    if (path := records.path("tuning", key)) in _measured:
        return _measured[path]
    try:
        return Tuning.from_dict(records.read("tuning", key))
    except (ValueError, TypeError, KeyError):  # not there, or not one of ours
        return None


def measure(owner, dtype: torch.dtype, hidden: int, max_ctas: int) -> Tuning:
    """The tuning for a Symmetric, from now on known. A collective of its group.

    max_ctas: for which the signal pad has room
    """
    begin = time.perf_counter()
    lacking = agree.exchange(owner.group_name, "a tuning", _lacking(owner, dtype, hidden, max_ctas) or "")
    key = _key(owner, dtype, hidden)
    reason, mine = max(lacking), None
    if not reason:
        logs.say_that_it_tunes()
        try:
            mine = _times(owner, dtype, hidden)
        except WorkspaceError as error:  # which all ranks have
            reason = str(error)
        gc.collect()  # the instruments, of which some things refer to each other
    if mine is None:
        tuning = by_rule(owner.world)
        log.warning("not tuned for %s [%d], so that it is %s by a rule: %s", dtype, hidden, tuning, reason)
    else:
        said = agree.exchange(owner.group_name, "the end of a tuning", json.dumps([*mine.values()]))
        times = dict(zip(mine, map(max, *map(json.loads, said))))
        tuning = by_times(owner.world, times)
        records.write("tuning", key, asdict(tuning))
        log.debug("seconds of (kernel, tokens, CTAs): %s", times)
        log.info("tuned for %s [%d] in %.1f s: %s", dtype, hidden, time.perf_counter() - begin, tuning)
    _measured[records.path("tuning", key)] = tuning
    return tuning


def compare(transports: dict, group_name: str, device: torch.device) -> dict[str, float]:
    """Seconds of a fused call over each, by name: the geometric mean over COMPARED_TOKENS, of the slowest rank. A collective.

    transports: name -> Symmetric or ProcessGroup, whose workspaces are made here
    Measured once on a machine, and kept. Raises WorkspaceError on all ranks where one cannot make a workspace.
    """
    gpu, world = torch.cuda.get_device_name(device), dist.get_world_size(resolve_process_group(group_name))
    key = {"transports": [*transports], "gpu": gpu, "ranks": world, "version": agree.version()}
    said = agree.exchange(group_name, "a comparison of transports", json.dumps(_kept_times(key)))
    seconds = next((theirs for theirs in map(json.loads, said) if theirs), None)
    if seconds is None:
        begin = time.perf_counter()
        logs.say_that_it_tunes()
        for transport in transports.values():
            transport.prepare([(SLOT_WHOLE, COMPARED_DTYPE, (tokens, COMPARED_HIDDEN), False) for tokens in COMPARED_TOKENS])
        weight = torch.ones(COMPARED_HIDDEN, dtype=COMPARED_DTYPE, device=device)
        runs = [(transport, weight, tokens, 0, COMPARED_HEAD_START) for transport in transports.values() for tokens in COMPARED_TOKENS]
        taken = [[seconds_of_call(*run) for run in runs] for _ in range(SAMPLES + 1)]
        mine = [statistics.median(samples) for samples in zip(*taken[1:])]
        said = agree.exchange(group_name, "the end of a comparison of transports", json.dumps(mine))
        slowest = [max(theirs) for theirs in zip(*map(json.loads, said))]
        sizes = len(COMPARED_TOKENS)
        seconds = {name: math.exp(statistics.fmean(map(math.log, slowest[i * sizes :][:sizes]))) for i, name in enumerate(transports)}
        log.info("compared transports in %.1f s, seconds of %s tokens: %s", time.perf_counter() - begin, COMPARED_TOKENS, slowest)
    if seconds != _kept_times(key):
        records.write("transports", key, seconds)
    return seconds


def _kept_times(key: dict) -> dict[str, float] | None:
    try:
        seconds = records.read("transports", key)
        return {name: float(seconds[name]) for name in key["transports"]}
    except (ValueError, TypeError, KeyError):  # not there, or not one of ours
        return None


def _key(owner, dtype, hidden) -> dict:
    gpu = torch.cuda.get_device_name(owner.device)
    of = {"transport": owner.name, "dtype": str(dtype).removeprefix("torch."), "hidden": hidden}
    return {**of, "gpu": gpu, "ranks": owner.world, "version": agree.version()}


def _lacking(owner, dtype, hidden, max_ctas) -> str | None:
    """Why this rank cannot measure, or None. It may take half of the memory that is free; what torch's allocator holds is not."""
    most = max(ctas for _, _, ctas in variants(owner.world))
    if max_ctas < most:
        return f"the signal pad of symmetric memory has room for {max_ctas} CTAs, and {most} are to be tried"
    # Workspaces for all powers of two are together as large as one for the next.
    needed = 2 * max(TWO_SHOT_SIZES) * hidden * (2 * dtype.itemsize + 4)
    free, _ = torch.cuda.mem_get_info(owner.device)
    return f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free" if needed > free / 2 else None


def _times(owner, dtype, hidden) -> dict[tuple[str, int, int], float]:
    """Seconds of this rank, medians over samples in turns."""
    always = {"one_shot": LEAST_ROWS - 1, "two_shot": 0}
    instruments = {kernel: owner.another(Tuning(rows, by_rule(owner.world).ctas)) for kernel, rows in always.items()}
    weight = torch.ones(hidden, dtype=dtype, device=owner.device)
    wanted = variants(owner.world)
    taken = [[seconds_of_call(instruments[kernel], weight, *size) for kernel, *size in wanted] for _ in range(SAMPLES + 1)]
    return {variant: statistics.median(samples) for variant, *samples in zip(wanted, *taken[1:])}


def seconds_of_call(instrument, weight, tokens, ctas, head_start=HEAD_START) -> float:
    """Seconds of a call that takes, as layer after layer does, what the one before has left in the workspace."""

    def site(x, residual):
        return instrument.fused(Site(x, residual, weight, ctas=ctas, fp32_residual=True, sharded_residual=True), True)

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(instrument.device)
    cuda_sleep(head_start)
    carried = site(weight.expand(tokens, -1), None)  # the ranks begin together
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
