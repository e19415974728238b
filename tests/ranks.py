"""Functions run on real ranks: processes that stay, so that the start-up is paid once."""

import functools
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import device_mesh

IMPORTS = ["torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor", "tw_compile.backend"]


class Ranks:
    """``ranks(function, *args)`` runs a module-level function in each process, and returns its results in rank order.

    An exception is raised here with the traceback of the rank. Ranks that do not answer in time are killed: a hang is a
    failed test, not a hanging one.
    """

    def __init__(self, world: int, timeout: float = 250):
        self.world, self.timeout, self.processes = world, timeout, []

    def __call__(self, function, *args):
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(self.timeout):
                self.stop()
                raise TimeoutError(f"rank {rank} did not finish {function.__name__}{args} in {self.timeout} s")
            answers.append(pipe.recv())
        for rank, (_, error) in enumerate(answers):
            if error:
                raise RuntimeError(f"rank {rank}:\n{error}")
        return [result for result, _ in answers]

    def _start(self):
        # Ranks are forks of a process that has made the imports, and nothing else: they take longer than many a test. With PyTorch before
        # 2.13, two threads that compile in a fork do not end (test_agree.py has such threads).
        forks = torch.__version__ >= "2.13"
        context = mp.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload(IMPORTS)
        store = tempfile.mktemp(prefix="ranks")
        self.pipes = []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=_serve, args=(rank, self.world, store, theirs), daemon=True))
            self.pipes.append(ours)
            self.processes[-1].start()

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _serve(rank, world, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    # Every mesh makes groups, and every gloo group has threads that hardly sleep: one mesh of a kind will do.
    dist.init_device_mesh = device_mesh.init_device_mesh = functools.cache(device_mesh.init_device_mesh)
    while True:
        try:
            function, args = pipe.recv()  # imports the function's module
            pipe.send((function(*args), None))
        except EOFError:  # noqa: PERF203  # the test run has ended
            return
        except BaseException:
            pipe.send((None, traceback.format_exc()))
