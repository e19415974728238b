"""Fused graph -> the section of it that autotuning runs: the work between its first sites."""

import functools
import logging
import math
import operator
from collections.abc import Container
from typing import Any

import torch
from torch.fx import Node

from ..autotune import schedule
from ..options import Options
from .cut import Cut
from .graph_utils import arguments, aten, calls, is_one, is_tensor, is_view, positional, source_of, value
from .rules.attention import SIGNATURES
from .rules.experts import choices_of, groups
from .rules.quantised import is_gemm, one_scale, scales_of
from .rules.token_axis import expr
from .split import split

log = logging.getLogger("tw_compile")


def section_of(sites: list[Node], options: Options, cuda_graphs: bool) -> schedule.Section | str:
    """The section of a graph that autotuning runs; why it cannot be run, or '' if there is nothing to decide.

    sites:       the ``fused`` calls of the graph
    cuda_graphs: whether the graph runs in CUDA graphs
    """
    x = value(sites[0].args[0])
    if options.fused_only or not schedule.possible(x.device):
        return ""
    if options.min_tokens != "auto" and options.split != "auto" and options.ctas != "auto":
        return ""
    *batch, hidden = x.shape
    tokens = math.prod(batch)
    sequences = batch[0] if len(batch) > 1 and isinstance(batch[0], int) else 1
    wanted = (tokens,) if isinstance(tokens, int) else schedule.SIZES
    least, most = max(sequences, schedule.SIZES[0]), schedule.MAX_ELEMENTS // hidden
    sizes = tuple(dict.fromkeys(min(size, most) for size in wanted if size >= least))
    first = sites[: 1 + schedule.PHASES]
    dim = next((i for i, size in enumerate(batch) if not is_one(size)), None)
    if dim is None or not sizes or len(first) < 2:
        return ""
    try:
        _, _, unsplit, _, whole = split(sites[0].graph, first, Cut(dim, batch[dim], batch[dim] // 2))
    except Exception as error:  # a graph that cannot be cut can still be fused
        log.warning("a schedule is not autotuned: the graph cannot be cut: %s: %s", type(error).__name__, error)
        return ""
    if one_scale(unsplit):
        return ""
    phases = []
    for site in first[1:]:
        phase = _phase(site, hidden, tokens, unsplit, whole)
        if phase is None:
            return f"what a site reduces is not the product of a GEMM that autotuning can run ({source_of(site) or site})"
        phases.append(phase)
    nodes = [*sites[0].graph.nodes]
    between = nodes[nodes.index(first[0]) : nodes.index(first[-1])]
    left_out = dict.fromkeys(str(node.target) for node in between if _is_left_out(node, tokens))
    if left_out:
        _say_what_is_left_out(", ".join(left_out))
    if x.dtype != torch.bfloat16 and any("experts" in op for phase in phases for op in phase):
        return f"PyTorch has grouped GEMMs in bfloat16 only, not in {x.dtype}"
    ctas = options.ctas if isinstance(options.ctas, int) else 0
    quantise = arguments(first[1])["quantise"]
    return schedule.Section(hidden, str(x.dtype).removeprefix("torch."), sizes, sequences, ctas, tuple(phases), cuda_graphs, quantise)


def _phase(site: Node, hidden: int, tokens: Any, unsplit: Container[Node], whole: Container[Node]) -> tuple | None:
    """The phase of a Section that leads from the site before to this one; None if it does not end in a GEMM or in experts."""
    nodes, node = [], site.prev
    while not calls(node, site.target) and node.op != "root":
        nodes.append(node)
        node = node.prev
    nodes.reverse()
    ops = []
    for node in nodes:
        if op := _op(node, tokens):
            ops.append(("unsplit", *op) if node in whole else op)
        elif node in unsplit and ops[-1:] != [("unsplit",)]:
            ops.append(("unsplit",))
    if not ops:
        return None
    *ops, last = ops
    if last[0] == "unsplit":  # x is cut after the GEMM: the section runs the GEMM for each half, after all that it needs
        ops, last = [*ops, ("unsplit",)], last[1:]
    sizes = [size for op in (*ops, last) for size in op if not isinstance(size, (str, tuple))]
    columns = last[2] if last[:1] == ("gemm",) else last[-1]
    if last[:1] not in (("mm",), ("gemm",), ("experts",)) or columns != hidden or not all(isinstance(size, int) for size in sizes):
        return None
    return ("others", _others(nodes, tokens)), *ops, last


def _op(node: Node, tokens: Any) -> tuple | None:
    """The entry of a Section for a GEMM, an attention or a grouped GEMM of experts; None for other calls."""
    if calls(node, aten.mm.default, aten.addmm.default):
        return "mm", *value(node.args[-1]).shape
    if calls(node, *SIGNATURES):
        query, key = (value(a) for a in node.args[:2])
        return "attention", query.shape[1], key.shape[1], query.shape[3]
    if calls(node, aten._grouped_mm.default):
        choices = choices_of(node, tokens)
        return ("experts", groups(node), choices, *value(node.args[1]).shape[1:]) if choices else None
    return _gemm(node) if is_gemm(node) else None


def _is_left_out(node: Node, tokens: Any) -> bool:
    """Whether a call is a quantised or a grouped GEMM that autotuning cannot run."""
    is_large = is_gemm(node) or calls(node, aten._grouped_mm.default, aten._scaled_grouped_mm.default)
    return is_large and _op(node, tokens) is None


@functools.cache  # once for the same ops
def _say_what_is_left_out(ops: str) -> None:
    log.warning("a schedule is autotuned without %s, which autotuning cannot run", ops)


def _gemm(node: Node) -> tuple | None:
    """The entry of a quantised linear, as ``autotune.operands`` has it; None if it is not described by sizes alone."""
    rows, product, scales = node.args[0], value(node), scales_of(node)
    assert scales is not None
    if not is_tensor(node) or product.dim() != 2 or value(rows).dim() != 2:
        return None
    tokens = value(rows).shape[0]

    def described(place: object, argument: Any) -> tuple:
        if isinstance(argument, Node):
            tensor = value(argument)
            shape = tuple(tensor.shape)
            if place == 0 or place in scales:
                shape = tuple(_per_token(size, tokens) for size in shape[:1]) + shape[1:]
            order = sorted(range(tensor.dim()), key=lambda dim: (-_hint(tensor.stride(dim)), dim))
            return "tensor", str(tensor.dtype).removeprefix("torch."), shape, tuple(order)
        if isinstance(argument, (list, tuple)):
            return "list", *(described((place, i), item) for i, item in enumerate(argument))
        return ("dtype", str(argument).removeprefix("torch.")) if isinstance(argument, torch.dtype) else ("constant", argument)

    arguments = tuple(described(place, argument) for place, argument in enumerate(positional(node)))
    return ("gemm", node.target.name(), product.shape[1], arguments) if _is_plain(arguments) else None


def _per_token(size: Any, tokens: Any) -> Any:
    """-n for a size that has one entry for n tokens; another size as it is."""
    if is_one(size) and not is_one(tokens):
        return size
    return next((-n for n in (1, 128) if expr(size) * n == expr(tokens)), size)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else size.node.hint or 1


def _is_plain(entry: Any) -> bool:
    return all(map(_is_plain, entry)) if isinstance(entry, tuple) else entry is None or isinstance(entry, (bool, int, float, str))


def _others(nodes: list[Node], tokens: Any) -> int:
    """An estimate of the number of other kernels: Inductor fuses calls that use each other's results."""
    kernel: dict[Node, Node] = {}  # a call -> the last call of its kernel
    for node in nodes:
        if node.op != "call_function" or not is_tensor(node) or is_view(node.target) or _op(node, tokens) or calls(node, operator.getitem):
            continue
        found = {kernel[a] for a in node.all_input_nodes if a in kernel}
        kernel |= {n: node for n, of in kernel.items() if of in found} | {node: node}
    return len({*kernel.values()})
