"""All compilation and tuning at once, before an engine takes the memory for its key-value cache."""

import json
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist

from .options import TokenWeaveError
from .report import Report, reports
from .transports import agree

Size = int | tuple[int, int]


def warmup(
    model: Callable,
    sizes: Iterable[Size],
    make_inputs: Callable[[int, int], object] | None = None,
    *,
    device: torch.device | str | None = None,
    calls: int = 2,
    progress: bool = True,
) -> list[Report]:
    """Run a compiled model once for each size, so that it is compiled, and its kernels and schedule are tuned, for all of them.

    model:       what ``torch.compile`` has returned, or a module of which ``compile`` was called
    sizes:       numbers of tokens of one sequence, or (sequences, tokens of each); in this order. Dynamo makes a size dynamic when it
                 meets its second value, so begin with the two that differ most
    make_inputs: (sequences, tokens) -> the arguments of a call: a tuple, a dict of keywords, or one value. Without it, the argument is
                 integer ids [sequences, tokens], all 0
    device:      of the ids; the model's own, or where it has none the current GPU or the CPU
    calls:       of each size; the second records the CUDA graphs of mode "reduce-overhead"
    progress:    show a bar, on rank 0 only

    Returns the reports of the graphs that were compiled. All ranks must call this, with the same sizes. No gradients.
    Raises TokenWeaveError on all ranks where sizes or calls differ, or ``make_inputs`` fails on any; on the rank itself where the model
    fails, with the size and the reason.
    """
    wanted = [_pair(size) for size in sizes]
    if calls < 1:
        raise TokenWeaveError(f"calls is {calls}; a warm-up makes at least one")
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
    made = reports()[before:]
    if not reports():
        raise TokenWeaveError('no graph was compiled: warmup takes what torch.compile(model, backend="tokenweave") returns')
    return made


def _pair(size: Size) -> tuple[int, int]:
    pair = (1, size) if isinstance(size, int) else size
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair)):
        raise TokenWeaveError(f"{size!r} is no size: it is a number of tokens, or (sequences, tokens of each)")
    return tuple(pair)


def _agree_on(mine: str) -> None:
    """Raises TokenWeaveError on all ranks where they were asked for different things."""
    said = _exchange("the beginning of a warm-up", mine)
    if len(set(said)) > 1:
        told = "; ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(said))
        raise TokenWeaveError(f"the ranks were asked to warm up for different sizes or calls: {told}")


def _together(sequences: int, tokens: int, make: Callable) -> tuple[tuple, dict]:
    """The arguments of a call. Raises TokenWeaveError on all ranks where one cannot make them: no rank runs the model alone."""
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
    """The sizes, with a bar that says which one is run."""
    from tqdm import tqdm

    silent = not progress or (dist.is_initialized() and dist.get_rank() != 0)
    with tqdm(sizes, desc="tw_compile warm-up", unit="size", disable=silent) as bar:
        for sequences, tokens in bar:
            bar.set_postfix_str(f"{sequences} × {tokens} tokens")
            yield sequences, tokens


def _ids(device: torch.device) -> Callable:
    return lambda sequences, tokens: torch.zeros(sequences, tokens, dtype=torch.long, device=device)


def _device_of(model) -> torch.device:
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    first = next(parameters, None)
    if first is not None:
        return first.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
