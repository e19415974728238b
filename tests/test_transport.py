"""How the ranks of a group settle on one transport, with stand-ins for those that need GPUs."""

import pytest
import torch
import torch.distributed as dist

from tw_compile import TokenWeaveError
from tw_compile.ops import transport
from tw_compile.ops.process_group import ProcessGroup

CPU = torch.device("cpu")


class Stand(ProcessGroup):
    """In place of Symmetric. ``missing``: (transport, rank) pairs that say they cannot; ``wrong``: ranks whose sums are off."""

    missing, wrong = (), ()

    def __init__(self, group_name, device, multicast, tuning):
        super().__init__(group_name, device)
        self.name = "multimem" if multicast else "peer"

    @classmethod
    def unavailable(cls, group_name, device, multicast):
        return "not here" if ("multimem" if multicast else "peer", dist.get_rank()) in cls.missing else None

    def fused(self, x, *site):
        norm, residual = super().fused(x, *site)
        return norm * (1.5 if self.name == "multimem" and dist.get_rank() in self.wrong else 1.0), residual


def choose(requested, missing=(), wrong=()):
    """(name, why not a better one) on this rank; or the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "Symmetric", type("Stand", (Stand,), {"missing": missing, "wrong": wrong}))
        patch.setattr(transport, "chosen", {})
        # CPU ranks agree only here: on real ones there is nothing to agree on.
        patch.setattr(transport, "candidates", lambda *a, c=transport.candidates: transport._agree(a[1], *c(*a)))
        try:
            implementation, why_not = transport.choose(requested, dist.group.WORLD.group_name, CPU)
        except TokenWeaveError as error:
            return str(error)
        return implementation.name, why_not


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
    assert ranks(choose, requested, missing, wrong) == [expected, expected]


@pytest.mark.parametrize("wrong", ([0], [1]))
def test_multimem_that_is_wrong_on_a_rank_is_not_taken_on_any(ranks, wrong):
    for name, why_not in ranks(choose, "auto", (), wrong):
        assert name == "peer"
        assert why_not.startswith("multimem: its self-test failed: the norm of ") and why_not.endswith(f"on rank {wrong[0]}")


def test_a_forced_transport_never_falls_back(ranks):
    for answer in ranks(choose, "peer", [("peer", 1)]):
        assert answer == "option 'tokenweave.transport' is 'peer', which is not possible here: peer: not here (rank 1)"
    for answer in ranks(choose, "multimem", (), [1]):
        assert "which is not possible here: multimem: its self-test failed" in answer
