"""What lies between the ranks of a group: on which hosts they are, and how fast the process group is there.

Plans that were measured over one link are not used over another one, as after ``NCCL_P2P_DISABLE=1``, or in another cluster.
"""

import collections
import contextlib
import json
import math
import platform
import statistics
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..compat import resolve_process_group
from . import agree
from .together import together

BYTES = 16 << 20  # of an all-reduce that is measured
SAMPLES = 5
CALLS = 5  # all-reduces in a sample


def host() -> str:
    """Identifies the machine of this process."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return platform.node()


def apart(hosts: list[str]) -> str:
    """Why the ranks of a group cannot have each other's memory mapped; '' if they are on one host. hosts: the host of each rank"""
    other = next((rank for rank, theirs in enumerate(hosts) if theirs != hosts[0]), None)
    return "" if other is None else f"the ranks of the group are not all on one host: rank {other} is not where rank 0 is"


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
