"""``torch.compile(model, backend="tokenweave")``: all-reduces of tensor-parallel LLMs hidden behind compute.

The pipeline, in the order in which a graph meets it::

    backend.py     torch.compile's entry: options, training check, Inductor behind the passes
    forms.py       the fused and the woven form of a graph, and the choice in each call
    context.py     what all ranks have agreed on
    passes/        unshard -> find -> fuse -> split -> weave -> place, on ATen as Inductor gets it; rules/: what may be cut, and how
    autotune/      whether, from how many tokens on and how a graph is woven on this machine
    ops/           the ops that the rewritten graph calls
    transports/    how they communicate: symmetric/ and process_group.py, and which of them
    site.py        what a site is given, and what it computes: the specification
    report.py      what was found, what was done, why not

Each imports only from those below it; tests/test_layout.py has the order of all modules.
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
