"""What is kept from process to process: ``$TW_COMPILE_CACHE_DIR``, or ``~/.cache/tw_compile``.

Programs are among it, so that what comes from there is checked first: only a directory and a file that are this user's, and that
nobody else can write to, are taken; and only a file that is whole, which its last bytes, a digest of the rest, say.
"""

import functools
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

log = logging.getLogger("tw_compile")

_Loaded = TypeVar("_Loaded")
_DIGEST = hashlib.sha256().digest_size


def directory() -> Path:
    """Where all of it is kept."""
    given = os.environ.get("TW_COMPILE_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "tw_compile"


def path(name: str, key: object, suffix: str) -> Path:
    """Where what belongs to ``name`` and ``key``, whose ``repr`` says all that it depends on, is kept."""
    return directory() / f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.{suffix}"


def kept(path: Path, make: Callable[[], bytes], load: Callable[[Path], _Loaded]) -> _Loaded:
    """What ``load`` makes of the file there.

    It is made anew where it is missing, is not whole, or cannot be loaded, as one of another machine with the same home cannot; and
    somewhere else where that directory cannot be written, or is not safe.
    """
    reason = unsafe(path)
    if reason is None and content(path) is not None:
        try:
            return load(path)
        except Exception as error:
            log.warning("%s is made anew: it cannot be loaded: %s", path, error)
    sealed = _sealed(make())
    if reason is not None or not write(path, sealed):
        path = _private_directory(reason) / path.name
        write(path, sealed)
    return load(path)


def content(path: Path) -> bytes | None:
    """What was made; None where there is none, or not all of it."""
    try:
        sealed = path.read_bytes()
    except OSError:
        return None
    made = sealed[:-_DIGEST]
    return made if sealed == _sealed(made) else None


def write(path: Path, content: bytes) -> bool:
    """Whether it could be written. Where it cannot, all that is lost is the time to make the content again.

    The file is for this user alone, and so is its directory, if that is not there yet.
    """
    try:
        # Many ranks may do this at once: each writes a file of its own, and the rename is atomic.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return False
    return True


def unsafe(path: Path) -> str | None:
    """Why a program must not be loaded from there; None if it may, or if there is nothing."""
    for place in (path.parent, path):
        try:
            found = place.stat()
        except OSError:
            continue
        if found.st_uid != os.geteuid():
            return f"{place} belongs to user {found.st_uid}, not to user {os.geteuid()}, who runs this"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others can write to {place}: chmod go-w {place}"
    return None


def _sealed(made: bytes) -> bytes:
    return made + hashlib.sha256(made).digest()


@functools.cache
def _private_directory(reason: str | None) -> Path:
    """One of this process, gone with it. reason: why the usual one is not safe, if so"""
    if reason is not None:
        log.warning("no compiled programs are kept: %s", reason)
    directory = tempfile.TemporaryDirectory(prefix="tw_compile-")
    _private_directories.append(directory)
    return Path(directory.name)


_private_directories = []  # so that they live as long as the process
