"""What is kept from process to process: who may have written it, and what becomes of what is damaged."""

import os
import stat

import pytest

from tw_compile import files


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TW_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    files._private_directory.cache_clear()
    yield files.path("thing", "key", "bin")
    files._private_directory.cache_clear()


def kept(place, made=b"new", load=None):
    """(what was loaded, where from, how often it was made)"""
    makes, places = [], []

    def make():
        makes.append(made)
        return made

    def content(path):
        places.append(path)
        return files.content(path)

    return files.kept(place, make, load or content), places and places[-1], len(makes)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_once_and_for_this_user_alone(place):
    before = os.umask(0)
    try:
        assert kept(place) == (b"new", place, 1)
    finally:
        os.umask(before)
    assert kept(place, b"other") == (b"new", place, 0)
    assert (mode(place.parent), mode(place)) == (0o700, 0o600)
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize("damage", [
    lambda sealed: b"", lambda sealed: sealed[: len(sealed) // 2], lambda sealed: sealed[:-1], lambda sealed: b"?" + sealed[1:],
    lambda sealed: sealed[:-32],
], ids=("empty", "half", "less a byte", "other bytes", "without its digest"))  # fmt: skip
def test_what_is_damaged_is_made_anew(place, damage):
    kept(place)
    place.write_bytes(damage(place.read_bytes()))
    assert files.content(place) is None
    assert kept(place, b"again") == (b"again", place, 1)
    assert kept(place) == (b"again", place, 0)


def test_what_cannot_be_loaded_is_made_anew(place, caplog):
    """Such as a library that another machine with the same home has made."""

    def load(path):
        if files.content(path) == b"of another machine":
            raise ImportError("wrong ELF class")
        return "loaded"

    kept(place, b"of another machine")
    assert kept(place, b"new", load) == ("loaded", [], 1) and kept(place, b"newer", load) == ("loaded", [], 0)
    assert "cannot be loaded and is made again: wrong ELF class" in caplog.text


def test_what_cannot_be_loaded_though_it_is_new_is_an_error(place):
    def load(path):
        raise ImportError("wrong ELF class")

    with pytest.raises(ImportError):
        kept(place, load=load)


@pytest.mark.parametrize("of", ("directory", "file"))
@pytest.mark.parametrize("bits", (0o020, 0o002), ids=oct)
def test_what_others_can_write_to_is_not_loaded(place, of, bits, caplog):
    kept(place, b"theirs")
    target = place.parent if of == "directory" else place
    target.chmod(mode(target) | bits)
    made, where, makes = kept(place)
    assert (made, makes) == (b"new", 1) and where.parent != place.parent and mode(where.parent) == 0o700
    assert f"compiled programs are not cached: others can write to {target}: chmod go-w {target}" in caplog.text
    caplog.clear()
    assert kept(place, b"newer")[0] == b"newer" and not caplog.text, "said once"
    target.chmod(mode(target) & ~bits)
    assert kept(place) == (b"theirs", place, 0)


def test_what_belongs_to_another_user_is_not_loaded(place, monkeypatch):
    kept(place, b"theirs")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert f"{place.parent} belongs to user {os.getuid()}, not to user {os.getuid() + 1}" in files.unsafe(place)


def test_a_directory_that_cannot_be_written_does_no_harm(place):
    place.parent.write_text("a file")
    made, where, makes = kept(place)
    assert (made, makes) == (b"new", 1) and where.parent != place.parent and mode(where.parent) == 0o700
