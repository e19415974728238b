"""What is compiled at run time is kept in ``$TW_COMPILE_CACHE_DIR`` (``~/.cache/tw_compile``), to be shared by all processes."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc"


def kept(name: str, make: Callable[[], bytes]) -> Path:
    """The file of that name, which says all that its content depends on; made if it is not there."""
    path = _directory() / name
    if not os.access(path, os.R_OK):
        content = make()
        try:
            _write(path, content)
        except OSError:  # a directory that cannot be written only costs the time to compile again
            path = Path(tempfile.mkdtemp(prefix="tw_compile-")) / name
            _write(path, content)
    return path


def _directory() -> Path:
    directory = os.environ.get("TW_COMPILE_CACHE_DIR")
    return Path(directory) if directory else Path.home() / ".cache" / "tw_compile"


def _write(path: Path, content: bytes) -> None:
    # Many ranks may do this at once: each writes a file of its own, and the rename is atomic.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
