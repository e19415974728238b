"""warmup(): all sizes are compiled before they are needed, on all ranks alike, with errors that say what is wrong."""

import contextlib
import io

import pytest
import torch
import torch.distributed as dist
from graphs import without_codegen
from models import VOCAB, parallel

import tw_compile
from tw_compile import TokenWeaveError, backend, report


def compiled(model=None):
    return torch.compile(model or parallel("functional", 1), backend=backend.tokenweave, options={"tokenweave.min_tokens": 32})


class Seen(torch.nn.Module):
    """Remembers with what it was called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, *args, **kwargs):
        self.calls.append((args, kwargs))


@pytest.mark.full
def test_what_it_compiles_is_not_compiled_again(world, capsys):
    run = compiled()
    with without_codegen():
        made = tw_compile.warmup(run, [64, (2, 8), 48])
        assert [report.mode for report in made] == ["weave", "off", "weave"] and made == tw_compile.reports()
        for shape in ((1, 64), (2, 8), (1, 48), (1, 40)):
            with torch.no_grad():
                run(torch.randint(0, VOCAB, shape))
        assert tw_compile.reports() == made
        assert tw_compile.warmup(run, [64], progress=False) == []
    assert "1 × 48 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("made, args, kwargs", [((1, 2), (1, 2), {}), ({"a": 1}, (), {"a": 1}), (3, (3,), {})])
def test_inputs_of_ones_own(world, monkeypatch, made, args, kwargs):
    monkeypatch.setattr(report, "_reports", [None])
    model, sizes = Seen(), []
    tw_compile.warmup(model, [8, (2, 4)], lambda *size: sizes.append(size) or made, calls=1, progress=False)
    assert sizes == [(1, 8), (2, 4)] and model.calls == [(args, kwargs)] * 2


def test_ids(world, monkeypatch):
    monkeypatch.setattr(report, "_reports", [None])
    model = Seen()
    tw_compile.warmup(model, [(2, 4)], device="cpu", progress=False)
    ((ids,), _), _ = model.calls
    assert (ids.shape, ids.dtype, ids.device.type) == ((2, 4), torch.long, "cpu")


@pytest.mark.parametrize("size", [0, (1, 2, 3), "8", (2, 0), 2.0])
def test_what_is_no_size(world, size):
    with pytest.raises(TokenWeaveError, match="is not a size: a size is a number of tokens, or"):
        tw_compile.warmup(Seen(), [size])


def test_a_model_that_fails(world):
    def fail(ids):
        raise ValueError("no such layer")

    with pytest.raises(TokenWeaveError, match="the warm-up with 1 × 8 tokens failed: ValueError: no such layer"):
        tw_compile.warmup(fail, [8], progress=False)


def test_a_model_that_is_not_compiled(world):
    with pytest.raises(TokenWeaveError, match="no graph was compiled: warmup takes what torch.compile"):
        tw_compile.warmup(parallel("functional", 1), [8], progress=False)


def on_a_rank(sizes, fails=None):
    """(modes of the reports, or the error; what was shown)"""
    torch._dynamo.reset()
    shown = io.StringIO()

    def inputs(sequences, tokens):
        if dist.get_rank() == fails:
            raise KeyError("a file")
        return torch.zeros(sequences, tokens, dtype=torch.long)

    with contextlib.redirect_stderr(shown), without_codegen():
        try:
            made = tw_compile.warmup(compiled(), sizes[dist.get_rank()], inputs)
        except TokenWeaveError as error:
            return str(error), ""
    return [report.mode for report in made], "warm-up" in shown.getvalue()


@pytest.mark.slow
def test_ranks(ranks):
    assert ranks(on_a_rank, [[64, 8]] * 2) == [(["weave", "off"], True), (["weave", "off"], False)]
    (message, _), (other, _) = ranks(on_a_rank, [[64, 8], [64]])
    assert message == other and "rank 0: [[[1, 64], [1, 8]], 2]; rank 1: [[[1, 64]], 2]" in message
    (message, _), (other, _) = ranks(on_a_rank, [[8]] * 2, 1)
    assert message == other == "the inputs of 1 × 8 tokens could not be made on rank 1: KeyError: 'a file'"
