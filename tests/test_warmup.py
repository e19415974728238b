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
    """Remembers with what it was called. Of its calls no graph is compiled, as of those that were compiled before."""

    def __init__(self):
        super().__init__()
        self.calls = []

    @torch.compiler.disable
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
    tw_compile.warmup(compiled(model), [8, (2, 4)], lambda *size: sizes.append(size) or made, calls=1, progress=False)
    assert sizes == [(1, 8), (2, 4)] and model.calls == [(args, kwargs)] * 2


def test_ids(world, monkeypatch):
    monkeypatch.setattr(report, "_reports", [None])
    model = Seen()
    tw_compile.warmup(compiled(model), [(2, 4)], device="cpu", progress=False)
    ((ids,), _), _ = model.calls
    assert (ids.shape, ids.dtype, ids.device.type) == ((2, 4), torch.long, "cpu")


@pytest.mark.parametrize("size", [0, (1, 2, 3), "8", (2, 0), 2.0, True])
def test_what_is_no_size(world, size):
    with pytest.raises(TokenWeaveError, match="is not a size: a size is a number of tokens, or"):
        tw_compile.warmup(Seen(), [size])


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"model": {}}, 'model is {}; warmup takes what torch.compile(model, backend="tokenweave") returns'),
        ({"sizes": 2048}, "sizes is 2048; it takes a list of sizes, such as [2048, 1, (16, 1)]"),
        ({"sizes": "2048"}, "sizes is '2048'; it takes a list of sizes, such as [2048, 1, (16, 1)]"),
        ({"make_inputs": 8}, "make_inputs is 8; it takes a function of (sequences, tokens)"),
        ({"device": "gpu"}, "device is 'gpu'; it takes a device such as 'cuda' or 'cpu'"),
        ({"calls": 0}, "calls is 0; it takes a whole number from 1 on"),
        ({"calls": "2"}, "calls is '2'; it takes a whole number from 1 on"),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else "",
)
def test_a_wrong_argument(world, wrong, said):
    with pytest.raises(TokenWeaveError) as raised:
        tw_compile.warmup(**({"model": Seen(), "sizes": [8]} | wrong))
    assert str(raised.value) == said


def test_a_model_that_fails(world):
    def fail(ids):
        raise ValueError("no such layer")

    with pytest.raises(TokenWeaveError, match="the warm-up with 1 × 8 tokens failed: ValueError: no such layer"):
        tw_compile.warmup(fail, [8], progress=False)


def test_a_model_that_is_not_compiled_with_this_backend(world):
    """Also where another one is, whose graphs have reports; and one that was compiled before is."""
    model, other = parallel("functional", 1), torch.compile(parallel("functional", 1), backend="eager")

    def no_site(ids):
        return ids + 1

    def wrapped(ids):
        return run(ids)

    def not_compiled(ids):
        return model(ids)

    def assert_refused(model):
        with pytest.raises(TokenWeaveError, match="no graph of this backend was run: warmup takes what torch.compile"):
            tw_compile.warmup(model, [8], progress=False)

    assert_refused(model)
    with without_codegen():
        run, without_site = compiled(), torch.compile(no_site, backend=backend.tokenweave)
        assert len(tw_compile.warmup(run, [8], progress=False)) == len(tw_compile.warmup(without_site, [8], progress=False)) == 1
        for again in (run, wrapped, without_site):
            assert tw_compile.warmup(again, [8], progress=False) == []
        for wrong in (model, other, not_compiled):
            assert_refused(wrong)
        assert tw_compile.warmup(model, [], progress=False) == []


def test_a_model_whose_layers_are_compiled(world):
    model = parallel("functional", 1)
    for block in model.layers:
        block.compile(backend=backend.tokenweave)
    with without_codegen():
        assert tw_compile.warmup(model, [8], progress=False) != [] == tw_compile.warmup(model, [8], progress=False)


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
    (message, _), (other, _) = ranks(on_a_rank, [[8], 8])
    assert message == other == "rank 1: sizes is 8; it takes a list of sizes, such as [2048, 1, (16, 1)]"
    (message, _), (other, _) = ranks(on_a_rank, [[8]] * 2, 1)
    assert message == other == "the inputs of 1 × 8 tokens could not be made on rank 1: KeyError: 'a file'"
