"""How the ranks of a group agree: through the group's store, as a collective hangs if a rank does not take part in it."""

import contextlib
import functools
import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ..compat import process_group_store, process_groups, resolve_process_group
from ..options import TokenWeaveError

log = logging.getLogger("tw_compile")

# Seconds that a rank waits for another one, which may be compiling.
PATIENCE_S = 600.0
# Seconds that a rank may be ahead, in its calls or with a graph that needs no exchange, before the ranks that wait for it give up.
GONE_ON_S = 10.0
# Seconds after which a rank says that it waits.
SILENT_S = 30.0
# Seconds after which a rank looks whether it is waited for in another group.
CROSSED_S = 1.0

# The number of exchanges of each group, the same on all its ranks. The key is the group, as another group may take its name later.
_exchanges: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()


class Crossed(RuntimeError):
    """Ranks wait for each other in different groups, as their threads compile in another order. The exchange must be made again."""


class PassedBy(RuntimeError):
    """Another rank leaves its graphs to Inductor alone, and does not come to the exchange."""


def is_alone(group: dist.ProcessGroup) -> bool:
    """Whether there is no other process in a group: it has one rank, or is a fake group."""
    return group.size() == 1 or dist.get_backend(group) == "fake"


class Progress:
    """The number of calls that each rank of a group has begun, in memory that the ranks of one host share.

    A rank that waits for another one reads there whether that one has gone on without it.
    """

    def __init__(self, path: str, rank: int, world: int) -> None:
        with open(path, "r+b") as file:
            self._counts = memoryview(mmap.mmap(file.fileno(), 8 * world)).cast("Q")
        self._rank = rank

    def begin_call(self) -> None:
        self._counts[self._rank] += 1

    def is_ahead(self, rank: int) -> bool:
        """Whether a rank has begun more calls than this one."""
        return self._counts[rank] > self._counts[self._rank]


def progress(group_name: str, may_cross: bool = False) -> "Progress | None":
    """A Progress for a group; None if its ranks do not share a host. A collective. may_cross: as of ``exchange``"""
    group = resolve_process_group(group_name)
    if is_alone(group):
        return None
    rank, world, path = group.rank(), group.size(), ""
    if rank == 0:
        with contextlib.suppress(OSError):
            handle, path = tempfile.mkstemp(prefix="tokenweave-", dir="/dev/shm")
            os.write(handle, bytes(8 * world))
            os.close(handle)
    try:
        said = exchange(group_name, "the first agreement", json.dumps((_host(), path)), may_cross=may_cross, may_leave=True)
        (host, theirs), *others = map(json.loads, said)
        counts = None
        if theirs and all(other == host for other, _ in others):
            with contextlib.suppress(OSError):
                counts = Progress(theirs, rank, world)
        opened = exchange(group_name, "the end of the first agreement", json.dumps(counts is not None), may_leave=True)
    finally:
        if path:
            os.unlink(path)
    return counts if all(map(json.loads, opened)) else None


def _host() -> str:
    """Identifies the processes that share /dev/shm with this one."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()} {os.stat('/dev/shm').st_dev} {os.getuid()}"
    return f"{uuid.getnode()} {os.getpid()}"  # shares with no other process


def pass_by(group_name: str) -> None:
    """Let the other ranks know that this rank makes no exchange for a graph, which it leaves to Inductor. Not a collective."""
    with contextlib.suppress(Exception):  # such as of a group without a store: nothing may fail for graphs that are not ours
        group = resolve_process_group(group_name)
        if not is_alone(group):
            _passing(group).add(str(group.rank()), 1)


def leave(group_name: str, why: str) -> None:
    """Let all ranks know that the graphs of a group are left to Inductor from now on. Not a collective."""
    with contextlib.suppress(RuntimeError):  # of a store that is gone
        _left(resolve_process_group(group_name)).set("left", why)


def _left(group: dist.ProcessGroup) -> dist.Store:
    return dist.PrefixStore("tokenweave", process_group_store(group))


def _passing(group: dist.ProcessGroup) -> dist.Store:
    """Rank -> how often it has passed by since the last exchange."""
    return dist.PrefixStore(f"tokenweave/passed/{_exchanges.get(group, 0)}", process_group_store(group))


def _passed(store: dist.Store, rank: int) -> int:
    return store.add(str(rank), 0)


def exchange(
    group_name: str,
    what: str,
    message: str,
    timeout_s: float = PATIENCE_S,
    progress: Progress | None = None,
    may_cross: bool = False,
    may_leave: bool = False,
) -> list[str]:
    """The messages of all ranks of the group, in rank order. A collective: all ranks must make their exchanges in the same order.

    what:      the purpose of the exchange, the same on all ranks, for error messages
    message:   the message of this rank
    timeout_s: seconds to wait for each rank
    progress:  shows whether a rank that does not come has gone on
    may_cross: whether the caller handles Crossed
    may_leave: whether this exchange is not made in a group whose graphs are left to Inductor
    Raises TokenWeaveError on all ranks if they are in different exchanges. Raises RuntimeError, which names the rank, if a rank does not
    come within ``timeout_s``, or begins another call of the model instead; PassedBy if it has passed by, or if the group's graphs are left
    to Inductor; and Crossed if another rank meanwhile waits for this one in another group. An exchange that raises RuntimeError has not
    taken place: the next one of this rank has its number.
    """
    group = resolve_process_group(group_name)
    if is_alone(group):
        return [message] * group.size()
    number, passing, crossed = _exchanges.get(group, 0), _passing(group), functools.partial(_awaited, group) if may_cross else None
    store = _store(group)
    _exchanges[group] = number + 1
    store.set(str(group.rank()), json.dumps((what, message)))
    said = []
    try:
        for rank in range(group.size()):
            gone_on = functools.partial(_gone_on, rank, group, passing, progress, may_leave)
            late = f"rank {group.rank()} waits for rank {rank} of group {group_name} to come to {what}, and goes on waiting"
            problem = _wait(store, rank, timeout_s, late, gone_on, crossed)
            if problem:
                raise (PassedBy if problem == _PASSED else RuntimeError)(
                    f"rank {rank} of group {group_name} {problem.format(what)}, where rank {group.rank()} waited for it: see its log. "
                    "All ranks of a tensor-parallel group must run the same model on the same number of tokens"
                )
            said.append(json.loads(store.get(str(rank))))
    except BaseException:
        _exchanges[group] = number
        with contextlib.suppress(RuntimeError):  # of a store that is gone
            store.delete_key(str(group.rank()))
        raise
    if len({theirs for theirs, _ in said}) > 1:
        places = "; ".join(f"rank {rank} is at {theirs}" for rank, (theirs, _) in enumerate(said))
        raise TokenWeaveError(
            f"the ranks of group {group_name} do different things: {places}. All ranks of a tensor-parallel group must run the "
            "same model on the same number of tokens, with the same options"
        )
    return [theirs for _, theirs in said]


def _gone_on(rank: int, group: dist.ProcessGroup, passing: dist.Store, progress: Progress | None, may_leave: bool) -> str:
    """What a rank does instead of an exchange, '{}' standing for the exchange; '' if nothing is known.

    Raises PassedBy if the group is left.
    """
    if may_leave and (left := _left(group)).check(["left"]):
        raise PassedBy(left.get("left").decode())
    if progress is not None and progress.is_ahead(rank):
        return "has called the model again and did not come to {}, so that only some ranks have a new graph"
    if _passed(passing, rank) > _passed(passing, group.rank()):
        return _PASSED
    return ""


_PASSED = "has left a graph to Inductor alone, as its mode is off or it runs with gradients, and did not come to {}"


def _store(group: dist.ProcessGroup) -> dist.Store:
    """Rank -> its message in the next exchange of a group."""
    return dist.PrefixStore(f"tokenweave/{_exchanges.get(group, 0)}", process_group_store(group))


def _awaited(group: dist.ProcessGroup) -> bool:
    """Whether a rank waits for this one in another group than this one."""
    others = [other for other in process_groups() if other is not group and not is_alone(other)]
    return any(_store(other).check([str(rank)]) for other in others for rank in range(other.size()) if rank != other.rank())


def _wait(
    store: dist.Store, rank: int, timeout_s: float, late: str, gone_on: Callable[[], str], crossed: Callable[[], bool] | None
) -> str | None:
    """Wait for the message of a rank. Returns what the rank has done instead, '{}' standing for the exchange; None if it has come."""
    begin, ahead_since, pause = time.monotonic(), None, 1e-4
    looked, said = begin, False
    while not store.check([str(rank)]):
        now = time.monotonic()
        if now - begin > timeout_s:
            return f"did not come to {{}} within {timeout_s:g} s"
        if now - begin > SILENT_S and not said:
            said = True
            log.warning(late)
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
        problem = gone_on()
        ahead_since = (ahead_since or now) if problem else None
        if ahead_since is not None and now - ahead_since > GONE_ON_S:
            return problem
        if crossed is not None and now - looked > CROSSED_S:
            looked = now
            if crossed():
                raise Crossed
    return None


@functools.cache
def version() -> str:
    """The version of torch, and a digest of this package's sources. They must be the same on all ranks."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".c")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return f"torch {torch.__version__}, tw_compile {digest.hexdigest()[:12]}"
