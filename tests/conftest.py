"""What every test starts from: no caches, a fresh Dynamo, no reports left over, and a process group where one is asked for."""

import os

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # before torch reads it

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tw_compile import backend, ops, report
from ranks import Ranks


def pytest_configure(config):
    if "tokenweave" not in torch._dynamo.list_backends(exclude_tags=()):  # run from a checkout, not installed
        torch._dynamo.register_backend(backend.tokenweave, name="tokenweave")


def pytest_collection_modifyitems(items):
    """Of several processes, one runs the tests of a file, which share what is slow to make; and one all that use GPUs."""
    for item in items:
        on_gpu = item.get_closest_marker("gpu")
        item.add_marker(pytest.mark.xdist_group("gpu" if on_gpu else item.path.name))


@pytest.fixture(autouse=True)
def fresh():
    """Each test compiles anew, and sees its own reports and warnings only."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    report._reports.clear()
    backend._say_once.cache_clear()
    ops.transport._chosen.clear()


@pytest.fixture(scope="session")
def _fake_world():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def world(_fake_world):
    """A process group of two ranks in this one process: its collectives do nothing."""
    return _fake_world


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
