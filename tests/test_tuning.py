"""The tuning: what follows from times, and that all ranks have the same, however they came to it."""

import contextlib
import json
import logging
import math
import os
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from tw_compile.transports.process_group import ProcessGroup
from tw_compile.transports.symmetric import tuning
from tw_compile.transports.symmetric.tuning import (
    LEAST_ROWS,
    MARGIN,
    ONE_SHOT_SIZES,
    TWO_SHOT_SIZES,
    Tuning,
    by_rule,
    by_times,
    variants,
)
from tw_compile.transports.symmetric.workspace import Workspace

WORLDS = range(2, 9)
HIDDEN = 64
A, B = Tuning(3, ((1, 16),)), Tuning(8, ((1, 32), (129, 8)))


# --- What follows from times -----------------------------------------------------------------------------------------


def flat(world, **faster):
    """Equal times, but for the variants for which a function of (tokens, CTAs), by the kernel's name, gives a factor."""
    return {v: faster.get(v[0], lambda *_: 1.0)(*v[1:]) for v in variants(world)}


def measured_sizes(choice):
    """What a tuning says of the sizes that are measured."""
    return [choice.kernel_of(tokens) for tokens in ONE_SHOT_SIZES], [choice.ctas_alone(tokens) for tokens in TWO_SHOT_SIZES]


def test_the_rule():
    assert {world: by_rule(world).one_shot_rows for world in (2, 4, 8)} == {2: 31, 4: 16, 8: 6}
    assert [by_rule(4).kernel_of(rows) for rows in (1, 16, 17, 31, 32)] == ["one_shot"] * 2 + ["two_shot"] * 3
    assert [by_rule(4).ctas_alone(rows) for rows in (32, 512, 513, 8192)] == [32, 32, 8, 8]
    assert [by_rule(2).ctas_alone(rows) for rows in (32, 256, 257, 8192)] == [32, 32, 16, 16]


@pytest.mark.parametrize("world", WORLDS)
def test_noise_changes_nothing(world):
    noise = random.Random(world)
    for _ in range(100):
        times = {variant: noise.uniform(1.0, 1.0 + MARGIN) for variant in variants(world)}
        assert by_times(world, times).one_shot_rows == by_rule(world).one_shot_rows
        assert measured_sizes(by_times(world, times)) == measured_sizes(by_rule(world))


@pytest.mark.parametrize("world", WORLDS)
def test_whatever_was_measured(world):
    draw = random.Random(world)
    for spread in (0.01, 0.05, 0.5, 3.0):
        for _ in range(100):
            times = {variant: math.exp(draw.gauss(0.0, spread)) for variant in variants(world)}
            choice, rule = by_times(world, times), by_rule(world)
            kernels = [choice.kernel_of(rows) for rows in range(1, 2 * LEAST_ROWS)]
            assert kernels == sorted(kernels) and kernels[LEAST_ROWS - 1] == "two_shot", "one_shot only up to some number of tokens"
            for tokens in TWO_SHOT_SIZES:
                of_ctas = {ctas: times["two_shot", tokens, ctas] for _, t, ctas in variants(world) if t == tokens}
                taken = choice.ctas_alone(tokens)
                assert taken == rule.ctas_alone(tokens) or of_ctas[taken] < (1 - MARGIN) * of_ctas[rule.ctas_alone(tokens)]
                assert of_ctas[taken] <= min(of_ctas.values()) / (1 - MARGIN)

            def seconds(switch):
                """The product of the times of all sizes."""
                sizes = [(tokens, 0 if tokens <= switch else rule.ctas_alone(tokens)) for tokens in ONE_SHOT_SIZES]
                return math.prod(times["two_shot" if ctas else "one_shot", tokens, ctas] for tokens, ctas in sizes)

            fastest = min(map(seconds, (0, *ONE_SHOT_SIZES)))
            assert seconds(choice.one_shot_rows) <= fastest / (1 - MARGIN) ** len(ONE_SHOT_SIZES) * (1 + 1e-9)
            assert by_times(world, {variant: 4 * s for variant, s in times.items()}) == choice, "whatever the unit"


@pytest.mark.parametrize("world", (2, 4, 8))
def test_where_one_shot_ends(world):
    def switch(one_shot):
        return by_times(world, flat(world, one_shot=one_shot)).one_shot_rows

    assert switch(lambda *_: 0.5) == LEAST_ROWS - 1
    assert switch(lambda *_: 2.0) == 0
    assert switch(lambda tokens, _: 0.5 if tokens <= 8 else 2.0) == 8
    assert switch(lambda tokens, _: 1.05 if tokens == 1 else 0.5) == LEAST_ROWS - 1, "one odd time does not decide"
    assert switch(lambda tokens, _: 0.5 if tokens == 16 else 1.0) == max(16, by_rule(world).one_shot_rows)
    assert switch(lambda tokens, _: 0.97 if tokens == 31 else 1.1 if tokens == 24 else 1.0) == min(16, by_rule(world).one_shot_rows)


def test_ctas():
    assert by_times(2, flat(2, two_shot=lambda _, ctas: abs(ctas - 16) + 1)).ctas == ((1, 16),)
    assert by_times(4, flat(4)).ctas == by_rule(4).ctas
    few = by_times(4, flat(4, two_shot=lambda tokens, ctas: 1.0 if (ctas == 8) == (tokens > 64) else 1.1))
    assert few.ctas == ((1, 32), (65, 8))
    twice = by_times(4, flat(4, two_shot=lambda tokens, ctas: 0.9 if (tokens, ctas) == (128, 8) else 1.0))
    assert twice.ctas == ((1, 32), (65, 8), (129, 32), (513, 8))
    assert by_times(3, flat(3, two_shot=lambda _, ctas: 0.9 if ctas == 10 else 1.0)).ctas == ((1, 32), (257, 10)), "the rule's own"


def test_it_is_the_same_after_json():
    for choice in (A, B, by_rule(4)):
        assert Tuning.from_dict(json.loads(json.dumps(asdict(choice)))) == choice


@pytest.mark.parametrize("rows", (-1, LEAST_ROWS))
def test_one_shot_has_no_room_for_more(rows):
    with pytest.raises(ValueError, match=f"up to {rows} tokens"):
        Tuning(rows, ((1, 8),))


# --- On ranks --------------------------------------------------------------------------------------------------------


class Event:
    """A CUDA event of a device that has done all at once."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)

    def synchronize(self):
        pass


class Sites(ProcessGroup):
    """In place of Symmetric: over the process group, in workspaces of this process's memory."""

    def __init__(self, tuning=None):
        super().__init__(dist.group.WORLD.group_name, torch.device("cpu"))
        self.name, self.group_name, self.device = "peer", dist.group.WORLD.group_name, torch.device("cpu")
        self.rank, self.world, self.timeout_s, self.error_address, self.tuning = dist.get_rank(), dist.get_world_size(), 60.0, 0, tuning
        self.calls, self.others = [], []

    def another(self, tuning):
        self.others.append(Sites(tuning))
        return self.others[-1]

    def fused(self, site, in_workspace):
        self.calls.append((len(site.x), site.ctas))
        return super().fused(site, in_workspace)

    def workspace(self, rows=64, hidden=HIDDEN):
        return Workspace(self, torch.bfloat16, hidden, rows)


class Rank:
    """A rank with a GPU of 1 GB and a disk of its own, in a process that has measured nothing yet."""

    def __init__(self, folder, free=1 << 30, **patches):
        self.measured, self.records = 0, []

        def rendezvous(memory, group_name):
            rank, world = dist.get_rank(), dist.get_world_size()
            pointers = dict(buffer_ptrs=[memory.data_ptr()] * world, signal_pad_ptrs=[0] * world, multicast_ptr=0)
            return SimpleNamespace(rank=rank, world_size=world, **pointers)

        def times(*args, times=patches.pop("_times", tuning._times)):
            self.measured += 1
            return times(*args)

        cuda = dict(
            get_device_name=lambda device: "GPU", mem_get_info=lambda device: (free, 1 << 30), set_device=lambda device: None,
            synchronize=lambda device: None, _sleep=lambda clocks: None, Event=Event,
        )  # fmt: skip
        self.handler = logging.Handler()
        self.handler.emit = self.records.append
        self.patches = [
            mock.patch.multiple(torch.cuda, **cuda),
            mock.patch.multiple(symm_mem, empty=torch.empty, rendezvous=rendezvous),
            mock.patch.multiple(tuning, _times=times, **patches),
            mock.patch.dict(tuning._measured, clear=True),
            mock.patch.dict(os.environ, TW_COMPILE_CACHE_DIR=folder),
        ]

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch)
            self.stack = stack.pop_all()
        tuning.log.addHandler(self.handler)
        return self

    def __exit__(self, *error):
        tuning.log.removeHandler(self.handler)
        self.stack.__exit__(*error)

    @property
    def warnings(self):
        return [record.getMessage() for record in self.records if record.levelno >= logging.WARNING]


def really():
    """On a rank: a tuning measured, on sites over the process group."""
    with tempfile.TemporaryDirectory() as folder, Rank(folder, SAMPLES=1, CALLS=2, TWO_SHOT_SIZES=(32, 64)) as rank:
        sites, before = Sites(), torch.get_rng_state()
        first, second, third = sites.workspace(), sites.workspace(128), Sites().workspace()
        assert torch.equal(torch.get_rng_state(), before)
        (path,), one_shot, two_shot = Path(folder).iterdir(), *sites.others
        kept = Tuning.from_dict(json.loads(path.read_bytes())["value"])
        calls = {other.tuning.one_shot_rows: set(other.calls) for other in (one_shot, two_shot)}
        return [first.tuning, second.tuning, third.tuning, kept], rank.measured, calls, sites.calls


def test_it_is_measured_once_on_sites_of_its_own(ranks):
    (tunings, measured, calls, users), (others, *_) = ranks(really)
    assert len({*tunings, *others}) == 1 and measured == 1
    assert calls == {
        LEAST_ROWS - 1: {(tokens, 0) for tokens in ONE_SHOT_SIZES},
        0: {(tokens, 32) for tokens in ONE_SHOT_SIZES} | {(tokens, ctas) for tokens in (32, 64) for ctas in (8, 16, 32)},
    }
    assert users == [], "the user's slots are not touched"


def with_times_of_its_own():
    """On a rank: each finds one of the kernels slow at some sizes."""

    def times(*_):
        return flat(2, one_shot=lambda tokens, _: [2.0 if tokens == 31 else 1.0, 2.0 if tokens == 24 else 1.0][dist.get_rank()])

    with tempfile.TemporaryDirectory() as folder, Rank(folder, _times=times):
        return Sites().workspace().tuning


def test_the_slowest_rank_decides(ranks):
    assert [choice.one_shot_rows for choice in ranks(with_times_of_its_own)] == [16, 16]


def where_one_rank_cannot(free, max_ctas):
    with tempfile.TemporaryDirectory() as folder, Rank(folder, free if dist.get_rank() else 1 << 30) as rank:
        with mock.patch.object(symm_mem, "get_signal_pad_size", return_value=4 * 2 * max_ctas):
            tunings = [Sites().workspace().tuning for _ in range(2)]
        return tunings, rank.measured, os.listdir(folder), rank.warnings


@pytest.mark.parametrize(
    "free, max_ctas, reason",
    [(1 << 20, 32, "it needs 0.0 GB, and may take half of the 0.0 GB that are free"), (1 << 30, 31, "has room for 31 CTAs")],
)
def test_where_one_rank_cannot_all_go_by_a_rule(ranks, free, max_ctas, reason):
    for tunings, measured, files, warnings in ranks(where_one_rank_cannot, free, max_ctas):
        assert tunings == [by_rule(2)] * 2 and measured == 0 and files == []
        (warning,) = warnings
        assert warning.startswith("kernels for torch.bfloat16 [64] are not tuned") and reason in warning


def of_ranks_with_different_disks(cases):
    """Each rank in processes that find what is of its rank on its disk."""
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        with Rank(folder, _times=lambda *_: flat(2)):
            Sites().workspace()
        (path,) = Path(folder).iterdir()
        for contents in cases:
            content = contents[dist.get_rank()]
            path.unlink(missing_ok=True) if content is None else path.write_text(content)
            with Rank(folder, _times=lambda *_: flat(2, one_shot=lambda *_: 2.0)) as rank:
                sites = Sites()
                seen.append(([sites.workspace().tuning, sites.workspace(128).tuning], rank.measured))
    return seen


A_JSON, B_JSON = (json.dumps({"value": asdict(choice)}) for choice in (A, B))
NEW = Tuning(0, by_rule(2).ctas)
CASES = {  # what is on each rank's disk -> what they agree on, measurements
    (A_JSON, A_JSON): ([A, A], 0),
    (A_JSON, B_JSON): ([A, A], 0),
    (None, B_JSON): ([B, B], 0),
    (None, None): ([NEW, NEW], 1),
    ("{", json.dumps({"value": {"one_shot_rows": 500, "ctas": [[1, 8]]}})): ([NEW, NEW], 1),
    ("[]", "{}"): ([NEW, NEW], 1),
}


def test_ranks_with_different_disks_agree(ranks):
    for seen in ranks(of_ranks_with_different_disks, list(CASES)):
        assert seen == list(CASES.values())


def without_a_disk():
    with tempfile.NamedTemporaryFile() as no_folder, Rank(no_folder.name, _times=lambda *_: flat(2)) as rank:
        return [Sites().workspace().tuning for _ in range(2)], rank.measured


def test_a_disk_that_cannot_be_written_does_no_harm(ranks):
    assert ranks(without_a_disk) == [([by_rule(2)] * 2, 1)] * 2


def given():
    with tempfile.TemporaryDirectory() as folder, Rank(folder) as rank:
        return Sites(A).workspace().tuning, rank.measured, tuning.known(Sites(), torch.bfloat16, HIDDEN)


def test_one_that_is_given_is_not_measured_nor_kept(ranks):
    assert ranks(given) == [(A, 0, None)] * 2


def of_another_hidden_size():
    with tempfile.TemporaryDirectory() as folder, Rank(folder, _times=lambda *_: flat(2)):
        Sites().workspace()
        try:
            Sites().workspace(hidden=HIDDEN * (1 + dist.get_rank()))
        except RuntimeError as error:
            return str(error)


def test_ranks_that_run_different_things_raise_an_error(ranks):
    """Where one of them has to measure first, and the other has not."""
    for message in ranks(of_another_hidden_size):
        assert "do different things" in message and "null" not in message
        assert "rank 0 is at the set-up of a workspace for up to 64 tokens of torch.bfloat16 [64]" in message
        assert "rank 1 is at the set-up of a workspace for up to 64 tokens of torch.bfloat16 [128]" in message


class Lost(Sites):
    """Whose kernels have given up waiting."""

    def raise_if_lost(self, cause):
        raise RuntimeError("rank 0 waited for rank 1") from cause


def test_a_rank_that_is_lost_meanwhile_is_named(world):
    def fail(self):
        raise RuntimeError("CUDA error: unspecified launch failure")

    failing = mock.patch.object(Event, "synchronize", fail)
    with tempfile.TemporaryDirectory() as folder, Rank(folder), failing, pytest.raises(RuntimeError, match="rank 0 waited for rank 1"):
        tuning.seconds_of_call(Lost(A), torch.ones(HIDDEN), 4, 0)
