"""What all ranks of a group do, or none: a step that fails on one of them fails on all, and nobody waits for who has failed."""

from collections.abc import Callable
from typing import TypeVar

from . import agree

_Done = TypeVar("_Done")


class WorkspaceError(RuntimeError):
    """What a site needs cannot be made on some rank. It is raised on all of them, and nothing is half made."""


def together(group_name: str, what: str, step: Callable[[], _Done], timeout_s: float) -> _Done:
    """What ``step`` returns here, once it has returned on every rank. A collective.

    Raises WorkspaceError on all ranks, with the reason, where it raises on any; and what ``agree.exchange`` raises.
    """
    done, reason, cause = None, "", None
    try:
        done = step()
    except Exception as error:
        reason, cause = f"{type(error).__name__}: {error}", error
    said = agree.exchange(group_name, what, reason, timeout_s)
    failed = [(rank, theirs) for rank, theirs in enumerate(said) if theirs]
    if failed:
        rank, reason = failed[0]
        raise WorkspaceError(f"{what} failed on rank {rank} of group {group_name}, so that no rank goes on: {reason}") from cause
    return done
