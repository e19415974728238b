"""What becomes of the other ranks where one is killed, is late, or runs another number of tokens, on real GPUs.

    python tests/multi_gpu_failures.py [ranks]

Not under torchrun, which kills all ranks when one dies. A lost rank costs the others their CUDA context, so that each case has
processes of its own. They all start at the same time, to save some, and go one case after another.
"""

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from multi_gpu import Inputs

from tw_compile.site import Site
from tw_compile.transports.symmetric.transport import Symmetric
from tw_compile.transports.symmetric.tuning import by_rule

TIMEOUT_S, LATE_S, SLACK_S, PATIENCE_S = 4.0, 2.0, 5.0, 120.0
CALLS, FAILS_AT = 8, 5


@dataclass(frozen=True)
class Case:
    """What happens to the last rank at its call FAILS_AT."""

    what: str  # "killed", "late", "other rows" or "other site"
    rows: int
    other_rows: int = 0

    def __str__(self):
        return f"{self.what}, {self.rows} rows" + f" and {self.other_rows}" * (self.what == "other rows")

    @property
    def said(self):
        """What at least one rank is to say of it, where one runs something else."""
        if self.what == "other site":
            return rf"site {FAILS_AT} .* at that of site {FAILS_AT + 1}"
        # Ranks in two workspaces do not meet, and can only say what may be the matter.
        return "another (model or )?number of tokens"


# By the rule, which on two ranks is one_shot for less than 32 rows, and two_shot for the rest.
CASES = [
    *(Case("late", rows) for rows in (2, 31, 40, 512)),
    *(Case("killed", rows) for rows in (2, 31, 40, 512)),
    *(Case("other rows", *rows) for rows in ((2, 4), (29, 31), (40, 37), (512, 500))),  # of one kernel
    *(Case("other rows", *rows) for rows in ((2, 3), (31, 32), (24, 40))),  # of two kernels; in two workspaces
    *(Case("other site", rows) for rows in (2, 40)),
]


def play(case, rank, world, store, pipe):
    """One rank. Sends its number of right calls, the error that ended them or None, and the seconds of the last or longest."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    right_calls, error, seconds = 0, None, 0.0
    with torch.no_grad():
        symmetric, site = Symmetric(dist.group.WORLD.group_name, device, False, PATIENCE_S, by_rule(world)), Inputs(device)
        for rows in (case.rows, case.other_rows or case.rows):  # workspaces and kernels
            check_call(symmetric, site, 0, rows, 0)
        symmetric.set_timeout(TIMEOUT_S)
        pipe.send("ready")
        pipe.recv()
        try:
            for number in range(1, CALLS + 1):
                fails = rank == world - 1 and number == FAILS_AT
                if fails and case.what == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fails and case.what == "late":
                    time.sleep(LATE_S)
                begin, rows = 50 * number, case.other_rows if fails and case.other_rows else case.rows
                start = time.monotonic()
                check_call(symmetric, site, begin, rows, number + (fails and case.what == "other site"))
                seconds = max(seconds, time.monotonic() - start)
                right_calls = number
        except Exception as reason:
            error, seconds = f"{type(reason).__name__}: {reason}", time.monotonic() - start
    pipe.send((right_calls, error, seconds))
    os._exit(0)  # what torch would tidy up went with the CUDA context


def check_call(symmetric, site, begin, rows, number):
    def call():
        return symmetric.fused(Site(*site.arguments(begin, rows), 0, 2, number), False)

    results = call()
    try:
        torch.cuda.synchronize()
    except RuntimeError:  # CUDA's, which does not know what has happened; the next call does
        call()
        raise
    assert site.is_right(results, begin), "wrong result"


class Ranks:
    """The processes of a case."""

    def __init__(self, case, world, store):
        context = multiprocessing.get_context("spawn")
        self.case, self.processes, self.pipes = case, [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=play, args=(case, rank, world, store, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()  # so that ours ends when the process does

    def get_ready(self):
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE_S) and pipe.recv() == "ready", f"{self.case}: rank {rank} does not start"

    def run(self):
        """What play sends at the end, of each rank; None of one that sent nothing and has ended."""
        for pipe in self.pipes:
            pipe.send("go")
        answers = [self._answer(pipe) for pipe in self.pipes]
        for process in self.processes:
            process.join(SLACK_S)
            process.kill()
            process.join()
        return answers

    @staticmethod
    def _answer(pipe):
        if not pipe.poll(PATIENCE_S):
            return 0, "hangs", PATIENCE_S
        try:
            return pipe.recv()
        except EOFError:
            return None


def check(case, answers, killed):
    """What is wrong with it, or None. killed: did the last rank die of SIGKILL?"""
    lost = len(answers) - 1
    if case.what == "killed":
        if answers[lost] is not None or not killed:
            return "the last rank was not killed"
        answers = answers[:lost]
    if None in answers:
        return "a rank died"
    errors = [error for _, error, _ in answers]
    if case.what == "late":
        return "a rank failed" if any(errors) else None
    if any(error and "CUDA" not in error for error in errors):
        return "a wrong result, or another error than those of a lost rank"
    if case.what == "killed":
        # A GPU may also find the memory of the dead rank gone, and say so in its own words.
        pattern = rf"waited .* for rank {lost} |CUDA error|CUDA call failed"
        if not all(error and re.search(pattern, error) for error in errors):
            return "a rank does not name the dead one"
    elif not any(error and re.search(case.said, error) for error in errors) and not any(
        error and re.search(rf"site {FAILS_AT + 1} .* at that of site {FAILS_AT} ", error) for error in errors
    ):
        return "no rank says what differs"
    return None if all(seconds < TIMEOUT_S + SLACK_S for *_, seconds in answers) else "a rank waited for too long"


def main():
    world = int(sys.argv[1]) if sys.argv[1:] else max(n for n in (2, 4, 8) if n <= torch.cuda.device_count())
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        everybody = [Ranks(case, world, os.path.join(folder, str(number))) for number, case in enumerate(CASES)]
        for ranks in everybody:
            ranks.get_ready()
        for ranks in everybody:
            begin = time.monotonic()
            answers = ranks.run()
            print(f"{ranks.case}: {time.monotonic() - begin:.1f} s")
            for rank, answer in enumerate(answers):
                if answer is None:
                    print(f"  rank {rank} ended with {ranks.processes[rank].exitcode}")
                else:
                    calls, error, seconds = answer
                    ending = error.splitlines()[0][:160] if error else "no error"
                    print(f"  rank {rank}: {calls} right calls, {seconds:.2f} s, {ending}")
            if reason := check(ranks.case, answers, ranks.processes[-1].exitcode == -signal.SIGKILL):
                print(f"  FAILED: {reason}")
                failed.append(str(ranks.case))
            sys.stdout.flush()
    assert not failed, failed


if __name__ == "__main__":
    main()
