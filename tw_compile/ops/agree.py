"""How the ranks of a group find out whether they agree: through the group's store, since a collective that one of them does
not enter would hang."""

import functools
import hashlib
import json
import weakref
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store, _resolve_process_group

from ..options import TokenWeaveError

# How long a rank waits for another to come, which may be compiling: seconds.
PATIENCE_S = 600.0

# Exchanges of each group so far, the same on all its ranks. By the group itself: names come again when a group is destroyed.
_exchanges: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()


def is_alone(group: dist.ProcessGroup) -> bool:
    """Whether no other process stands behind the other ranks: a fake group, or one rank."""
    return group.size() == 1 or dist.get_backend(group) == "fake"


def exchange(group_name: str, what: str, message: str, timeout_s: float = PATIENCE_S) -> list[str]:
    """What each rank of the group says, in rank order. All ranks call this in the same order.

    what: what the exchange is for, the same on all ranks
    Raises TokenWeaveError on all ranks where they come to different exchanges, and RuntimeError that names a rank which says
    nothing within ``timeout_s``.
    """
    group = _resolve_process_group(group_name)
    if is_alone(group):
        return [message] * group.size()
    number = _exchanges.get(group, 0)
    _exchanges[group] = number + 1
    store = dist.PrefixStore(f"tokenweave/{number}", _get_process_group_store(group))
    store.set(str(group.rank()), json.dumps((what, message)))
    said = []
    for rank in range(group.size()):
        try:
            store.wait([str(rank)], timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {rank} of group {group_name} did not come to {what} within {timeout_s:g} s, where rank {group.rank()} "
                "waited for it: see its log. All ranks of a tensor-parallel group must run the same model on as many tokens"
            ) from error
        said.append(json.loads(store.get(str(rank))))
    if len({theirs for theirs, _ in said}) > 1:
        places = "; ".join(f"rank {rank} is at {theirs}" for rank, (theirs, _) in enumerate(said))
        raise TokenWeaveError(
            f"the ranks of group {group_name} do different things: {places}. All ranks of a tensor-parallel group must run the "
            "same model on as many tokens, with the same options"
        )
    return [theirs for _, theirs in said]


@functools.cache
def version() -> str:
    """What must be the same on all ranks: torch, and this package to the last character."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".c")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return f"torch {torch.__version__}, tw_compile {digest.hexdigest()[:12]}"
