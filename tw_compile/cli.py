"""The command line: ``tw-compile doctor`` and ``tw-compile plans``, also as ``python -m tw_compile``."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from . import doctor, plans
from .options import TokenWeaveError


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 1 if something is missing or the command failed.

    arguments: the words of the command; None for those of the process
    Exits with status 2 for a wrong command line.
    """
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except TokenWeaveError as error:
        print(f"tw-compile: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tw-compile", description="Tools of the torch.compile backend tokenweave.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "doctor",
        help="check what the backend needs on this machine; under torchrun also measure how fast the ranks communicate",
        description="Check what the backend needs on this machine, and which transport a group of all its GPUs would use. "
        "Under torchrun (torchrun --nproc-per-node 2 -m tw_compile doctor) also test and measure the transports. "
        "The exit status is 1 if something that is needed is missing.",
    )
    command.set_defaults(run=lambda args: doctor.main())

    tuned = commands.add_parser("plans", help="the results of tuning on this machine", description="The results of tuning on this machine.")
    actions = tuned.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, text: str, run: Callable[[argparse.Namespace], str], *ids: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, description=text)
        action.set_defaults(run=lambda args: _print(run(args)))
        for nargs in ids:
            action.add_argument("ids", nargs=nargs, metavar="ID", help="the id of a plan, from list")
        return action

    add("list", "list all plans, one a line", lambda args: plans.listing())
    add("show", "print plans with all that they were measured for, as JSON", lambda args: plans.show(args.ids), "+")
    action = add("clear", "remove the plans with these ids, or all plans", lambda args: plans.clear(args.ids, args.stale), "*")
    action.add_argument("--stale", action="store_true", help="remove only plans that this version of PyTorch and tw_compile does not use")
    action = add("export", "write plans to a file, for other machines with the same GPUs", lambda args: plans.write_to(args.file, args.ids))
    action.add_argument("file", type=Path, metavar="FILE")
    action.add_argument("ids", nargs="*", metavar="ID", help="the id of a plan, from list; by default all plans that this version uses")
    action = add("import", "add the plans of an exported file to this machine's", lambda args: plans.read_from(args.file))
    action.add_argument("file", type=Path, metavar="FILE")
    return parser


def _print(text: str) -> int:
    print(text)
    return 0
