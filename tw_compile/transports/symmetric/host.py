"""The driver calls of a site, as one call from Python: ``csrc/host.c``, compiled by the C compiler of this machine.

It is compiled at run time, as Triton's launchers are, and needs a C compiler and Python.h. So the package has no build step.
"""

import functools
import importlib.util
import os
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from ... import files

SOURCES = Path(__file__).parents[2] / "csrc"
_DRIVER = "libcuda.so.1"
_COMPILER_S = 60.0  # timeout in seconds; the compiler takes less than one
_SUFFIX: str = sysconfig.get_config_var("EXT_SUFFIX")  # contains the version of Python and the machine


_LAUNCH = struct.Struct("9Q")


def pack_launch(
    function: int, block: tuple[int, int], shared_bytes: int, ctas: int, arguments: int, side: int = 0, fork: int = 0, done: int = 0
) -> bytes:
    """A launch of a kernel, as ``launch`` and ``start`` of ``calls()`` take it: ``Launch`` in csrc/host.c.

    function:        the address of the driver's function
    block:           threads of a CTA in x and y
    shared_bytes:    dynamic shared memory of a CTA
    arguments:       the address of the kernel's argument, a structure
    side, fork, done: the stream of ``start``; the event by which it waits for the current stream, and the one that is recorded behind
    """
    return _LAUNCH.pack(function, *block, shared_bytes, ctas, arguments, side, fork, done)


@functools.cache
def calls(driver: str = _DRIVER) -> Any:
    """The module of csrc/host.c, with ``launch``, ``start``, ``wait`` and others. driver: library of the CUDA driver

    Raises RuntimeError if the module cannot be compiled, or there is no driver.
    """
    path = files.path("host", (SOURCES / "host.c").read_bytes(), _SUFFIX.removeprefix("."))
    module = files.kept(path, _compile, _import)
    module.load(driver)
    return module


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("host", path)
    assert spec is not None and spec.loader is not None  # by the suffix of the path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def missing() -> str | None:
    """Why ``calls`` is not possible in this process; None if it is."""
    try:
        calls()
    except Exception as error:
        return str(error)
    return None


def find_compiler() -> str | None:
    """The command of this machine's C compiler; None if there is none."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _compile() -> bytes:
    """Compile csrc/host.c. Returns the shared library."""
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("csrc/host.c must be compiled, but there is no C compiler")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "host.so"
        options = "-O2", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", "-o", str(out)
        command = [*compiler.split(), str(SOURCES / "host.c"), *options]
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_COMPILER_S, check=False)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"csrc/host.c must be compiled, but {compiler} did not end within {_COMPILER_S:g} s") from None
        except OSError as error:
            raise RuntimeError(f"csrc/host.c must be compiled, but {compiler} cannot be run: {error}") from error
        if run.returncode:
            why = next((line for line in run.stderr.splitlines() if "error" in line), f"{compiler} failed")
            raise RuntimeError(f"csrc/host.c must be compiled, but {compiler} cannot compile it: {why}")
        return out.read_bytes()
