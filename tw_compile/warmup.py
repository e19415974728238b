"""Compiles and tunes a model for given sizes, before an engine takes the memory for its KV cache."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from .options import TokenWeaveError
from .report import Report, reports
from .transports import agree

Size = int | tuple[int, int]


def warmup(
    model: Callable[..., Any],
    sizes: Iterable[Size],
    make_inputs: Callable[[int, int], object] | None = None,
    *,
    device: torch.device | str | None = None,
    calls: int = 2,
    progress: bool = True,
) -> list[Report]:
    """Run a compiled model with each size, so that its graphs are compiled, and its kernels and schedules are tuned, for all sizes.

    model:       what ``torch.compile`` returned, or a module whose ``compile`` method was called
    sizes:       each the number of tokens of one sequence, or (sequences, tokens of each), in the order of the calls. Dynamo makes a size
                 dynamic at its second value: begin with the two sizes that differ most
    make_inputs: (sequences, tokens) -> the arguments of a call: a tuple, a dict of keyword arguments, or one value. By default the
                 argument is int64 ids, zeros of shape [sequences, tokens]
    device:      device of the default ids; by default that of the model's parameters, else the current GPU, else the CPU
    calls:       number of calls with each size. The second call records the CUDA graphs of mode "reduce-overhead"
    progress:    show a progress bar, on rank 0 only

    Returns the reports of the graphs that were compiled. It computes no gradients. All ranks must call it, with the same sizes.
    Raises TokenWeaveError on all ranks if sizes or calls differ between ranks, or if ``make_inputs`` fails on one; and on the rank where
    the model fails, with the size and the reason. Also for a wrong size, and if the model is not compiled with this backend.
    """
    wanted = [_pair(size) for size in sizes]
    if calls < 1:
        raise TokenWeaveError(f"calls is {calls}; it must be 1 or more")
    _agree_on(json.dumps([wanted, calls]))
    before = len(reports())
    make = make_inputs or _ids(_device_of(model) if device is None else torch.device(device))
    with torch.no_grad():
        for sequences, tokens in _shown(wanted, progress):
            args, kwargs = _together(sequences, tokens, make)
            try:
                for _ in range(calls):
                    model(*args, **kwargs)
                _synchronize()
            except Exception as error:
                raise TokenWeaveError(f"the warm-up with {sequences} × {tokens} tokens failed: {type(error).__name__}: {error}") from error
    if not reports():
        raise TokenWeaveError('no graph was compiled: warmup takes what torch.compile(model, backend="tokenweave") returns')
    return reports()[before:]


def _pair(size: Size) -> tuple[int, int]:
    pair = (1, size) if isinstance(size, int) else size
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair)):
        raise TokenWeaveError(f"{size!r} is not a size: a size is a number of tokens, or (sequences, tokens of each)")
    sequences, tokens = pair
    return sequences, tokens


def _agree_on(mine: str) -> None:
    """Raises TokenWeaveError on all ranks if their arguments differ. mine: those of this rank"""
    said = _exchange("the beginning of a warm-up", mine)
    if len(set(said)) > 1:
        of_ranks = "; ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(said))
        raise TokenWeaveError(f"the ranks have different sizes or calls for a warm-up: {of_ranks}")


def _together(sequences: int, tokens: int, make: Callable[..., Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call. Raises TokenWeaveError on all ranks if one cannot make them, so that no rank runs the model alone."""
    made, failure = None, ""
    try:
        made = make(sequences, tokens)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    for rank, theirs in enumerate(_exchange(f"the inputs of {sequences} × {tokens} tokens", failure)):
        if theirs:
            raise TokenWeaveError(f"the inputs of {sequences} × {tokens} tokens could not be made on rank {rank}: {theirs}")
    if isinstance(made, dict):
        return (), made
    return (made if isinstance(made, tuple) else (made,)), {}


def _exchange(what: str, message: str) -> list[str]:
    if not dist.is_initialized():
        return [message]
    return agree.exchange(dist.group.WORLD.group_name, what, message)


def _shown(sizes: list[tuple[int, int]], progress: bool) -> Iterator[tuple[int, int]]:
    """The sizes, with a progress bar that shows the present one."""
    from tqdm import tqdm

    silent = not progress or (dist.is_initialized() and dist.get_rank() != 0)
    with tqdm(sizes, desc="tw_compile warm-up", unit="size", disable=silent) as bar:
        for sequences, tokens in bar:
            bar.set_postfix_str(f"{sequences} × {tokens} tokens")
            yield sequences, tokens


def _ids(device: torch.device) -> Callable[[int, int], torch.Tensor]:
    return lambda sequences, tokens: torch.zeros(sequences, tokens, dtype=torch.long, device=device)


def _device_of(model: Callable[..., Any]) -> torch.device:
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    first = next(parameters, None)
    if first is not None:
        return first.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
