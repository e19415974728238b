"""What reports say of places, plans and sites, in words."""

import os


def short(source: str) -> str:
    """A place in the source, without the path of the working directory or of site-packages."""
    return source.removeprefix(os.getcwd() + os.sep).split("site-packages" + os.sep)[-1]


def count(number: int, thing: str) -> str:
    """A number of things, with a regular plural: "1 site", "2 sites"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def size_text(sequences: int, tokens: int) -> str:
    """A size of inputs, sequences × tokens of each."""
    return f"{sequences} × {count(tokens, 'token')}"


def memory_text(needed: float, free: float) -> str:
    """Why a measurement is not made, which may take half of the free memory of a GPU. Both in bytes"""
    return (
        f"it needs {needed / 1e9:.1f} GB, and may take half of the {free / 1e9:.1f} GB that are free. Call tw_compile.warmup before other "
        "memory is taken, such as that of a KV cache"
    )


def plan_text(min_tokens: int | None, ctas: int, split_ratio: float, gain: float | None, experts_from: int | None = None) -> str:
    """A Plan in words."""
    if gain is None:
        return f"no, as a warning says; a rule weaves from {min_tokens} tokens on"
    cut = f"split ratio {split_ratio:g}" + (f", {ctas} CTAs" if ctas else "")
    if min_tokens is None:
        return f"not woven at any number of tokens; the best woven form is {gain:.2f} times as fast as fused at the most tokens, with {cut}"
    cut += f", experts cut from {max(experts_from, min_tokens)} tokens on" if experts_from else ""
    return f"woven from {min_tokens} tokens on, with {cut}: {gain:.2f} times as fast as fused at the most tokens"


def form_of(norm: str, residual: bool, merged: int = 1, output: str = "") -> str:
    """The steps of a site, in words.

    norm: '' for none; residual: whether one is added; merged: how many all-reduces it does in one; output: as of a report's ``Site``
    """
    reduced = f"{merged} all-reduces in one" if merged > 1 else "all-reduce"
    return " + ".join(filter(None, [reduced, "add" if residual else "", norm, output]))


def wire_text(transport: str, sent: dict[str, int], packed: int, sites: int) -> str:
    """What each rank sends, in words. sent, packed: of a Report, whose first width is the model's own; sites: the number of all sites"""
    bits = transport.partition(":")[2] if packed else next(iter(sent))
    others = ", ".join(f"{number / 1024:.1f} with {other}" for other, number in sent.items() if other != bits)
    others = f"; {others}" if others else ""
    at = "" if packed in (0, sites) else f" at {packed} of {sites} sites"
    at += " between hosts" if transport.startswith("hierarchical") else ""
    return f"wire: {bits} bits{at}, {sent[bits] / 1024:.1f} KB from each rank for a token{others}"
