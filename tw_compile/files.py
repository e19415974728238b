"""The cache on disk: ``$TW_COMPILE_CACHE_DIR``, or ``~/.cache/tw_compile``.

Compiled programs are in it, so that files are checked before they are loaded: directory and file must belong to this user, and nobody
else may write to them. A file ends with a SHA-256 digest of its content, which shows whether it is complete.
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
    """The directory of the cache."""
    given = os.environ.get("TW_COMPILE_CACHE_DIR")
    return Path(given) if given else Path.home() / ".cache" / "tw_compile"


def path(name: str, key: object, suffix: str) -> Path:
    """The path of a cache entry. The ``repr`` of ``key`` must contain everything that the content depends on."""
    return directory() / f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.{suffix}"


def kept(path: Path, make: Callable[[], bytes], load: Callable[[Path], _Loaded]) -> _Loaded:
    """The result of ``load`` on the file at ``path``, for which ``make`` makes the content.

    The file is made again if it is missing or incomplete, or cannot be loaded, as a file of another machine with the same home directory.
    It is made in a private directory if the cache cannot be written, or is not safe.
    """
    reason = unsafe(path)
    if reason is None and content(path) is not None:
        try:
            return load(path)
        except Exception as error:
            log.warning("%s cannot be loaded and is made again: %s", path, error)
    sealed = _sealed(make())
    if reason is not None or not write(path, sealed):
        path = _private_directory(reason) / path.name
        write(path, sealed)
    return load(path)


def content(path: Path) -> bytes | None:
    """The content of a file without its digest; None if it is missing or incomplete."""
    try:
        sealed = path.read_bytes()
    except OSError:
        return None
    made = sealed[:-_DIGEST]
    return made if sealed == _sealed(made) else None


def write(path: Path, content: bytes) -> bool:
    """Write a file, and its directory if needed, with access for this user only. Returns False if it cannot be written.

    A file that is not written is made again next time.
    """
    try:
        # Many ranks may write at once: each writes its own temporary file, and the rename is atomic.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return False
    return True


def unwritable(place: Path) -> str | None:
    """Why no file can be written to a directory; None if one can be. It makes the directory if there is none."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror or str(error)


def unsafe(path: Path) -> str | None:
    """Why a program must not be loaded from ``path``; None if it may, or if there is no such file."""
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
    """A directory of this process, which is removed when it ends. reason: why the cache is not safe; None if it cannot be written"""
    if reason is not None:
        log.warning("compiled programs are not cached: %s", reason)
    directory = tempfile.TemporaryDirectory(prefix="tw_compile-")
    _private_directories.append(directory)
    return Path(directory.name)


_private_directories: list[tempfile.TemporaryDirectory[str]] = []  # keeps them until the process ends
