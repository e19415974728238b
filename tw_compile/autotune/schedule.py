"""Whether weaving a graph pays on this machine, and how: measured, in seconds, before the graph is compiled for the first time.

What decides is how GEMMs take to being cut in two, and to the SMs and the bandwidth that they lose, wave by wave; no formula of ours
came within the few per cent that are at stake. So the GEMMs, the attention and the sites of two layers are run as the compiled
graph will run them: fused, and woven with several numbers of CTAs and cuts, at several numbers of tokens. What is the same on both
sides, such as elementwise kernels, is left out.

What comes of it is a ``Plan``, the same on all ranks: of the times of the slowest one. Plans are kept on disk.
"""

import functools
import gc
import json
import logging
import statistics
import time
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from .. import logs, records
from ..compat import cuda_sleep, resolve_process_group
from ..options import Options
from ..site import Site
from ..transports import agree, choose
from .plan import SPLIT_RATIOS, Plan, by_rule, by_times, first_half, rule_of_cut

log = logging.getLogger("tw_compile")

# Tokens at which a graph of any number of tokens is tuned, and elements of the reduced values at the most: more tokens are taken
# to be like so many.
SIZES = 256, 512, 1024, 2048, 4096, 8192
MAX_ELEMENTS = 1 << 26

PHASES = 4  # of compute between two sites: two layers
CTAS = 4, 6, 8, 12, 16, 24
SAMPLES = 5
# Clocks for which the GPU waits before each sample: the host has enqueued most of it by then, and is not what is measured.
HEAD_START = 5_000_000


@dataclass(frozen=True)
class Section:
    """What of a graph is run to tune its schedule.

    hidden, dtype: of the reduced values
    sizes:         numbers of tokens
    sequences:     that the tokens are; if there are several, the cut is between them
    ctas:          that the user asked for; 0 for any
    phases:        the work in front of each site but the first: ("mm", rows, columns) of a GEMM's weight, the last one's columns being
                   ``hidden``; ("attention", heads, heads of keys and values, channels of a head)
    """

    hidden: int
    dtype: str
    sizes: tuple
    sequences: int
    ctas: int
    phases: tuple

    @classmethod
    def from_dict(cls, data: dict) -> "Section":
        """From ``asdict``, also after a detour through JSON, which knows no tuples."""
        phases = tuple(tuple(map(tuple, phase)) for phase in data["phases"])
        return cls(**{**data, "sizes": tuple(data["sizes"]), "phases": phases})


def possible(device: torch.device) -> bool:
    return device.type == "cuda"


def sms_of(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def known(section: Section, group: str, device: torch.device, requested: str) -> Plan | None:
    """The plan for a section that this machine has on disk."""
    try:
        return Plan(**records.read("plan", _key(section, group, device, requested)))
    except TypeError:  # not there, or not one of ours
        return None


def agree_on(section: Section | None, group: str, device: torch.device, requested: str, mine: Plan | None) -> Plan | None:
    """The plan of all ranks of the group: that of the first one that has any, or what they now measure together. A collective.

    section: of this rank, whose graph may differ; that of the first rank that has one is tuned. None goes by a rule
    mine:    what this rank has
    """
    said = agree.exchange(group, "the plan of a graph", json.dumps((section and asdict(section), mine and asdict(mine))))
    sections, plans = zip(*map(json.loads, said))
    plan = next((Plan(**theirs) for theirs in plans if theirs), None)
    first = next((Section.from_dict(theirs) for theirs in sections if theirs), None)
    if plan is None and first is None:
        return None
    if plan is None:
        plan = _tune_schedule(first, group, device, requested)
        gc.collect()  # the workspaces, of which some things refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    section = section or first
    if section is not None and plan.gain is not None and plan != known(section, group, device, requested):
        records.write("plan", _key(section, group, device, requested), asdict(plan))
    return plan


def _key(section: Section, group: str, device: torch.device, requested: str) -> dict:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    world = resolve_process_group(group).size()
    return {"section": asdict(section), "transport": requested, "gpu": gpu, "ranks": world, "version": agree.version()}


def _tune_schedule(section: Section, group: str, device: torch.device, requested: str) -> Plan:
    begin = time.perf_counter()
    logs.say_that_it_tunes()
    transport = choose.another(requested, group, device)
    stage = Stage(section, transport, device)
    lacking = agree.exchange(group, "the tuning of a schedule", stage.set() or "")
    if any(lacking):
        plan = by_rule(section.hidden, sms_of(device))
        log.warning("the schedule is not tuned, so that it is woven from %d tokens on by a rule: %s", plan.min_tokens, max(lacking))
        return plan
    ctas = (section.ctas,) if section.ctas or transport.name == "process_group" else CTAS

    def plan_of(variants):
        times = [stage.times([None, *variants], tokens) for tokens in section.sizes]
        said = agree.exchange(group, "the end of the tuning of a schedule", json.dumps(times))
        slowest = [list(map(max, *at_size)) for at_size in zip(*map(json.loads, said))]
        fused, *woven = zip(*slowest)
        log.info("schedule, %s tokens: fused %s s; (CTAs, split ratio) %s", section.sizes, fused, dict(zip(variants, woven)))
        return by_times(section.sizes, fused, dict(zip(variants, woven)))

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        even = plan_of([(c, 0.5) for c in ctas])
        plan = plan_of([(even.ctas, ratio) for ratio in SPLIT_RATIOS])
    log.info("schedule tuned in %.1f s: %s", time.perf_counter() - begin, plan)
    return plan


class Stage:
    """Where a section is run."""

    def __init__(self, section, transport, device):
        self.section, self.transport, self.device, self.dtype = section, transport, device, getattr(torch, section.dtype)
        ops = {op for phase in section.phases for op in phase}
        self.weights = {op[1:]: None for op in sorted(ops) if op[0] == "mm"}  # (rows, columns) -> tensor
        self.channels = max(section.hidden, *(op[1] * op[3] if op[0] == "attention" else op[1] for op in ops))
        self.columns = max(columns for _, columns in self.weights)

    def set(self) -> str | None:
        """Make the tensors. Returns why not, if there is not the memory for them and what comes of them."""
        if lacking := self._lacks_memory():
            return lacking
        generator = torch.Generator(self.device).manual_seed(0)  # the user's stays as it is
        draw = functools.partial(torch.randn, generator=generator, device=self.device, dtype=self.dtype)
        try:
            # As models have them, transposed; random, since zeros take less power, and so are faster.
            self.weights = {(k, n): draw(n, k).mul_(k**-0.5).t() for k, n in self.weights}
            self.values = draw(max(self.section.sizes) * self.channels)
            self.weight = torch.ones(self.section.hidden, device=self.device, dtype=self.dtype)
        except torch.OutOfMemoryError as error:  # it was free, but in pieces
            return str(error)

    def _lacks_memory(self) -> str | None:
        """Tuning may take half of what is free."""
        if self.device.type == "cpu":
            return None
        tokens = max(self.section.sizes)
        # A value going in and one coming out; workspaces of three slots: sums and residuals, in float32 too.
        elements = sum(k * n for k, n in self.weights) + tokens * (self.channels + 2 * self.columns + 12 * self.section.hidden)
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        needed = elements * self.dtype.itemsize
        return f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free" if needed > free / 2 else None

    def times(self, variants, tokens) -> list[float]:
        """Seconds of this rank, medians over samples in turns. variants: None, fused, or (ctas, split_ratio), woven."""
        runs = []
        for variant in variants:
            sequence, sequences = tokens // self.section.sequences, self.section.sequences
            ctas, split_ratio = variant or (0, 0.5)
            length, step = (tokens, 1) if sequences == 1 else (sequences, sequence)
            first = first_half(length, rule_of_cut(length, step, Options(), split_ratio), split_ratio) * step
            pieces = [first, sequence * sequences - first] if variant else [sequence * sequences]
            runs.append(functools.partial(self.run, pieces, sequence, ctas))
        taken = [[self._seconds(run) for run in runs] for _ in range(SAMPLES + 1)]
        return [statistics.median(samples) for samples in zip(*taken[1:])]

    def _seconds(self, run):
        x = self.values[: 8 * self.section.hidden].view(8, -1)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            cuda_sleep(HEAD_START)
        self._fused(x, None, 0, 0)  # the ranks begin together
        if self.device.type == "cpu":
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def run(self, pieces, sequence, ctas):
        """All phases: fused where there is one piece, woven where there are more, each behind ``sequence`` tokens or fewer."""
        norms, residuals = [self.value(tokens, self.section.hidden) for tokens in pieces], [None] * len(pieces)
        woven, begun = len(pieces) > 1, set()
        for number, phase in enumerate(self.section.phases):
            for slot in range(len(pieces)):
                if slot in begun:
                    norms[slot], residuals[slot] = self.transport.wait(slot, True)
                x = self.compute(phase, norms[slot], slot, sequence, sum(pieces[:slot]) % sequence)
                if woven:
                    self.transport.start(self._site(x, residuals[slot], ctas, slot, number))
                    begun.add(slot)
                else:
                    norms[slot], residuals[slot] = self._fused(x, residuals[slot], slot, number)
        for slot in begun:
            self.transport.wait(slot, True)

    def compute(self, phase, norm, slot, sequence, before):
        self.work(phase[:-1], norm, sequence, before)
        rows, columns = phase[-1][1:]
        return self.transport.linear(self._input(norm, rows), self.weights[rows, columns], None, slot)

    def work(self, ops, norm, sequence, before):
        for kind, *sizes in ops:
            if kind == "mm":
                torch.mm(self._input(norm, sizes[0]), self.weights[tuple(sizes)])
            else:
                self._attend(*sizes, norm.shape[0], sequence, before)

    def _attend(self, heads, kv_heads, channels, tokens, sequence, before):
        """Causal; of the tokens behind a cut within a sequence in two parts, as passes/rules/attention.py does it."""
        sequences, queries = (1, tokens) if before else (max(tokens // sequence, 1), min(tokens, sequence))

        def heads_of(number, length):
            return self.value(sequences * length, number * channels).view(sequences, length, number, channels).transpose(1, 2)

        gqa = {"enable_gqa": True} if heads != kv_heads else {}
        query, keys = heads_of(heads, queries), heads_of(kv_heads, queries)
        F.scaled_dot_product_attention(query, keys, keys, is_causal=True, **gqa)
        if before:
            keys = heads_of(kv_heads, before)
            F.scaled_dot_product_attention(query, keys, keys, **gqa)

    def _fused(self, x, residual, slot, number):
        return self.transport.fused(self._site(x, residual, 0, slot, number), True)

    def _site(self, x, residual, ctas, slot, number):
        return Site(x, residual, self.weight, ctas=ctas, slot=slot, number=number, fp32_residual=True, sharded_residual=True)

    def _input(self, norm, channels):
        return norm if channels == self.section.hidden else self.value(norm.shape[0], channels)

    def value(self, tokens, channels):
        return self.values[: tokens * channels].view(tokens, channels)
