"""The options of the backend: ``torch.compile(model, backend="tokenweave", options={"tokenweave.mode": "fuse"})``."""

import difflib
from dataclasses import dataclass, fields

PREFIX = "tokenweave."


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
    timeout:     seconds after which a kernel that waits for another rank gives up, with an error.
    """

    mode: str = "auto"
    transport: str = "auto"
    min_tokens: int | str = "auto"
    split: int | str = "auto"
    ctas: int | str = "auto"
    timeout: int | str = "auto"

    CHOICES = {
        "mode": ("auto", "weave", "fuse", "off"),
        "transport": ("auto", "multimem", "peer", "process_group"),
    }

    def __post_init__(self):
        for field in fields(self):
            value, name = getattr(self, field.name), PREFIX + field.name
            if field.name in self.CHOICES:
                choices = self.CHOICES[field.name]
                if value not in choices:
                    raise TokenWeaveError(f"option {name!r} is {value!r}; it takes one of {', '.join(choices)}")
            elif value != "auto" and (type(value) is not int or value < 1):
                raise TokenWeaveError(f"option {name!r} is {value!r}; it takes 'auto' or a whole number from 1 on")


def parse(options: dict | None) -> tuple[Options, dict]:
    """Split torch.compile's ``options`` into ours and Inductor's.

    Raises TokenWeaveError for an unknown ``tokenweave.*`` option, or a value that the option does not take.
    """
    ours, inductor = {}, {}
    known = [field.name for field in fields(Options)]
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
    return Options(**ours), inductor
