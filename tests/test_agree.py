"""How ranks find out whether they agree, on real ranks."""

import pytest
import torch.distributed as dist

from tw_compile import TokenWeaveError
from tw_compile.ops import agree, transport


def say(*messages):
    return [agree.exchange(dist.group.WORLD.group_name, "this", f"{message} of {dist.get_rank()}") for message in messages]


def test_each_hears_all(ranks):
    assert ranks(say, "first", "second") == [[["first of 0", "first of 1"], ["second of 0", "second of 1"]]] * 2


def wait_for_rank_1():
    if dist.get_rank() == 1:
        agree._exchanges[dist.group.WORLD] += 1  # for the tests after this one
        return None
    try:
        agree.exchange(dist.group.WORLD.group_name, "the making of something", "here", timeout_s=0.5)
    except RuntimeError as error:
        return str(error)


def test_a_rank_that_does_not_come_is_named(ranks):
    message, _ = ranks(wait_for_rank_1)
    assert message.startswith("rank 1 of group ")
    assert " did not come to the making of something within 0.5 s, where rank 0 waited for it: see its log" in message


def of_another_version():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agree, "version", lambda: f"version {dist.get_rank()}")
        try:
            transport._agree(dist.group.WORLD.group_name, ["peer"], {})
        except TokenWeaveError as error:
            return str(error)


def test_ranks_of_different_versions_are_refused_on_all(ranks):
    for message in ranks(of_another_version):
        assert message.endswith("run different versions: ['version 0', 'version 1']")


def test_the_version_is_that_of_the_code():
    assert agree.version().startswith("torch 2.") and ", tw_compile " in agree.version()
