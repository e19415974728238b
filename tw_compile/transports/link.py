"""What lies between the ranks of a group: on which hosts they are, and how fast the process group is there.

Plans that were measured over one link are not used over another one, as after ``NCCL_P2P_DISABLE=1``, or in another cluster.
"""

import collections
import contextlib
import json
import math
import os
import platform
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..compat import resolve_process_group
from . import agree
from .together import together

# This environment variable names the host of a process. Processes with different names are on different hosts, also on one machine.
HOST_NAME = "TW_COMPILE_HOST"
BYTES = 16 << 20  # of an all-reduce that is measured
SAMPLES = 5
CALLS = 5  # all-reduces in a sample


def host() -> str:
    """Identifies the machine of this process. A name can make two hosts of a machine, and never one of two."""
    machine = platform.node()
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        machine = file.read().strip()
    return f"{machine} {os.environ.get(HOST_NAME, '')}"


def apart(hosts: list[str]) -> str:
    """Why the ranks of a group cannot have each other's memory mapped; '' if they are on one host. hosts: the host of each rank"""
    other = next((rank for rank, theirs in enumerate(hosts) if theirs != hosts[0]), None)
    return "" if other is None else f"the ranks of the group are not all on one host: rank {other} is not where rank 0 is"


def nested(hosts: list[str]) -> list[list[int]] | str:
    """The ranks on each host; or why they make no hierarchy. hosts: the host of each rank"""
    on: dict[str, list[int]] = {}
    for rank, theirs in enumerate(hosts):
        on.setdefault(theirs, []).append(rank)
    numbers = [*map(len, on.values())]
    if len(numbers) == 1:
        return "all ranks of the group are on one host"
    if len(set(numbers)) > 1:
        return f"the group has different numbers of ranks on its hosts: {' + '.join(map(str, numbers))}"
    return "the group has one rank on each of its hosts" if numbers[0] == 1 else [*on.values()]


def measured(group_name: str, device: torch.device) -> str:
    """The link in words, the same on all ranks: how many ranks are on each host, and a class of GB/s. A collective of a CUDA group.

    Raises WorkspaceError on all ranks if a rank has no memory to measure it.
    """
    what = "the measurement of a link"
    x = together(group_name, what, lambda: torch.zeros(BYTES // 2, dtype=torch.bfloat16, device=device), agree.PATIENCE_S)
    group, taken = resolve_process_group(group_name), []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(1 + SAMPLES):
        begin.record()
        for _ in range(CALLS):  # one after the other, so that the time of the host is not in it
            dist.all_reduce(x, group=group)
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / CALLS)
    said = agree.exchange(group_name, f"the end of {what}", json.dumps((host(), statistics.median(taken[1:]))))
    return in_words(*zip(*map(json.loads, said)))


def in_words(hosts: Sequence[str], seconds: Sequence[float]) -> str:
    """The link of a group. hosts, seconds: of each rank, where it is, and how long an all-reduce of BYTES takes it"""
    ranks = "+".join(map(str, collections.Counter(hosts).values()))
    return f"{ranks} ranks, {speed(2 * (len(hosts) - 1) / len(hosts) * BYTES / max(seconds))}"


def speed(bytes_per_second: float) -> str:
    """A class of speeds. It is coarse, so that it is the same in each run."""
    least = 4 ** math.floor(math.log(max(bytes_per_second / 1e9, 1e-9), 4))
    return f"{least:g} to {4 * least:g} GB/s"
