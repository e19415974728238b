"""The log, PyTorch's switches for it, and the message that autotuning takes time.

All messages go to the logger ``tw_compile``. ``TORCH_LOGS="tokenweave"`` shows each report (INFO); ``TORCH_LOGS="+tokenweave"`` also
shows the graphs before and after the passes (DEBUG). With ``TORCH_TRACE`` reports and graphs are artifacts, which ``tlparse`` shows with
those of Dynamo.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from . import compat, files

log = logging.getLogger("tw_compile")

_NAME = "tokenweave"


def register() -> None:
    """Make ``tokenweave`` the name of this package's log in TORCH_LOGS and ``torch._logging.set_logs``.

    PyTorch has read TORCH_LOGS before, and has set up a logger ``tokenweave``, as it takes the name for a module. The package's logger
    takes over its level and handlers.
    """
    requested = logging.getLogger(_NAME)
    if requested.handlers and not log.handlers:
        log.setLevel(requested.level)
        log.propagate = False  # as PyTorch sets it for all logs in TORCH_LOGS
        for handler in requested.handlers:
            log.addHandler(handler)
    if compat.has(compat.register_log):
        compat.register_log(_NAME, log.name)


def compile_id() -> Any:
    """Dynamo's id of the graph that it compiles now; None outside of a compilation."""
    return compat.CompileContext.current_compile_id() if compat.has(compat.CompileContext) else None


def is_last_compilation(of: Any) -> bool:
    """Whether Dynamo would not compile the code of a graph again, and run it uncompiled instead. of: the ``compile_id()`` of the graph"""
    if of is None or not compat.has(compat.dynamo_config) or compat.dynamo_config.fail_on_recompile_limit_hit:
        return False
    return bool(of.frame_compile_id + 1 >= compat.dynamo_config.recompile_limit)


def artifact(name: str, text: Callable[[], str], of: Any, level: int = logging.DEBUG) -> None:
    """Write a text to the log and to TORCH_TRACE.

    name:  the artifact's name without "tokenweave_"
    text:  makes the text; called only if log or trace is on
    of:    the ``compile_id()`` of its graph
    level: the level in the log
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
def say_that_it_autotunes() -> None:
    """Warn once, on rank 0 only, that the first compilation autotunes, about how long that takes, and where the plan is cached."""
    if dist.get_rank() == 0:
        log.warning(
            "autotuning for this machine: it takes some seconds, once for each kind of model. The plan is cached in %s. "
            "tw_compile.warmup autotunes before the first call",
            files.directory(),
        )
