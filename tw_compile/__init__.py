"""``torch.compile(model, backend="tokenweave")`` overlaps the all-reduces of tensor-parallel LLMs with compute.

The pipeline, in the order in which a graph passes through it::

    backend.py     torch.compile's entry: options, training check, then Inductor with the passes in front
    forms.py       the fused and the woven form of a graph, and the choice in each call
    variants.py    compiles a form for given sizes
    context.py     what all ranks have agreed on
    passes/        unshard -> find -> fuse -> split -> weave -> place -> outline, on the ATen graph that Inductor gets
    autotune/      whether, how, and from how many tokens on a graph is woven on this machine
    ops/           the ops of the rewritten graph
    transports/    how the ranks exchange data
    site.py        what a site is given and computes: the specification
    report.py      what was found, what was done, and why not more

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
