"""What is kept from process to process: ``$TW_COMPILE_CACHE_DIR``, or ``~/.cache/tw_compile``."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def path(name: str, key: object, suffix: str) -> Path:
    """Where what belongs to ``name`` and ``key``, whose ``repr`` says all that it depends on, is kept."""
    directory = os.environ.get("TW_COMPILE_CACHE_DIR")
    directory = Path(directory) if directory else Path.home() / ".cache" / "tw_compile"
    return directory / f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.{suffix}"


def kept(path: Path, make: Callable[[], bytes]) -> Path:
    """The file there, made if it is not; a file somewhere else where that directory cannot be written."""
    if not os.access(path, os.R_OK):
        content = make()
        if not write(path, content):
            path = Path(tempfile.mkdtemp(prefix="tw_compile-")) / path.name
            write(path, content)
    return path


def write(path: Path, content: bytes) -> bool:
    """Whether it could be written. Where it cannot, all that is lost is the time to make the content again."""
    try:
        # Many ranks may do this at once: each writes a file of its own, and the rename is atomic.
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return False
    return True
