"""The driver calls of a site as one call from Python: ``csrc/host.c``, compiled by this machine's C compiler.

At run time, as Triton compiles its launchers, with the same needs: a C compiler and Python.h. So a checkout and a package are
the same, and need no building.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from ... import files

SOURCES = Path(__file__).parents[2] / "csrc"
_DRIVER = "libcuda.so.1"
_COMPILER_S = 60.0  # for a file that takes less than a second
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")  # names the Python and the machine


@functools.cache
def calls(driver: str = _DRIVER):
    """The module: ``launch``, ``start``, ``wait`` and others, as csrc/host.c has them, on the driver in this library.

    Raises RuntimeError where it cannot be compiled, or there is no driver.
    """
    path = files.path("host", (SOURCES / "host.c").read_bytes(), _SUFFIX.removeprefix("."))
    module = files.kept(path, _compile, _import)
    module.load(driver)
    return module


def _import(path: Path):
    spec = importlib.util.spec_from_file_location("host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def missing() -> str | None:
    """What this process lacks for ``calls``; None if nothing."""
    try:
        calls()
    except Exception as error:
        return str(error)
    return None


def find_compiler() -> str | None:
    """This machine's C compiler, as a command; None if there is none."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _compile() -> bytes:
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("the driver is called through csrc/host.c, and there is no C compiler for it")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "host.so"
        options = "-O2", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", "-o", out
        command = [*compiler.split(), SOURCES / "host.c", *options]
        try:
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_COMPILER_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"the driver is called through csrc/host.c, and {compiler} has not compiled it within {_COMPILER_S:g} s"
            ) from None
        except OSError as error:
            raise RuntimeError(f"the driver is called through csrc/host.c, and {compiler} cannot be run: {error}") from error
        if run.returncode:
            why = next((line for line in run.stderr.splitlines() if "error" in line), f"{compiler} failed")
            raise RuntimeError(f"the driver is called through csrc/host.c, which {compiler} cannot compile: {why}")
        return out.read_bytes()
