"""What every test starts from: no caches of graphs, a fresh Dynamo, no reports left over, and a process group where one is asked for."""

import fcntl
import os
import tempfile
from collections import Counter

# Before torch reads them. The ranks of a test share few cores: threads that wait for each other would take them.
# Graphs are compiled anew in each test, while what the C++ compiler makes is kept by content: of equal kernels, one is built for all
# ranks and all tests.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
os.environ.setdefault("TORCH_DYNAMO_AUTOMATIC_DYNAMIC_LOCAL_PGO", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from tw_compile import backend, context, report
from tw_compile.transports import choose


def pytest_configure(config):
    if "tokenweave" not in torch._dynamo.list_backends(exclude_tags=()):  # run from a checkout, not installed
        torch._dynamo.register_backend(backend.tokenweave, name="tokenweave")


def pytest_collection_modifyitems(config, items):
    """Of a test with the marker ``one_in(n)`` each n-th case runs, and of one with ``full`` or ``slow`` none.

    With TW_SLOW=1 the slow ones run, too, and with TW_FULL=1 all.
    """
    if os.environ.get("TW_FULL"):
        return
    seen, left_out = Counter(), set()
    for item in items:
        if item.get_closest_marker("full") or (item.get_closest_marker("slow") and not os.environ.get("TW_SLOW")):
            left_out.add(item)
        elif marker := item.get_closest_marker("one_in"):
            test = item.parent, item.originalname
            if seen[test] % marker.args[0]:
                left_out.add(item)
            seen[test] += 1
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


@pytest.fixture(autouse=True)
def one_at_a_time_on_gpus(request):
    """Whichever processes test: kernels that wait for each other must not wait for another test's."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    with open(os.path.join(tempfile.gettempdir(), "tw_compile-gpu-tests.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(autouse=True)
def fresh():
    """Each test compiles anew, and sees its own reports and warnings only."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    report._reports.clear()
    report.say_once.cache_clear()
    choose.chosen.clear()
    context._contexts.clear()


@pytest.fixture(scope="session")
def _fake_world():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def world(_fake_world):
    """A process group of two ranks in this one process: its collectives do nothing."""
    return _fake_world


@pytest.fixture
def unexpanded(monkeypatch):
    """What Inductor gets has our ops, as for sites over symmetric memory. On a CPU the process group carries them all the same."""
    monkeypatch.setattr(choose, "is_over_process_group", lambda *_: False)


@pytest.fixture(scope="session")
def ranks():
    """Two real processes with gloo between them: ``ranks(function, *args)`` -> [result of rank 0, of rank 1]."""
    workers = Ranks(2)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def four_ranks():
    workers = Ranks(4)
    yield workers
    workers.stop()
