"""``torch.compile(model, backend="tokenweave")``: all-reduces of tensor-parallel LLMs hidden behind compute.

The pipeline, in the order in which a graph meets it::

    backend.py     torch.compile's entry: options, training check, Inductor behind the passes
    forms.py       the fused and the woven form of a graph, and the choice in each call
    context.py     what all ranks have agreed on
    passes/        unshard -> find -> fuse -> split -> weave -> place, on ATen as Inductor gets it
    ops/           the ops that the rewritten graph calls, and how they communicate
    report.py      what was found, what was done, why not
"""

from . import logs
from .explain import Explanation, explain
from .options import TokenWeaveError
from .passes.find import AllReduce, register_all_reduce
from .passes.rules.token_axis import Split, TokenAxis, register_token_rule
from .report import Break, Refusal, Report, Site, reports
from .transports.choose import workspace_bytes
from .verify import Verification, verify
from .warmup import warmup

__all__ = [
    "AllReduce",
    "Break",
    "Explanation",
    "Refusal",
    "Report",
    "Site",
    "Split",
    "TokenAxis",
    "TokenWeaveError",
    "Verification",
    "explain",
    "register_all_reduce",
    "register_token_rule",
    "reports",
    "verify",
    "warmup",
    "workspace_bytes",
]

logs.register()
