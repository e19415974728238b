"""Compiles and tunes a model for given sizes, before an engine takes the memory for its KV cache."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from . import compat, context
from .options import TokenWeaveError
from .report import Report, reports
from .transports import agree
from .wording import size_text

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
    Raises TokenWeaveError on all ranks if an argument is wrong on one of them, if sizes or calls differ between ranks, or if
    ``make_inputs`` fails on one; on the rank where the model fails, with the size and the reason; and after the calls if the model is not
    compiled with this backend.
    """
    wanted: list[tuple[int, int]] = []
    make, wrong = make_inputs, ""
    try:
        wanted = _checked(model, sizes, make_inputs, calls)
        make = make_inputs or _ids(_device_of(model) if device is None else _device(device))
    except TokenWeaveError as error:
        wrong = str(error)
    _agree_on([] if wrong else [wanted, calls], wrong)
    assert make is not None
    before, compiled, run = len(reports()), _number_of_graphs(), context.number_of_calls()
    with torch.no_grad():
        for sequences, tokens in _shown(wanted, progress):
            args, kwargs = _together(size_text(sequences, tokens), functools.partial(make, sequences, tokens))
            try:
                for _ in range(calls):
                    model(*args, **kwargs)
                _synchronize()
            except Exception as error:
                what = f"the warm-up with {size_text(sequences, tokens)} failed"
                raise TokenWeaveError(f"{what}: {type(error).__name__}: {error}") from error
    made = reports()[before:]
    ours = bool(made) or context.number_of_calls() > run
    # A graph without sites that this backend has compiled before leaves no trace when it runs.
    if wanted and not ours and (_number_of_graphs() > compiled or not reports() or not _is_compiled(model)):
        raise TokenWeaveError('no graph of this backend was run: warmup takes what torch.compile(model, backend="tokenweave") returns')
    return made


def _checked(model: object, sizes: Iterable[Size], make_inputs: object, calls: object) -> list[tuple[int, int]]:
    """The sizes as (sequences, tokens). Raises TokenWeaveError for a wrong argument."""
    if not callable(model):
        raise TokenWeaveError(f"model is {model!r:.200}; warmup takes what torch.compile(model, backend=\"tokenweave\") returns")
    if not isinstance(sizes, Iterable) or isinstance(sizes, str):
        raise TokenWeaveError(f"sizes is {sizes!r:.200}; it takes a list of sizes, such as [2048, 1, (16, 1)]")
    if make_inputs is not None and not callable(make_inputs):
        raise TokenWeaveError(f"make_inputs is {make_inputs!r:.200}; it takes a function of (sequences, tokens)")
    if type(calls) is not int or calls < 1:
        raise TokenWeaveError(f"calls is {calls!r:.200}; it takes a whole number from 1 on")
    return [_pair(size) for size in sizes]


def _pair(size: Size) -> tuple[int, int]:
    pair = (1, size) if isinstance(size, int) else size
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)):
        raise TokenWeaveError(f"{size!r:.200} is not a size: a size is a number of tokens, or (sequences, tokens of each)")
    sequences, tokens = pair
    return sequences, tokens


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise TokenWeaveError(f"device is {device!r:.200}; it takes a device such as 'cuda' or 'cpu'") from error


def _is_compiled(model: Callable[..., Any]) -> bool:
    """Whether torch.compile has made a model, or a module in it."""
    parts = model.modules() if isinstance(model, torch.nn.Module) else (model,)
    return any(getattr(part, name, None) is not None for part in parts for name in _COMPILED)


# What torch.compile adds to a function, what it returns for a module, and what ``compile`` adds to a module.
_COMPILED = "_torchdynamo_orig_callable", "_orig_mod", "_compiled_call_impl"


def _number_of_graphs() -> int:
    """The number of graphs that Dynamo has compiled in this process, with any backend."""
    return compat.dynamo_counters["stats"]["unique_graphs"] if compat.has(compat.dynamo_counters) else 0


def _agree_on(mine: list[Any], wrong: str) -> None:
    """Raises TokenWeaveError on all ranks if their arguments differ, or are wrong on one.

    mine:  the arguments of this rank
    wrong: what is wrong with them, or ''
    """
    said = _exchange("the beginning of a warm-up", json.dumps([mine, wrong]))
    given, problems = zip(*map(json.loads, said))
    for rank, problem in enumerate(problems):
        if problem:
            raise TokenWeaveError(problem if len(set(problems)) == 1 else f"rank {rank}: {problem}")
    if len(set(said)) > 1:
        of_ranks = "; ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(given))
        raise TokenWeaveError(f"the ranks have different sizes or calls for a warm-up: {of_ranks}")


def _together(size: str, make: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call. Raises TokenWeaveError on all ranks if one cannot make them, so that no rank runs the model alone."""
    made, failure = None, ""
    try:
        made = make()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    for rank, theirs in enumerate(_exchange(f"the inputs of {size}", failure)):
        if theirs:
            raise TokenWeaveError(f"the inputs of {size} could not be made on rank {rank}: {theirs}")
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
            bar.set_postfix_str(size_text(sequences, tokens))
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
