"""The options of the backend: ``torch.compile(model, backend="tokenweave", options={"tokenweave.mode": "fuse"})``."""

import difflib
import os
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

PREFIX = "tokenweave."
# This environment variable limits the option ``mode`` in the whole process: ``off`` changes nothing, ``fuse`` weaves nothing.
KILL_SWITCH = "TW_COMPILE_MODE"


class TokenWeaveError(RuntimeError):
    """A request that cannot be met. The message gives the reason. It is raised on all ranks."""


@dataclass(frozen=True)
class Options:
    """The options that the user gave.

    mode:        ``auto`` weaves calls of at least ``min_tokens`` tokens, and fuses smaller ones. ``weave`` and ``fuse`` force it: a graph
                 that cannot be woven or fused is an error. ``off`` only reports.
    transport:   how the ranks exchange data. ``auto`` takes the fastest of multimem, peer, hierarchical and process_group that all ranks
                 have. A transport that is forced, and that a rank lacks, is an error.
    wire:        bits of a value between the ranks over the process group, or over hierarchical between hosts. ``auto`` is 16, the
                 model's dtype. 8, 6 (4 in the first trip, 8 in the second) and 4 lose accuracy
    min_tokens:  number of tokens of a forward pass, batch × sequence, from which a graph is woven
    split:       number of tokens in the first half
    ctas:        number of CTAs, one on each SM, of each communication kernel
    cuda_graphs: whether CUDA graphs run the calls, so that autotuning does not count the host's time. ``auto`` takes Inductor's
                 ``triton.cudagraphs``; True is for callers that capture CUDA graphs themselves.
    timeout:     seconds after which a kernel that waits for another rank raises an error
    most:        the most that the environment allows: ``weave``, ``fuse`` or ``off``. Not an option: see KILL_SWITCH.

    Raises TokenWeaveError for a value that an option does not take.
    """

    mode: str = "auto"
    transport: str = "auto"
    wire: int | str = "auto"
    min_tokens: int | str = "auto"
    split: int | str = "auto"
    ctas: int | str = "auto"
    cuda_graphs: bool | str = "auto"
    timeout: int | str = "auto"
    most: str = "weave"

    CHOICES: ClassVar[dict[str, tuple[str | int, ...]]] = {
        "mode": ("auto", "weave", "fuse", "off"),
        "transport": ("auto", "multimem", "peer", "hierarchical", "process_group"),
        "wire": ("auto", 16, 8, 6, 4),
        "cuda_graphs": ("auto", True, False),
        "most": ("weave", "fuse", "off"),
    }

    @property
    def requested(self) -> dict[str, Any]:
        """The options for a report. KILL_SWITCH is among them, with its value, only if the environment limits the mode."""
        given = asdict(self)
        most = given.pop("most")
        return given if most == "weave" else {**given, KILL_SWITCH: most}

    @property
    def transport_and_wire(self) -> str:
        """``transport``, and ``wire`` behind a colon where it is less than 16 bits: what ops and transports are named by."""
        return self.transport if self.wire in ("auto", 16) else f"{self.transport}:{self.wire}"

    @property
    def forced(self) -> str | None:
        """The mode that the user forces; None if the backend may choose."""
        return self.mode if self.mode in ("weave", "fuse") and self.most == "weave" else None

    @property
    def impossible(self) -> str:
        """How an error begins that says why a graph cannot have the mode that the user forces."""
        return f"option 'tokenweave.mode' is {self.forced!r}, but this graph cannot be {'woven' if self.forced == 'weave' else 'fused'}"

    @property
    def off(self) -> str:
        """Why no graph may be changed; '' if graphs may be changed."""
        if self.most == "off":
            return f"{KILL_SWITCH} is off"
        return "mode is off" if self.mode == "off" else ""

    @property
    def fused_only(self) -> str:
        """Why no graph may be woven; '' if graphs may be woven."""
        if self.mode == "fuse":
            return "mode is fuse"
        return f"{KILL_SWITCH} is fuse" if self.most == "fuse" else ""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, name = getattr(self, field.name), PREFIX + field.name
            if field.name in self.CHOICES:
                choices = self.CHOICES[field.name]
                if not any(type(value) is type(choice) and value == choice for choice in choices):
                    raise TokenWeaveError(f"option {name!r} is {value!r}; it takes one of {', '.join(map(repr, choices))}")
            elif value != "auto" and (type(value) is not int or value < 1):
                raise TokenWeaveError(f"option {name!r} is {value!r}; it takes 'auto' or a whole number from 1 on")
        if ":" in self.transport_and_wire and self.transport in ("multimem", "peer"):
            raise TokenWeaveError(
                f"option 'tokenweave.wire' is {self.wire}, but 'tokenweave.transport' is {self.transport!r}, which sends values in the "
                "model's dtype: leave one of them at 'auto'"
            )


def parse(options: dict[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Split torch.compile's ``options`` into those of this backend and Inductor's.

    Raises TokenWeaveError for an unknown ``tokenweave.*`` option, for an option of this backend without the prefix, for a value that an
    option does not take, for options that are no dict, and for a wrong value of the environment variable KILL_SWITCH.
    """
    if not isinstance(options, dict | None) or not all(isinstance(name, str) for name in options or ()):
        raise TokenWeaveError(f"options is {options!r:.200}; it takes a dict, such as {{'tokenweave.mode': 'fuse'}}")
    ours: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    known = [field.name for field in fields(Options) if field.name != "most"]
    for name, value in (options or {}).items():
        if name in known:  # no version of Inductor has an option of such a name
            raise TokenWeaveError(f"unknown option {name!r}; did you mean {PREFIX + name!r}?")
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
