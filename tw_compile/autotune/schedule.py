"""Measures whether weaving a graph is faster on this machine, and how to weave it. It takes seconds, before the first compilation.

The result depends on how much slower GEMMs are when they are cut in two, and when they lose SMs and bandwidth. It changes with each
wave, and no known formula predicts it within the few per cent that matter. So the GEMMs, the attention and the sites of two layers run
as the compiled graph will run them: fused, and woven with several numbers of CTAs and split ratios, at several numbers of tokens. The GPU
time of other kernels is the same in both forms and is left out. Without CUDA graphs the host's time counts as well, as a woven graph
launches twice as many kernels: then the host gets no head start, and small kernels represent the other kernels.

The result is a ``Plan``, the same on all ranks, from the times of the slowest rank. The plan is cached on disk.
"""

import functools
import gc
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import logs, records, wording
from ..compat import cuda_sleep, missing_on_gpus, resolve_process_group
from ..options import Options
from ..site import Site
from ..transports import agree, choose
from ..transports.process_group import ProcessGroup
from ..transports.symmetric import gemms
from .operands import Gemm, bytes_of, channels_of, ends
from .plan import SPLIT_RATIOS, Plan, by_rule, by_times, first_half, rule_of_cut

log = logging.getLogger("tw_compile")

# Numbers of tokens at which a graph with a dynamic number is autotuned, and the most elements of a reduced value in a measurement. Larger
# sizes are taken to behave like the largest one that is measured.
SIZES = 256, 512, 1024, 2048, 4096, 8192
MAX_ELEMENTS = 1 << 26

PHASES = 4  # phases of compute, each between two sites: two layers
CTAS = 4, 6, 8, 12, 16, 24
RESERVED = 0, 4, 8  # SMs that GEMMs leave to the kernels of a process group beside them
SAMPLES = 5
# Clock cycles that the GPU waits before a sample while the host enqueues it. A site of the process group is several calls of the host.
HEAD_START, HEAD_START_OF_PROCESS_GROUP = 5_000_000, 40_000_000


@dataclass(frozen=True)
class Section:
    """The part of a graph that is run to autotune its schedule.

    hidden, dtype: hidden size and dtype of the reduced values
    sizes:         the numbers of tokens to measure
    sequences:     the number of sequences that the tokens belong to; with several, the cut is between sequences
    ctas:          the number of CTAs that the user asked for; 0 for any
    phases:        the ops before each site but the first: ("mm", rows, columns) with the shape of a GEMM's weight; ("gemm", ...), a
                   quantised one, as ``operands`` has it; ("attention", heads, heads of keys and values, channels of a head); ("experts",
                   experts, choices of a token, rows, columns), a grouped GEMM; ("others", number of other kernels); and ("unsplit", *op),
                   an op that needs both halves: one of these, or without ``op`` another. The last GEMM of a phase has ``hidden`` columns
    cuda_graphs:   whether CUDA graphs run the graph, so that the host's time does not count
    quantise:      the quantisation in which sites end, as ``site.Site`` has it; over the process group Inductor's kernels quantise
    """

    hidden: int
    dtype: str
    sizes: tuple
    sequences: int
    ctas: int
    phases: tuple
    cuda_graphs: bool
    quantise: str = ""

    @property
    def experts(self) -> list[tuple[int, int]]:
        """(experts, choices of a token) of each grouped GEMM that can be cut."""
        return [op[1:3] for phase in self.phases for op in phase if op[0] == "experts"]

    @classmethod
    def from_dict(cls, data: dict) -> "Section":
        """The section that ``asdict`` has turned into ``data``, also with lists in place of tuples, as from JSON."""
        return cls(**{name: _tuples(value) for name, value in data.items()})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def possible(device: torch.device) -> bool:
    """Whether schedules can be autotuned on a device."""
    return device.type == "cuda" and not missing_on_gpus()


def sms_of(device: torch.device) -> int | None:
    """The number of SMs of a GPU; None for another device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def known(section: Section, group: str, device: torch.device, requested: str) -> Plan | None:
    """The plan for a section that is cached on this machine; None if there is none."""
    value = records.read("plan", _key(section, group, device, requested))
    try:
        return Plan(**value) if value else None
    except TypeError:  # not the fields of a plan
        return None


def agree_on(section: Section | None, group: str, device: torch.device, requested: str, mine: Plan | None) -> Plan | None:
    """The plan of all ranks of the group: that of the first rank that has one, or else they autotune one together. A collective.

    section: the section of this rank. If ranks have different ones, that of the first rank that has one is autotuned. None if it has none
    mine:    the plan that this rank has, or None
    Returns None if no rank has a plan or a section: a rule then decides.
    """
    said = agree.exchange(group, "the plan of a graph", json.dumps((section and asdict(section), mine and asdict(mine))))
    sections, plans = zip(*map(json.loads, said))
    plan = next((Plan(**theirs) for theirs in plans if theirs), None)
    first = next((Section.from_dict(theirs) for theirs in sections if theirs), None)
    if plan is None:
        if first is None:
            return None
        plan = _autotune(first, group, device, requested)
        gc.collect()  # frees the workspaces, which contain reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
    section = section or first
    if section is not None and plan.gain is not None and plan != known(section, group, device, requested):
        records.write("plan", _key(section, group, device, requested), asdict(plan))
    return plan


def _key(section: Section, group: str, device: torch.device, requested: str) -> dict:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    world = resolve_process_group(group).size()
    (transport, _), link = choose.choose(requested, group, device), choose.links.get((group, device), "")
    return {
        "section": asdict(section), "requested": requested, "transport": transport.name, "link": link, "gpu": gpu, "ranks": world,
        "version": agree.version(),
    }  # fmt: skip


def _autotune(section: Section, group: str, device: torch.device, requested: str) -> Plan:
    """Measure a plan; a rule makes it if a rank has too little memory. A collective."""
    begin = time.perf_counter()
    logs.say_that_it_autotunes()
    transport = choose.another(requested, group, device)
    stage = Stage(section, transport, device)
    lacking = agree.exchange(group, "the autotuning of a schedule", stage.set() or "")
    if any(lacking):
        plan = by_rule(section.hidden, sms_of(device), section.experts)
        log.warning("a schedule is not autotuned, and a rule weaves from %d tokens on: %s", plan.min_tokens, max(lacking))
        return plan
    candidates = RESERVED if isinstance(transport, ProcessGroup) else CTAS
    ctas = (section.ctas,) if section.ctas else candidates

    def plan_of(variants: list[tuple[int, float]]) -> Plan:
        forms = [(*variant, experts) for experts in ((False, True) if section.experts else (False,)) for variant in variants]
        times = [stage.times([None, *forms], tokens) for tokens in section.sizes]
        said = agree.exchange(group, "the end of the autotuning of a schedule", json.dumps(times))
        slowest = [list(map(max, *at_size)) for at_size in zip(*map(json.loads, said))]
        fused, *woven = ([*of_form] for of_form in zip(*slowest))
        log.info("schedule, %s tokens: fused %s s; (CTAs, split ratio, experts cut) %s", section.sizes, fused, dict(zip(forms, woven)))
        cut = woven[len(variants) :]
        return by_times(section.sizes, fused, dict(zip(variants, woven)), dict(zip(variants, cut)) if cut else None)

    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        even = plan_of([(c, 0.5) for c in ctas])
        plan = plan_of([(even.ctas, ratio) for ratio in SPLIT_RATIOS])
    log.info("schedule autotuned in %.1f s: %s", time.perf_counter() - begin, plan)
    return plan


class Stage:
    """Runs a section over a transport, and measures its time."""

    def __init__(self, section: Section, transport: Any, device: torch.device) -> None:
        self.section, self.transport, self.device, self.dtype = section, transport, device, getattr(torch, section.dtype)
        ops = dict.fromkeys(op[1:] if op[0] == "unsplit" else op for phase in section.phases for op in phase)
        self.weights: dict[tuple[int, ...], Any] = {key: None for op in ops if (key := _weight(op))}  # ([experts,] rows, columns) -> tensor
        self.gemms: dict[tuple, Any] = {op: None for op in ops if op[:1] == ("gemm",)}  # op -> Gemm
        self.channels = max(section.hidden, *map(_channels, ops))
        self.columns = max(map(_columns, ops))
        self.ends = functools.cache(functools.partial(ends, device))

    def set(self) -> str | None:
        """Make the tensors. Returns the reason if there is too little memory, or if a GEMM does not run; else None."""
        if lacking := self._lacks_memory():
            return lacking
        generator = torch.Generator(self.device).manual_seed(0)  # leaves the user's generator as it is
        draw = functools.partial(torch.randn, generator=generator, device=self.device, dtype=self.dtype)
        try:
            # Transposed, as in models. Random, as GEMMs of zeros take less power and so are faster.
            self.weights = {(*of, k, n): draw(*of, n, k).mul_(k**-0.5).transpose(-1, -2) for *of, k, n in self.weights}
            self.values = draw(max(self.section.sizes) * self.channels)
            weight, one = (torch.ones(shape, device=self.device) for shape in ((self.section.hidden,), ()))
            quantise = "" if self.transport.name.startswith("process_group") else self.section.quantise
            given = {"weight": weight.to(self.dtype), "quantise": quantise, "static_scale": one}
            carries = self.transport.name != "process_group"  # there Inductor's code keeps the residual in the model's dtype
            self.site: Callable[..., Site] = functools.partial(Site, **given, fp32_residual=carries, sharded_residual=True)
            self.small = torch.zeros(8, device=self.device, dtype=self.dtype)
            for op in self.gemms:
                self.gemms[op] = Gemm(op, max(self.section.sizes), draw)
        except torch.OutOfMemoryError as error:  # the free memory is fragmented
            return str(error)
        try:
            for gemm in self.gemms.values():
                gemm(max(self.section.sizes))
        except Exception as error:  # the ranks must know of any error
            return f"{gemm.op} does not run with operands that are made for it: {type(error).__name__}: {error}"
        return None

    def _lacks_memory(self) -> str | None:
        """The reason if tuning needs more than half of the free memory, else None."""
        if self.device.type == "cpu":
            return None
        tokens = max(self.section.sizes)
        # An input and an output; the workspaces of three slots: sums and residuals, also in float32.
        elements = sum(map(math.prod, self.weights)) + tokens * (self.channels + 2 * self.columns + 12 * self.section.hidden)
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        needed = elements * self.dtype.itemsize + sum(bytes_of(op, tokens) for op in self.gemms)
        return wording.memory_text(needed, free) if needed > free / 2 else None

    def times(self, variants: list[tuple[int, float, bool] | None], tokens: int) -> list[float]:
        """Seconds of each variant with so many tokens on this rank: the median of samples that are taken in turns.

        variants: None for fused, or (ctas, split_ratio, whether experts are cut) for woven
        """
        runs = []
        for variant in variants:
            sequence, sequences = tokens // self.section.sequences, self.section.sequences
            ctas, split_ratio, experts = variant or (0, 0.5, False)
            length, step = (tokens, 1) if sequences == 1 else (sequences, sequence)
            first = first_half(length, rule_of_cut(length, step, Options(), split_ratio), split_ratio) * step
            pieces = [first, sequence * sequences - first] if variant else [sequence * sequences]
            run = functools.partial(self.run, pieces, sequence, ctas, experts)
            runs.append(gemms.reserved(ctas)(run) if isinstance(self.transport, ProcessGroup) else run)
        taken = [[self._seconds(run) for run in runs] for _ in range(SAMPLES + 1)]
        return [statistics.median(samples) for samples in zip(*taken[1:])]

    def _seconds(self, run: Callable[[], None]) -> float:
        x = self.values[: 8 * self.section.hidden].view(8, -1).clone()
        if self.device.type == "cpu":
            self._fused(x, None, 0, 0)  # makes the ranks begin together
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        torch.cuda.synchronize(self.device)
        if self.section.cuda_graphs:
            cuda_sleep(HEAD_START_OF_PROCESS_GROUP if isinstance(self.transport, ProcessGroup) else HEAD_START)
        self._fused(x, None, 0, 0)  # as above
        if not self.section.cuda_graphs:
            torch.cuda.synchronize(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def run(self, pieces: list[int], sequence: int, ctas: int, experts: bool = False) -> None:
        """Run all phases once.

        pieces:   [tokens] for the fused form, [tokens of the first half, tokens of the second half] for the woven form
        sequence: tokens of each sequence
        ctas:     CTAs of each communication kernel; 0 leaves the number to the kernel
        experts:  whether experts are cut
        """
        norms, residuals = [self.value(tokens, self.section.hidden) for tokens in pieces], [None] * len(pieces)
        woven = len(pieces) > 1
        begun: set[int] = set()

        def finish(slot: int, norm: Tensor, residual: Tensor, *_: Tensor) -> None:
            norms[slot], residuals[slot] = norm if norm.numel() else norms[slot], residual

        def wait(slot: int) -> None:
            if slot in begun:
                begun.remove(slot)
                finish(slot, *self.transport.wait(slot, True))

        def work(ops: list[tuple], slot: int) -> None:
            wait(slot)
            self.work(ops, norms[slot], sequence, sum(pieces[:slot]) % sequence, skewed)

        for number, phase in enumerate(self.section.phases):
            skewed = number % PHASES >= PHASES // 2  # the experts of one layer get as many rows each, those of the next do not
            inner = phase if phase[-1][0] == "experts" else phase[:-1]
            if not experts:
                inner = tuple(("unsplit", *op) if op[0] == "experts" else op for op in inner)
            *before, last = _segments(inner) if woven else [[op[1:] if op[0] == "unsplit" else op for op in inner]]
            for ops in before:
                if ops[0][0] != "unsplit":
                    for slot in range(len(pieces)):
                        work(ops, slot)
                    continue
                for slot in range(len(pieces)):
                    wait(slot)
                self.work_unsplit(ops, pieces, sequence, skewed)
            for slot in range(len(pieces)):
                work(last, slot)
                x = self._reduced(phase[-1], pieces[slot], norms[slot], slot)
                if woven:
                    self.transport.start(self.site(x, residuals[slot], ctas=ctas, slot=slot, number=number))
                    begun.add(slot)
                else:
                    finish(slot, *self._fused(x, residuals[slot], slot, number))
        for slot in [*begun]:
            wait(slot)

    def _reduced(self, op: tuple, tokens: int, norm: Tensor, slot: int) -> Tensor:
        """What the last op of a phase gives to its site, where the site reads it."""
        kind, *sizes = op
        if kind == "experts":  # their rows are added up behind the GEMM; the process group reduces in place
            x = self.value(tokens, self.section.hidden)
            return x.clone() if isinstance(self.transport, ProcessGroup) else x
        if kind == "gemm":
            return self.gemms[op](tokens, self.transport.partials(slot, self.dtype, torch.Size((tokens, self.section.hidden))))
        return self.transport.linear(self._input(norm, sizes[0]), self.weights[tuple(sizes)], None, slot)

    def work(self, ops: list[tuple], norm: Tensor, sequence: int, before: int, skewed: bool = False) -> None:
        """Run ops on the tokens of ``norm``, which follow ``before`` tokens of the same sequence. skewed: see ``operands.ends``"""
        for op in filter(None, ops):
            kind, *sizes = op
            if kind == "mm":
                torch.mm(self._input(norm, sizes[0]), self.weights[tuple(sizes)])
            elif kind == "gemm":
                self.gemms[op](norm.shape[0])
            elif kind == "attention":
                heads, kv_heads, channels = sizes
                self._attend(heads, kv_heads, channels, norm.shape[0], sequence, before)
            elif kind == "experts":
                experts, choices, channels, _ = sizes
                rows, weight = norm.shape[0] * choices, self.weights[_weight((kind, *sizes))]
                F.grouped_mm(self.value(rows, channels), weight, offs=self.ends(experts, rows, skewed))
            elif not self.section.cuda_graphs:
                for _ in range(sizes[0]):
                    self.small.add_(1)

    def work_unsplit(self, ops: list[tuple], pieces: list[int], sequence: int, skewed: bool) -> None:
        """Run unsplit ops as a woven graph does: concatenate the halves of the input, and run the op on all tokens."""
        for op in filter(None, (op[1:] for op in ops)):
            torch.cat([self.value(tokens, _channels(op)) for tokens in pieces])
            self.work([op], self.value(sum(pieces), self.section.hidden), sequence, 0, skewed)

    def _attend(self, heads: int, kv_heads: int, channels: int, tokens: int, sequence: int, before: int) -> None:
        """Causal attention. Behind a cut within a sequence it is in two parts, as in passes/rules/attention.py."""
        sequences, queries = (1, tokens) if before else (max(tokens // sequence, 1), min(tokens, sequence))

        def heads_of(number: int, length: int) -> Tensor:
            return self.value(sequences * length, number * channels).view(sequences, length, number, channels).transpose(1, 2)

        gqa = {"enable_gqa": True} if heads != kv_heads else {}
        query, keys = heads_of(heads, queries), heads_of(kv_heads, queries)
        F.scaled_dot_product_attention(query, keys, keys, is_causal=True, **gqa)
        if before:
            keys = heads_of(kv_heads, before)
            F.scaled_dot_product_attention(query, keys, keys, **gqa)

    def _fused(self, x: Tensor, residual: Tensor | None, slot: int, number: int) -> tuple[Tensor, ...]:
        return self.transport.fused(self.site(x, residual, slot=slot, number=number), True)

    def _input(self, norm: Tensor, channels: int) -> Tensor:
        """An input with this number of channels for as many tokens as ``norm`` has; ``norm`` itself if it fits."""
        return norm if channels == self.section.hidden else self.value(norm.shape[0], channels)

    def value(self, tokens: int, channels: int) -> Tensor:
        """Some values of shape [tokens, channels]."""
        return self.values[: tokens * channels].view(tokens, channels)


def _channels(op: tuple) -> int:
    """The number of channels of an op's input."""
    kind, *sizes = op or ("unsplit",)
    if kind == "gemm":
        return channels_of(op)
    return {"mm": lambda: sizes[0], "attention": lambda: sizes[0] * sizes[2], "experts": lambda: sizes[1] * sizes[2]}.get(kind, lambda: 0)()


def _columns(op: tuple) -> int:
    """The number of channels of an op's product, for a token."""
    kind, *sizes = op or ("unsplit",)
    return {"mm": lambda: sizes[1], "gemm": lambda: sizes[1], "experts": lambda: sizes[1] * sizes[3]}.get(kind, lambda: 0)()


def _weight(op: tuple) -> tuple[int, ...]:
    """The key of an op's weight in ``Stage.weights``; () if it has none."""
    kind, *sizes = op or ("unsplit",)
    return {"mm": lambda: (*sizes,), "experts": lambda: (sizes[0], *sizes[2:])}.get(kind, lambda: ())()


def _segments(ops: tuple) -> list[list[tuple]]:
    """Ops in alternate lists: those that run on each half, and those that need both halves. The last list runs on each half."""
    segments = [list(same) for _, same in itertools.groupby(ops, key=lambda op: op[0] == "unsplit")]
    return segments if segments and segments[-1][0][0] != "unsplit" else [*segments, []]
