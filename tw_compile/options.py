"""The options of the backend: ``torch.compile(model, backend="tokenweave", options={"tokenweave.mode": "fuse"})``."""

import difflib
import os
from dataclasses import asdict, dataclass, fields

PREFIX = "tokenweave."
# Overrules the option ``mode`` in all of a process, for production: ``off``, or ``fuse``, which weaves nothing.
KILL_SWITCH = "TW_COMPILE_MODE"


class TokenWeaveError(RuntimeError):
    """A request that cannot be carried out; the message says why and what to do."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    mode:        ``auto`` weaves where a graph has at least ``min_tokens`` tokens and fuses below; ``weave`` and
                 ``fuse`` force it, and fail where it cannot be done; ``off`` only reports.
    transport:   how the ranks exchange data; ``auto`` takes the first of multimem, peer, process_group that all ranks
                 have. A forced one fails where a rank lacks it.
    min_tokens:  tokens of one forward pass (batch × sequence) from which a graph is woven.
    split:       tokens in the first half.
    ctas:        CTAs (one an SM) of each communication kernel.
    cuda_graphs: whether calls are run by CUDA graphs, so that the host's time does not count where schedules are tuned; ``auto`` is
                 what Inductor's ``triton.cudagraphs`` says, and True is for who captures them.
    timeout:     seconds after which a kernel that waits for another rank gives up, with an error.
    most:        what the environment allows at most: ``weave``, ``fuse`` or ``off``. No option: see KILL_SWITCH.
    """

    mode: str = "auto"
    transport: str = "auto"
    min_tokens: int | str = "auto"
    split: int | str = "auto"
    ctas: int | str = "auto"
    cuda_graphs: bool | str = "auto"
    timeout: int | str = "auto"
    most: str = "weave"

    CHOICES = {
        "mode": ("auto", "weave", "fuse", "off"),
        "transport": ("auto", "multimem", "peer", "process_group"),
        "cuda_graphs": ("auto", True, False),
        "most": ("weave", "fuse", "off"),
    }

    @property
    def requested(self) -> dict:
        """What a report says was asked for."""
        return {name: given for name, given in asdict(self).items() if (name, given) != ("most", "weave")}

    @property
    def forced(self) -> str | None:
        """The mode that must be met, or is an error; None where there is a choice."""
        return self.mode if self.mode in ("weave", "fuse") and self.most == "weave" else None

    @property
    def off(self) -> str:
        """Why nothing is changed; '' where something may be."""
        if self.most == "off":
            return f"{KILL_SWITCH} is off"
        return "mode is off" if self.mode == "off" else ""

    @property
    def fused_only(self) -> str:
        """Why nothing is woven; '' where something may be."""
        if self.mode == "fuse":
            return "mode is fuse"
        return f"{KILL_SWITCH} is fuse" if self.most == "fuse" else ""

    def __post_init__(self):
        for field in fields(self):
            value, name = getattr(self, field.name), PREFIX + field.name
            if field.name in self.CHOICES:
                choices = self.CHOICES[field.name]
                if value not in choices:
                    raise TokenWeaveError(f"option {name!r} is {value!r}; it takes one of {', '.join(map(str, choices))}")
            elif value != "auto" and (type(value) is not int or value < 1):
                raise TokenWeaveError(f"option {name!r} is {value!r}; it takes 'auto' or a whole number from 1 on")


def parse(options: dict | None) -> tuple[Options, dict]:
    """Split torch.compile's ``options`` into ours and Inductor's.

    Raises TokenWeaveError for an unknown ``tokenweave.*`` option, or a value that the option does not take.
    """
    ours, inductor = {}, {}
    known = [field.name for field in fields(Options) if field.name != "most"]
    for name, value in (options or {}).items():
        if not name.startswith(PREFIX):
            inductor[name] = value
            continue
        short = name.removeprefix(PREFIX)
        if short not in known:
            near = difflib.get_close_matches(short, known, n=1, cutoff=0.0)[0]
            raise TokenWeaveError(
                f"unknown option {name!r}; did you mean {PREFIX + near!r}? "
                f"The options are {', '.join(PREFIX + k for k in known)}"
            )
        ours[short] = value
    return Options(**ours, most=_allowed()), inductor


def _allowed() -> str:
    value = os.environ.get(KILL_SWITCH, "")
    if value not in ("", "off", "fuse"):
        raise TokenWeaveError(f"the environment variable {KILL_SWITCH} is {value!r}; it takes 'off' or 'fuse', or is not set")
    return value or "weave"
