"""How the ranks of a group find out whether they agree: through the group's store, since a collective that one of them does
not enter would hang."""

import functools
import hashlib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..compat import process_group_store, resolve_process_group

# How long a rank waits for another to come, which may be compiling: seconds.
PATIENCE_S = 600.0

_exchanges = Counter()  # of each group, the same on all its ranks


def exchange(group_name: str, what: str, message: str, timeout_s: float = PATIENCE_S) -> list[str]:
    """What each rank of the group says, in rank order. All ranks call this in the same order.

    what: for error messages: "rank 1 did not come to ..."
    Raises RuntimeError that names a rank which says nothing within ``timeout_s``.
    """
    group = resolve_process_group(group_name)
    store = dist.PrefixStore(f"tokenweave/{_exchanges[group_name]}", process_group_store(group))
    _exchanges[group_name] += 1
    store.set(str(group.rank()), message)
    said = []
    for rank in range(group.size()):
        try:
            store.wait([str(rank)], timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {rank} of group {group_name} did not come to {what} within {timeout_s:g} s, where rank {group.rank()} "
                "waited for it: see its log. All ranks of a tensor-parallel group must run the same model on as many tokens"
            ) from error
        said.append(store.get(str(rank)).decode())
    return said


@functools.cache
def version() -> str:
    """What must be the same on all ranks: torch, and this package to the last character."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cu", ".cuh")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return f"torch {torch.__version__}, tw_compile {digest.hexdigest()[:12]}"
