"""Steps that succeed on all ranks of a group or fail on all of them, so that no rank waits for one that has failed."""

from collections.abc import Callable
from typing import TypeVar, cast

from . import agree

_Done = TypeVar("_Done")


class WorkspaceError(RuntimeError):
    """Something that a site needs could not be made on some rank. It is raised on all ranks of the group, and none keeps its part."""


def together(group_name: str, what: str, step: Callable[[], _Done], timeout_s: float) -> _Done:
    """Run ``step`` on every rank, and return its result on this rank. A collective.

    what:      the purpose of the step, the same on all ranks, for error messages
    timeout_s: seconds to wait for each rank
    Raises WorkspaceError on all ranks, with the reason, if ``step`` raises on any rank; and what ``agree.exchange`` raises.
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
    return cast(_Done, done)
