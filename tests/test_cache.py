"""Writes to a key-value cache stay cut: each half writes its own, and the first half's queries read no more than they may."""

import functools
import re

import expecttest
import pytest
import torch
import torch.nn.functional as F
from graphs import capture, rewrite, run_as_it_is, text, without_codegen
from sites import H, all_reduce, hf_norm, values

from tw_compile import backend, passes
from tw_compile.options import Options

pytestmark = pytest.mark.usefixtures("world")

HEADS, D = 4, 4
CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
SDPA = F.scaled_dot_product_attention


def block(x, residual, weight, *inputs, attend):
    """An attention between two sites. attend: (query, key, value, *inputs) -> ([B, heads, T, D], *new caches)"""
    residual = residual + all_reduce(x)
    normed = hf_norm(residual, weight)
    batch, tokens = x.shape[:2]
    q, k, v = ((normed * f).view(batch, tokens, HEADS, D).transpose(1, 2) for f in (1.0, 1.5, 2.0))
    out, *caches = attend(q, k, v, *inputs)
    return hf_norm(residual + all_reduce(out.transpose(1, 2).reshape(batch, tokens, H)), weight), *caches


def cut(attend, *inputs, batch=1, tokens=6, unsplit=0, dynamic=False, **options):
    """Weave it, and assert that the results are right, the caches included, and how many writes are not split."""
    shape = (batch, tokens, H)
    arguments = values(*shape), values(*shape), values(H), *inputs
    new = rewrite(functools.partial(block, attend=attend), *arguments, mode="weave", dynamic=dynamic, **options)
    assert new.report.mode == "weave" and len(new.report.joins) == unsplit
    assert all("no mask hides" in each.reason or "what reads it" in each.reason for each in new.report.joins)
    new.check()
    return new


def keys_of_first_half(new) -> torch.fx.Node:
    return next(n for n in new.after.nodes if n.target is CPU and n.meta["half"] == 0).args[1]


# --- a static cache --------------------------------------------------------------------------------------------------

ROWS = 10


def caches(batch=1, fill=3.0):
    """Full of what was there before: whoever reads it is found out."""
    return [torch.full((batch, HEADS, ROWS, D), fill), torch.full((batch, HEADS, ROWS, D), -fill)]


def static(q, k, v, keys, vals, start, allowed=lambda query, key: key <= query, in_place=True, **how):
    """Written at start, start + 1, …"""
    at = torch.arange(q.shape[2]) + start
    put = torch.Tensor.index_copy_ if in_place else torch.Tensor.index_copy
    keys, vals = put(keys, 2, at, k), put(vals, 2, at, v)
    mask = allowed(at[:, None], torch.arange(ROWS)[None, :])
    return SDPA(q, keys, vals, attn_mask=mask[None, None], **how), *(() if in_place else (keys, vals))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("in_place", [False, True], ids=["returned", "in place"])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_static_cache(batch, in_place, dynamic):
    attend = functools.partial(static, in_place=in_place)
    new = cut(attend, *caches(batch), torch.tensor(2), batch=batch, dynamic=dynamic)
    assert new.count(torch.ops.aten.index_put.default) == 4
    assert new.count(torch.ops.aten.cat.default) == 1, "the tokens at the end; no cache"


@pytest.mark.parametrize("batch", [1, 2])
def test_both_halves_write_in_place(batch):
    """Inductor copies no cache."""
    graphs = []

    def keeping(gm, inputs, **kwargs):
        run = run_as_it_is(gm, inputs, **kwargs)
        graphs.append(gm.graph)
        return run

    shape = (batch, 6, H)
    with torch.no_grad(), without_codegen(keeping):
        compiled = torch.compile(functools.partial(block, attend=static), backend=backend.tokenweave, options={"tokenweave.mode": "weave"})
        compiled(values(*shape), values(*shape), values(H), *caches(batch), torch.tensor(2))
    writes = [node for node in graphs[-1].nodes if "index_put" in str(node.target)]
    assert [str(node.target) for node in writes] == ["aten.index_put_.default"] * 4
    # Into the caches themselves, of which Inductor then has nothing to copy back.
    assert all(node.args[0].op == "placeholder" or node.args[0] in writes for node in writes)


def test_the_first_half_does_not_wait_for_the_second():
    new = cut(static, *caches(), torch.tensor(2))
    assert keys_of_first_half(new).meta["half"] == 0


NOT_HIDDEN = {
    "all": lambda q, k: k < ROWS + q,
    "one ahead": lambda q, k: k <= q + 1,
    "later ones": lambda q, k: k >= q,
}


@pytest.mark.parametrize("mask", NOT_HIDDEN)
def test_a_mask_that_shows_later_rows(mask):
    """The first half reads what the second half writes, not what was there before."""
    new = cut(functools.partial(static, allowed=NOT_HIDDEN[mask]), *caches(), torch.tensor(2), unsplit=2)
    assert keys_of_first_half(new).meta["half"] == 1


def test_no_mask():
    def attend(q, k, v, keys, vals, at):
        return (SDPA(q, keys.index_copy(2, at, k), vals.index_copy(2, at, v)),)

    cut(attend, *caches(), torch.arange(6) + 2, unsplit=2)


def test_a_mask_from_elsewhere():
    def attend(q, k, v, keys, vals, at, mask):
        return (SDPA(q, keys.index_copy(2, at, k), vals.index_copy(2, at, v), attn_mask=mask),)

    cut(attend, *caches(), torch.arange(6) + 2, torch.rand(1, 1, 6, ROWS) > 0.3, unsplit=2)
    cut(attend, *caches(4), torch.arange(6) + 2, torch.rand(4, 1, 6, ROWS) > 0.3, batch=4)


def test_positions_in_any_order():
    """The mask goes by rows as they follow, but they do not."""

    def attend(q, k, v, keys, vals, at):
        mask = torch.arange(ROWS)[None, :] <= torch.arange(6)[:, None]
        return (SDPA(q, keys.index_copy(2, at, k), vals.index_copy(2, at, v), attn_mask=mask),)

    at = torch.tensor([5, 4, 3, 2, 1, 0])
    cut(attend, *caches(), at, unsplit=2)
    cut(attend, *caches(3), at, batch=3)


def test_a_mask_that_begins_elsewhere():
    """Its rows are those of other positions than the cache is written at."""

    def attend(q, k, v, keys, vals, start, other):
        mask = torch.arange(ROWS)[None, :] <= torch.arange(6)[:, None] + other
        at = torch.arange(6) + start
        return (SDPA(q, keys.index_copy(2, at, k), vals.index_copy(2, at, v), attn_mask=mask),)

    cut(attend, *caches(), torch.tensor(0), torch.tensor(4), unsplit=2)


def test_values_at_other_positions_than_keys():
    def attend(q, k, v, keys, vals, start):
        at = torch.arange(6) + start
        mask = torch.arange(ROWS)[None, :] <= at[:, None]
        return (SDPA(q, keys.index_copy(2, at, k), vals.index_copy(2, torch.arange(6), v), attn_mask=mask),)

    cut(attend, *caches(), torch.tensor(2), unsplit=2)


def test_a_cache_that_is_read_by_another_op_too():
    def attend(q, k, v, keys, vals, start):
        out, keys, vals = static(q, k, v, keys, vals, start, in_place=False)
        return out + keys.mean(2, keepdim=True), keys, vals

    cut(attend, *caches(), torch.tensor(2), unsplit=1)
    cut(attend, *caches(2), torch.tensor(2), batch=2)


@pytest.mark.parametrize("batch", [1, 2])
def test_grouped_queries(batch):
    """Keys are repeated for the heads that share them, between the cache and the attention."""

    def attend(q, k, v, keys, vals, start):
        at = torch.arange(6) + start
        mask = torch.arange(ROWS)[None, :] <= at[:, None]
        shared = [c[:, :2].index_copy(2, at, new[:, :2]) for c, new in ((keys, k), (vals, v))]
        wide = [c[:, :, None].expand(-1, -1, 2, -1, -1).reshape(-1, HEADS, ROWS, D) for c in shared]
        return SDPA(q, *wide, attn_mask=mask), *shared

    cut(attend, *caches(batch), torch.tensor(2), batch=batch)


# --- ways to write it ------------------------------------------------------------------------------------------------


def by_setitem(cache, at, rows):
    cache[:, :, at] = rows  # PyTorch drops leading dimensions of size 1 of the rows


def by_slice(cache, at, rows):
    cache[:, :, 2 : 2 + rows.shape[2]] = rows


def by_scatter(cache, at, rows):
    cache.scatter_(2, at[None, None, :, None].expand_as(rows), rows)


def by_entries(cache, at, rows):
    cache.transpose(1, 2)[torch.arange(len(rows))[:, None], at[None, :]] = rows.transpose(1, 2)


def of_layers(cache, at, rows):
    """A cache of two layers, of which this is the second."""
    both = torch.stack((cache, cache))
    both[1, :, :, at] = rows
    cache.copy_(both[1])


# -> how many of the two writes both halves wait for: with one sequence, with two
WAYS = {by_setitem: (0, 0), by_slice: (0, 0), by_scatter: (0, 0), by_entries: (2, 2), of_layers: (2, 0)}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("put", WAYS, ids=lambda put: put.__name__)
def test_ways_to_write(put, batch, dynamic):
    """Each half writes its own rows. Where the rows cannot be followed to the attention, both halves wait for both writes."""

    def attend(q, k, v, keys, vals):
        at = torch.arange(q.shape[2]) + 2
        put(keys, at, k)
        put(vals, at, v)
        return (SDPA(q, keys, vals, attn_mask=(torch.arange(ROWS)[None, :] <= at[:, None])[None, None]),)

    cut(attend, *caches(batch), batch=batch, unsplit=WAYS[put][batch - 1], dynamic=dynamic)


# --- behind those of earlier calls -----------------------------------------------------------------------------------

PAST = 3


def past(batch=1):
    return values(batch, HEADS, PAST, D), values(batch, HEADS, PAST, D)


def appended(q, k, v, keys, vals, allowed=lambda query, key: key <= query):
    keys, vals = torch.cat((keys, k), 2), torch.cat((vals, v), 2)
    before = keys.shape[2] - q.shape[2]
    mask = allowed(torch.arange(q.shape[2])[:, None] + before, torch.arange(keys.shape[2])[None, :])
    return SDPA(q, keys, vals, attn_mask=mask), keys, vals


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_dynamic_cache(batch, dynamic):
    new = cut(appended, *past(batch), batch=batch, dynamic=dynamic)
    if batch == 1 and not dynamic:
        assert keys_of_first_half(new).meta["val"].shape[2] == PAST + 3


@pytest.mark.parametrize("mask", NOT_HIDDEN)
def test_a_mask_that_shows_later_keys(mask):
    new = cut(functools.partial(appended, allowed=NOT_HIDDEN[mask]), *past(), unsplit=2)
    assert keys_of_first_half(new).meta["val"].shape[2] == PAST + 6


def test_a_window():
    cut(functools.partial(appended, allowed=lambda q, k: (k <= q) & (k > q - 3)), *past())
    cut(functools.partial(static, allowed=lambda q, k: (k <= q) & (k > q - 3)), *caches(), torch.tensor(2))


def test_tokens_in_front_of_others_are_not_a_cache():
    def attend(q, k, v, keys, vals):
        return SDPA(q, torch.cat((k, keys), 2), torch.cat((v, vals), 2)), keys

    new = rewrite(functools.partial(block, attend=attend), values(1, 6, H), values(1, 6, H), values(H), *past(), mode="weave")
    assert [each.op for each in new.report.joins] == ["aten.cat.default"] * 2
    new.check()


# --- the graphs ------------------------------------------------------------------------------------------------------


class Snapshot(expecttest.TestCase):
    def split(self, batch, names, attend, *inputs):
        shape = (batch, 4, H)
        graph = capture(functools.partial(block, attend=attend), values(*shape), values(*shape), values(H), *inputs)
        sites = passes.fuse(graph, passes.find(graph), "auto", 0)
        graph, _, unsplit, *_ = passes.split(graph, sites, passes.choose_cut(sites, Options(mode="weave")))
        assert not unsplit
        graph.eliminate_dead_code()
        lines = text(graph, names).splitlines()
        kept = ("index_put", "slice_scatter", "flash", "copy_", "iota", "return", "cat")
        shown = "\n".join(line for line in lines if any(word in line for word in kept)) + "\n"
        # Numbered anew: how many nodes there are between them differs with the version of torch.
        names = list(dict.fromkeys(re.findall(r"%\d+", shown)))
        return re.sub(r"%\d+", lambda found: f"%{names.index(found.group())}", shown)

    def test_a_static_cache_between_tokens(self):
        self.assertExpectedInline(self.split(1, "x residual weight start keys values", static, *caches(), torch.tensor(2)), """\
  %0 = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[4]
0 %1 = aten.index_put(keys, [None, None, %2], %3) : f32[1, 4, 10, 4]
1 %4 = aten.index_put(%1, [None, None, %5], %6) : f32[1, 4, 10, 4]
0 %7 = aten.index_put(values, [None, None, %2], %8) : f32[1, 4, 10, 4]
1 %9 = aten.index_put(%7, [None, None, %5], %10) : f32[1, 4, 10, 4]
  %11 = prims.iota(10, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[10]
0 %12 = aten._scaled_dot_product_flash_attention_for_cpu(%13, %1, %7, 0, False, attn_mask=%14) : (f32[1, 4, 2, 4], f32[1, 4, 2])
1 %15 = aten._scaled_dot_product_flash_attention_for_cpu(%16, %4, %9, 0, False, attn_mask=%17) : (f32[1, 4, 2, 4], f32[1, 4, 2])
  %18 = aten.copy_(keys, %4) : f32[1, 4, 10, 4]
  %19 = aten.copy_(values, %9) : f32[1, 4, 10, 4]
  %20 = aten.cat([%21, %22], 1) : f32[1, 4, 16]
  return %20
""")

    def test_rows_that_lack_a_leading_dimension(self):
        def attend(q, k, v, keys, vals):
            at = torch.arange(4) + 2
            by_setitem(keys, at, k)
            by_slice(vals, at, v)
            return (SDPA(q, keys, vals, attn_mask=(torch.arange(ROWS)[None, :] <= at[:, None])[None, None]),)

        self.assertExpectedInline(self.split(1, "x residual weight keys values", attend, *caches()), """\
  %0 = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[4]
0 %1 = aten.index_put(keys, [None, None, %2], %3) : f32[1, 4, 10, 4]
1 %4 = aten.index_put(%1, [None, None, %5], %6) : f32[1, 4, 10, 4]
0 %7 = aten.slice_scatter(values, %8, 2, 2, 4) : f32[1, 4, 10, 4]
1 %9 = aten.slice_scatter(%7, %10, 2, 4, 6) : f32[1, 4, 10, 4]
  %11 = prims.iota(10, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[10]
0 %12 = aten._scaled_dot_product_flash_attention_for_cpu(%13, %1, %7, 0, False, attn_mask=%14) : (f32[1, 4, 2, 4], f32[1, 4, 2])
1 %15 = aten._scaled_dot_product_flash_attention_for_cpu(%16, %4, %9, 0, False, attn_mask=%17) : (f32[1, 4, 2, 4], f32[1, 4, 2])
  %18 = aten.copy_(keys, %4) : f32[1, 4, 10, 4]
  %19 = aten.copy_(values, %9) : f32[1, 4, 10, 4]
  %20 = aten.cat([%21, %22], 1) : f32[1, 4, 16]
  return %20
""")

    def test_a_static_cache_between_sequences(self):
        self.assertExpectedInline(self.split(2, "x residual weight start keys values", static, *caches(2), torch.tensor(2)), """\
  %0 = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[4]
0 %1 = prims.iota(1, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[1]
0 %2 = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[4]
0 %3 = aten.index_put(keys, [%4, %5, %6], %7) : f32[2, 4, 10, 4]
1 %8 = prims.iota(1, start=1, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[1]
1 %9 = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[4]
1 %10 = aten.index_put(%3, [%11, %12, %6], %13) : f32[2, 4, 10, 4]
0 %14 = prims.iota(1, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[1]
0 %15 = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[4]
0 %16 = aten.index_put(values, [%17, %18, %6], %19) : f32[2, 4, 10, 4]
1 %20 = prims.iota(1, start=1, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[1]
1 %21 = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[4]
1 %22 = aten.index_put(%16, [%23, %24, %6], %25) : f32[2, 4, 10, 4]
  %26 = prims.iota(10, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[10]
0 %27 = aten._scaled_dot_product_flash_attention_for_cpu(%28, %29, %30, attn_mask=%31) : (f32[1, 4, 4, 4], f32[1, 4, 4])
1 %32 = aten._scaled_dot_product_flash_attention_for_cpu(%33, %34, %35, attn_mask=%31) : (f32[1, 4, 4, 4], f32[1, 4, 4])
  %36 = aten.copy_(keys, %10) : f32[2, 4, 10, 4]
  %37 = aten.copy_(values, %22) : f32[2, 4, 10, 4]
  %38 = aten.cat([%39, %40], 0) : f32[2, 4, 16]
  return %38
""")

    def test_a_dynamic_cache_between_tokens(self):
        self.assertExpectedInline(self.split(1, "x residual weight keys values", appended, *past()), """\
  %0 = aten.cat([keys, %1, %2], 2) : f32[1, 4, 7, 4]
  %3 = aten.cat([values, %4, %5], 2) : f32[1, 4, 7, 4]
  %6 = prims.iota(7, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[7]
  %7 = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False) : torch.int64[4]
0 %8 = aten.cat([keys, %1], 2) : f32[1, 4, 5, 4]
0 %9 = aten.cat([values, %4], 2) : f32[1, 4, 5, 4]
0 %10 = aten._scaled_dot_product_flash_attention_for_cpu(%11, %8, %9, 0, False, attn_mask=%12) : (f32[1, 4, 2, 4], f32[1, 4, 2])
1 %13 = aten._scaled_dot_product_flash_attention_for_cpu(%14, %0, %3, 0, False, attn_mask=%15) : (f32[1, 4, 2, 4], f32[1, 4, 2])
  %16 = aten.cat([%17, %18], 1) : f32[1, 4, 16]
  return %16, %0, %3
""")
