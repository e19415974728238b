"""The command line: ``tw-compile doctor``, ``tw-compile plans``. ``python -m tw_compile`` is the same."""

import argparse
import sys
from pathlib import Path

from . import doctor, plans
from .options import TokenWeaveError


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 where something is missing or could not be done, 2 for a wrong command line."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except TokenWeaveError as error:
        print(f"tw-compile: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tw-compile", description="The torch.compile backend tokenweave, from outside of a program.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "doctor",
        help="what this machine has and lacks; under torchrun also how fast the ranks communicate",
        description="Say what this machine has of what the backend needs, and which transport would carry a group of all its GPUs. "
        "Under torchrun: torchrun --nproc-per-node 2 -m tw_compile doctor, also measure the transports, and test that they are right. "
        "The exit status is 1 where something that is needed is missing.",
    )
    command.set_defaults(run=lambda args: doctor.main())

    tuned = commands.add_parser("plans", help="what was tuned on this machine", description="What was tuned on this machine.")
    actions = tuned.add_subparsers(required=True, metavar="ACTION")

    def add(name, help, run, *ids):
        action = actions.add_parser(name, help=help, description=help)
        action.set_defaults(run=lambda args: _print(run(args)))
        for nargs in ids:
            action.add_argument("ids", nargs=nargs, metavar="ID", help="of a plan, as list has it")
        return action

    add("list", "all plans, one a line", lambda args: plans.listing())
    add("show", "all that is known of some plans, as JSON", lambda args: plans.show(args.ids), "+")
    action = add("clear", "remove plans: those with these ids, or all", lambda args: plans.clear(args.ids, args.stale), "*")
    action.add_argument("--stale", action="store_true", help="only those that this version of PyTorch and tw_compile does not use")
    action = add("export", "write plans to a file, for machines like this one", lambda args: plans.write_to(args.file, args.ids))
    action.add_argument("file", type=Path, metavar="FILE")
    action.add_argument("ids", nargs="*", metavar="ID", help="of a plan, as list has it; without, all that this version uses")
    action = add("import", "take over the plans of such a file", lambda args: plans.read_from(args.file))
    action.add_argument("file", type=Path, metavar="FILE")
    return parser


def _print(text: str) -> int:
    print(text)
    return 0
