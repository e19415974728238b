"""How the ranks of a group settle on one transport, with stand-ins for those that need GPUs."""

import json
import os
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tw_compile import TokenWeaveError, records
from tw_compile.transports import choose
from tw_compile.transports.process_group import ProcessGroup
from tw_compile.transports.symmetric import tuning
from tw_compile.transports.together import WorkspaceError, together

CPU = torch.device("cpu")


class Stand(ProcessGroup):
    """In place of Symmetric, on all transports that have one.

    missing: (transport, rank) pairs that say they cannot
    wrong:   ranks on which multimem does ``how`` wrong
    """

    missing, wrong, how = (), (), "fused"

    def __init__(self, group_name, device, multicast, tuning):
        super().__init__(group_name, device)
        self.name = "multimem" if multicast else "peer"

    @classmethod
    def unavailable(cls, group_name, device, multicast):
        return "not here" if ("multimem" if multicast else "peer", dist.get_rank()) in cls.missing else None

    def _is(self, how):
        return self.how == how and self.name == "multimem" and dist.get_rank() in self.wrong

    def prepare(self, calls):
        def step():
            if self._is("no memory"):
                raise MemoryError("none is left")

        together(dist.group.WORLD.group_name, "the allocation of a workspace", step, 60)

    def linear(self, a, b, bias, slot):
        return super().linear(a, b, bias, slot) * (1.5 if self._is("linear") else 1.0)

    def start(self, site):
        if self._is("no shift"):
            site = site._replace(shift=None)
        if self._is("no offset"):
            site = site._replace(offset=0.0)
        if self._is("LayerNorm"):
            site = site._replace(center=False, shift=None)
        if self._is("rounds what it carries") and site.residual is not None:
            site = site._replace(residual=site.residual.bfloat16())
        return super().start(site)

    def wait(self, slot, in_workspace):
        norm, residual, *others = super().wait(slot, in_workspace)
        if self._is("a vector") and norm.numel():
            norm[-1, 16:24] = norm[0, 16:24]
        return norm, residual, *others

    def fused(self, site, in_workspace):
        norm, residual, *others = super().fused(site, in_workspace)
        if others and self._is("scales"):
            others[1] = others[1].roll(1, 0)
        return norm * (1.5 if self._is("fused") or (self._is("33 tokens") and len(site.x) == 33) else 1.0), residual, *others


def settle(requested, missing=(), wrong=(), how="fused", hosts=("here", "here")):
    """(name, why not a better one) on this rank; or the error. hosts: where the ranks are"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose.link, "host", lambda: hosts[dist.get_rank()])
        patch.setattr(choose, "Symmetric", type("Stand", (Stand,), {"missing": missing, "wrong": wrong, "how": how}))
        patch.setattr(choose, "chosen", {})
        # CPU ranks agree only here: on real ones there is nothing to agree on.
        patch.setattr(choose, "candidates", lambda *a, c=choose.candidates: choose._agree(a[1], *c(*a)))
        try:
            transport, why_not = choose.choose(requested, dist.group.WORLD.group_name, CPU)
        except TokenWeaveError as error:
            return str(error)
        return transport.name, why_not


@pytest.mark.parametrize(
    "requested, missing, wrong, expected",
    [
        ("auto", (), (), ("multimem", "")),
        ("auto", [("multimem", 1)], (), ("peer", "multimem: not here (rank 1)")),
        ("auto", [("multimem", 0), ("peer", 1)], (), ("process_group", "multimem: not here (rank 0); peer: not here (rank 1)")),
        ("process_group", (), (), ("process_group", "")),
    ],
)
def test_all_ranks_take_the_best_that_all_have(ranks, requested, missing, wrong, expected):
    assert ranks(settle, requested, missing, wrong) == [expected, expected]


def test_ranks_on_two_hosts_have_the_process_group(ranks):
    """Whatever the environment says."""
    apart = "the ranks of the group are not all on one host: rank 1 is not where rank 0 is"
    answers = ranks(settle, "auto", (), (), "fused", ("here", "there"))
    assert answers == [("process_group", f"multimem: {apart}; peer: {apart}")] * 2
    answers = ranks(settle, "auto:8", (), (), "fused", ("here", "there"))
    assert [name for name, _ in answers] == ["process_group:8"] * 2


def test_a_wire_is_that_of_the_process_group(ranks):
    why = "wire of 8 bits: transport multimem is taken, which sends values in the model's dtype; process_group has 8 bits"
    assert ranks(settle, "auto:8") == [("multimem", why)] * 2


@pytest.mark.parametrize("wrong", ([0], [1]))
def test_multimem_that_is_wrong_on_a_rank_is_not_taken_on_any(ranks, wrong):
    for name, why_not in ranks(settle, "auto", (), wrong):
        assert name == "peer"
        assert why_not.startswith("multimem: its self-test failed: the norm of ") and why_not.endswith(f"on rank {wrong[0]}")


def test_a_forced_transport_never_falls_back(ranks):
    for answer in ranks(settle, "peer", [("peer", 1)]):
        assert answer == "option 'tokenweave.transport' is 'peer', which is not possible here: peer: not here (rank 1)"
    for answer in ranks(settle, "multimem", (), [1]):
        assert "which is not possible here: multimem: its self-test failed" in answer


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", ("linear", "no shift", "no offset", "LayerNorm", "a vector", "33 tokens", "scales"))
def test_whatever_is_wrong_is_noticed(ranks, how):
    for name, why_not in ranks(settle, "auto", (), [1], how):
        assert name == "peer"
        assert why_not.startswith("multimem: its self-test failed: ")
        assert why_not.endswith("on rank 0" if how == "linear" else "on rank 1"), "what goes into the sum is wrong on all ranks"


def test_a_self_test_that_fails_on_a_rank_leaves_nobody_waiting(ranks):
    for name, why_not in ranks(settle, "auto", (), [1], "no memory"):
        assert name == "peer"
        assert "the allocation of a workspace failed on rank 1" in why_not and "MemoryError: none is left" in why_not


def make_together(fails):
    def step():
        if dist.get_rank() in fails:
            raise MemoryError(f"none on {dist.get_rank()}")
        return "made"

    try:
        return together(dist.group.WORLD.group_name, "this", step, 60)
    except WorkspaceError as error:
        return str(error).replace(f"group {dist.group.WORLD.group_name},", "group G,")


def test_all_ranks_do_it_or_none(ranks):
    assert ranks(make_together, ()) == ["made", "made"]
    for fails, first in (([1], 1), ([0], 0), ([0, 1], 0)):
        said = f"this failed on rank {first} of group G, so that no rank goes on: MemoryError: none on {first}"
        assert ranks(make_together, fails) == [said, said]


# --- Which is the fastest --------------------------------------------------------------------------------------------


def test_the_first_is_taken_unless_another_is_clearly_faster():
    names = ["multimem", "peer", "process_group"]
    assert choose.fastest(names, {}) == "multimem"
    assert choose.fastest(names, dict(zip(names, (1.0, 0.99, 0.99)))) == "multimem"
    assert choose.fastest(names, dict(zip(names, (1.0, 0.97, 0.96)))) == "peer"
    assert choose.fastest(names, dict(zip(names, (1.0, 0.99, 0.5)))) == "process_group"


def compare(kept, seconds, cannot=()):
    """On each rank: what it has on its disk, and how many seconds calls over each transport take it."""
    rank, group, measured = dist.get_rank(), dist.group.WORLD.group_name, []

    def prepare(calls):
        def step():
            if rank in cannot:
                raise MemoryError

        together(group, "a workspace", step, 60)

    def take(transport, *_):
        measured.append(transport.name)
        return seconds[rank][transport.name]

    transports = {name: SimpleNamespace(name=name, prepare=prepare) for name in seconds[0]}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TW_COMPILE_CACHE_DIR", folder)
        patch.setattr(tuning, "seconds_of_call", take)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        key = {"transports": [*transports], "link": "slow", "gpu": "GPU", "ranks": 2, "version": tuning.agree.version()}
        path = records.path("transports", key)
        if kept[rank] is not None:
            path.write_text(kept[rank])
        try:
            said = tuning.compare(transports, group, CPU, "slow")
        except WorkspaceError as error:
            return str(error), os.listdir(folder)
        return said, bool(measured), records.read("transports", key)


def test_the_slowest_rank_decides_which_is_the_fastest(ranks):
    seconds = [{"peer": 1.0, "process_group": 3.0}, {"peer": 4.0, "process_group": 2.0}]
    wanted = {"peer": pytest.approx(4.0), "process_group": pytest.approx(3.0)}
    assert ranks(compare, (None, None), seconds) == [(wanted, True, wanted)] * 2
    for junk in ("{", "[]", '{"value": {"peer": 1.0}}', '{"value": {"peer": "x", "process_group": 1}}'):
        assert ranks(compare, (junk, None), seconds) == [(wanted, True, wanted)] * 2


def test_what_a_rank_knows_all_take(ranks):
    seconds, known = [{"peer": 1.0, "process_group": 3.0}] * 2, {"peer": 0.5, "process_group": 0.25}
    of_known, of_other = (json.dumps({"value": value}) for value in (known, {"peer": 9, "process_group": 9}))
    for kept in ((of_known, None), (None, of_known), (of_known, of_other)):
        assert ranks(compare, kept, seconds) == [(known, False, known)] * 2


def test_a_comparison_that_a_rank_has_no_memory_for(ranks):
    for message, files in ranks(compare, (None, None), [{"peer": 1.0, "process_group": 3.0}] * 2, [1]):
        assert "a workspace failed on rank 1" in message and files == []


def test_workspace_bytes_are_those_of_all_groups(monkeypatch):
    held = [(torch.device("cuda", 0), 5), (torch.device("cuda", 1), 7), (torch.device("cuda", 0), 10), (CPU, 0)]
    stands = {i: (SimpleNamespace(device=device, workspace_bytes=lambda n=n: n), "") for i, (device, n) in enumerate(held)}
    monkeypatch.setattr(choose, "chosen", stands)
    assert choose.workspace_bytes() == {torch.device("cuda", 0): 15, torch.device("cuda", 1): 7}
