"""Diffusion transformers: two streams of tokens, gates on reduced values, LayerNorms without weights."""

import pytest

pytest.importorskip("diffusers.hooks.tensor_parallel", reason="models are made with diffusers, which is not installed")

import diffusion

# name -> (all-reduces, sites that are cut, reasons of all-reduces that are no sites)
EXPECTED = {
    "SD3": (6, 4, []),
    "Flux": (10, 4, []),
    "Qwen-Image": (7, 4, ["the reduced value has 0 users (none)"]),  # the text behind the last block is not used
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", EXPECTED)
def test_all_sums_are_sites(ranks, name):
    (reports, difference, error, eager_error), other = ranks(diffusion.forward, name)
    (report,), (all_reduces, woven, refused) = reports, EXPECTED[name]
    assert sum(site.merged for site in report.sites) == all_reduces and sum(site.woven for site in report.sites) == woven
    assert [refusal.reason for refusal in report.refusals] == refused
    assert f"{len(report.sites) - woven} sites are not cut: they have other numbers of tokens than most" in report.reasons
    assert difference < 2e-6 and error <= 1.1 * eager_error and other[0] == reports
