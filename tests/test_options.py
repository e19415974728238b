"""Options: each is validated, with a message that says what to do."""

import pytest
import torch._inductor.config

from tw_compile.options import Options, TokenWeaveError, parse


def error(**options) -> str:
    with pytest.raises(TokenWeaveError) as raised:
        parse({f"tokenweave.{name}": value for name, value in options.items()})
    return str(raised.value)


def test_nothing_given_is_all_auto():
    assert parse(None) == parse({}) == (Options("auto", "auto", "auto", "auto", "auto", "auto"), {})


def test_ours_are_kept_apart_from_inductors():
    ours, inductor = parse({"tokenweave.mode": "fuse", "tokenweave.ctas": 4, "max_autotune": True})
    assert ours == Options(mode="fuse", ctas=4)
    assert inductor == {"max_autotune": True}


@pytest.mark.parametrize("mode", ["auto", "weave", "fuse", "off"])
def test_every_mode(mode):
    assert parse({"tokenweave.mode": mode})[0].mode == mode


@pytest.mark.parametrize("transport", ["auto", "multimem", "peer", "hierarchical", "process_group"])
def test_every_transport(transport):
    assert parse({"tokenweave.transport": transport})[0].transport == transport


@pytest.mark.parametrize(
    "name, near",
    [("min_token", "min_tokens"), ("modes", "mode"), ("cta", "ctas"), ("transports", "transport"), ("Split", "split")],
)
def test_an_unknown_option_names_the_nearest(name, near):
    assert error(**{name: 1}).startswith(f"unknown option 'tokenweave.{name}'; did you mean 'tokenweave.{near}'?")


@pytest.mark.parametrize("name", ["mode", "transport", "wire", "min_tokens", "split", "ctas", "cuda_graphs", "timeout"])
def test_an_option_without_its_prefix(name):
    assert not hasattr(torch._inductor.config, name)
    with pytest.raises(TokenWeaveError, match=f"unknown option '{name}'; did you mean 'tokenweave.{name}'"):
        parse({name: "auto"})


@pytest.mark.parametrize("options", ["tokenweave.mode=fuse", [("tokenweave.mode", "fuse")], {1: 2}, 3], ids=repr)
def test_options_that_are_no_dict(options):
    with pytest.raises(TokenWeaveError, match="options is .*; it takes a dict, such as {'tokenweave.mode': 'fuse'}"):
        parse(options)


def test_the_kill_switch_is_requested_by_its_name(monkeypatch):
    assert "TW_COMPILE_MODE" not in parse(None)[0].requested
    monkeypatch.setenv("TW_COMPILE_MODE", "fuse")
    requested = parse(None)[0].requested
    assert requested["TW_COMPILE_MODE"] == "fuse" and "most" not in requested


def test_an_unknown_option_like_none_of_them_still_lists_them_all():
    message = error(zzz=1)
    assert all(f"tokenweave.{name}" in message for name in ("mode", "transport", "min_tokens", "split", "ctas", "timeout"))


@pytest.mark.parametrize(
    "name, choices", [
        ("mode", "'auto', 'weave', 'fuse', 'off'"),
        ("transport", "'auto', 'multimem', 'peer', 'hierarchical', 'process_group'"),
        ("cuda_graphs", "'auto', True, False"),
    ],
)
@pytest.mark.parametrize("value", ["Weave", "", None, 1, "True", ["auto"]], ids=repr)
def test_a_bad_choice(name, choices, value):
    assert error(**{name: value}) == f"option 'tokenweave.{name}' is {value!r}; it takes one of {choices}"


@pytest.mark.parametrize("name", ["min_tokens", "split", "ctas", "timeout"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "8", "Auto"], ids=repr)
def test_a_bad_number(name, value):
    assert error(**{name: value}) == f"option 'tokenweave.{name}' is {value!r}; it takes 'auto' or a whole number from 1 on"


@pytest.mark.parametrize("name", ["min_tokens", "split", "ctas", "timeout"])
@pytest.mark.parametrize("value", [1, 4096, "auto"])
def test_a_good_number(name, value):
    assert getattr(parse({f"tokenweave.{name}": value})[0], name) == value


def test_options_cannot_be_changed():
    with pytest.raises(AttributeError):
        Options().mode = "fuse"
