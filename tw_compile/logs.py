"""What is told while a program runs: the log, PyTorch's switches for it, and the one message that tuning takes time.

All messages go to the logger ``tw_compile``. ``TORCH_LOGS="tokenweave"`` shows each report (INFO), ``TORCH_LOGS="+tokenweave"`` also
the graphs before and after (DEBUG). ``TORCH_TRACE`` gets the same as artifacts, which ``tlparse`` shows beside Dynamo's own.
"""

import functools
import logging
from collections.abc import Callable

import torch.distributed as dist

from . import compat, files

log = logging.getLogger("tw_compile")

_NAME = "tokenweave"


def register() -> None:
    """Make ``tokenweave`` a name for this package's log in TORCH_LOGS and ``torch._logging.set_logs``.

    By now PyTorch has read TORCH_LOGS, taken the name for the module tokenweave.py, and set up the log of that name: it becomes ours.
    """
    requested = logging.getLogger(_NAME)
    if requested.handlers and not log.handlers:
        log.setLevel(requested.level)
        log.propagate = False  # as all logs that TORCH_LOGS shows
        for handler in requested.handlers:
            log.addHandler(handler)
    if compat.has(compat.register_log):
        compat.register_log(_NAME, log.name)


def compile_id():
    """Dynamo's number of the graph that is compiled now; None outside of a compilation."""
    return compat.CompileContext.current_compile_id() if compat.has(compat.CompileContext) else None


def artifact(name: str, text: Callable[[], str], of, level: int = logging.DEBUG) -> None:
    """Write a text to TORCH_TRACE, and to the log.

    name:  of the artifact, without "tokenweave_"
    text:  makes the text; called only where somebody reads it
    of:    the compile_id() of its graph, which may have been compiled earlier
    level: of the log
    """
    name = f"{_NAME}_{name}"
    if log.isEnabledFor(level):
        log.log(level, "%s of graph %s:\n%s", name, of, text())
    if compat.has(compat.trace_structured):
        compat.trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": "string"},
            payload_fn=text,
            expect_trace_id=False,
            compile_id=of,
        )


@functools.cache
def say_that_it_tunes() -> None:
    """Warn, once and on rank 0 only, that the first compilation takes longer, for how long, and where the results are kept."""
    if dist.get_rank() == 0:
        log.warning(
            "tuning for this machine: for 5 to 30 s, once for each kind of model. The plan is kept in %s. "
            "tw_compile.warmup does this before the first call",
            files.directory(),
        )
