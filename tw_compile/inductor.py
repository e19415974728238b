"""What stands between a rewritten graph and Inductor: the user's own passes, layers that are compiled as one, and no mode of the caller's."""

import contextlib
import functools
from collections.abc import Callable

import torch

from . import passes
from .compat import CustomInferenceAwareGraphPass, DisableAutocast, disable_current_modes, no_python_dispatcher
from .compat import inductor_config as config
from .report import Report
from .sizes import ForSizes, copied


@contextlib.contextmanager
def outside():
    """Outside of whatever Dynamo, AOTAutograd or the user has switched on: tensors are real, and ops do what they do alone."""
    with torch.inference_mode(False), torch.no_grad(), DisableAutocast(), disable_current_modes(), no_python_dispatcher():
        yield


def uncompiled(made: ForSizes, new: passes.Rewritten) -> Callable:
    """What runs a graph node by node."""
    gm = copied(made.gm, new.graph)

    def run(args):
        given = list(args)
        args.clear()
        with torch.no_grad():
            return gm(*given)

    return run


def user_passes() -> list[Callable]:
    """Inductor's ``post_grad_custom_pre_pass``, as functions of a graph."""
    given = config.post_grad_custom_pre_pass or ()
    given = given if isinstance(given, (list, tuple)) else (given,)
    aware = [isinstance(each, CustomInferenceAwareGraphPass) for each in given]
    return [functools.partial(each, is_inference=True) if knows else each for each, knows in zip(given, aware)]


def outline(gm: torch.fx.GraphModule, report: Report) -> None:
    """Let Inductor compile one of the layers that are alike."""
    if config.cpp_wrapper or config.fx_wrapper:
        report.reasons.append("each layer is compiled: only code in Python can call one for several")
        return
    layer, found = passes.outline(gm.graph)
    if layer is not None:
        report.alike = found
    elif found:
        report.reasons.append(f"each layer is compiled: {found}")
