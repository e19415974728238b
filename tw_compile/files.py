"""What is kept from process to process: ``$TW_COMPILE_CACHE_DIR``, or ``~/.cache/tw_compile``."""

import hashlib
import os
import tempfile
from pathlib import Path


def path(name: str, key: object, suffix: str) -> Path:
    """Where what belongs to ``name`` and ``key``, whose ``repr`` says all that it depends on, is kept."""
    directory = os.environ.get("TW_COMPILE_CACHE_DIR")
    directory = Path(directory) if directory else Path.home() / ".cache" / "tw_compile"
    return directory / f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.{suffix}"


def write(path: Path, content: bytes) -> None:
    """Keep it, if that is possible: a directory that cannot be written only costs the time to make the content again."""
    try:
        # Many ranks may do this at once: each writes a file of its own, and the rename is atomic.
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass
