"""Compiles the CUDA kernels at run time, for the GPU and sizes at hand, and loads them.

NVRTC and the driver are called through cuda-bindings, which CUDA builds of PyTorch install. No CUDA toolkit and no CUDA headers are needed.
This module can be imported without a GPU and without cuda-bindings.
"""

import functools
from collections.abc import Callable
from typing import Any

from ... import files
from . import host
from .host import SOURCES

# Dynamic shared memory of a CTA above which a kernel needs an attribute.
_DEFAULT_SHARED_BYTES = 48 * 1024


def _bindings() -> tuple[Any, Any]:
    """(cuda.bindings.driver, cuda.bindings.nvrtc)"""
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise RuntimeError(
            f"the kernels are compiled with cuda-bindings, which is not installed: pip install 'cuda-bindings>=13.0' ({error})"
        ) from error
    return driver, nvrtc


@functools.cache
def missing() -> str | None:
    """Why this process cannot compile kernels, with what to install; None if it can."""
    try:
        _, nvrtc = _bindings()
        check(nvrtc.nvrtcVersion())
    except Exception as error:  # versions of cuda.bindings raise different exceptions for a missing library
        message = str(error).strip().splitlines()
        return message[0] if message else type(error).__name__
    return None


def version() -> str:
    """The version of NVRTC. Raises RuntimeError if it is missing."""
    _, nvrtc = _bindings()
    return "{}.{}".format(*check(nvrtc.nvrtcVersion()))


def check(answer: tuple) -> Any:
    """The value, or list of values, after the status in a result of cuda.bindings. Raises RuntimeError if the call failed."""
    status, *values = answer
    if status != 0:
        raise RuntimeError(f"CUDA call failed: {status.name if hasattr(status, 'name') else status}")
    return values[0] if len(values) == 1 else values


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of a compute capability: (9, 0) -> "sm_90a"."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def options(arch: str, macros: dict[str, object]) -> list[str]:
    """The command line of NVRTC."""
    return [f"--gpu-architecture={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]


def compile_kernel(name: str, command: list[str]) -> tuple[bytes, str]:
    """Compile ``csrc/<name>.cu``: see ``compile_source``."""
    return compile_source((SOURCES / f"{name}.cu").read_bytes(), f"{name}.cu", command)


def compile_source(source: bytes, name: str, command: list[str]) -> tuple[bytes, str]:
    """Compile a program, which may include the headers in ``csrc``.

    Returns (cubin, messages of the compiler). Raises RuntimeError with the messages if it fails.
    """
    _, nvrtc = _bindings()
    headers = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cuh"))}
    names = [header.encode() for header in headers]
    program = check(nvrtc.nvrtcCreateProgram(source, name.encode(), len(headers), list(headers.values()), names))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(command), [option.encode() for option in command])[0]
        log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        messages = log.rstrip(b"\0 ").decode(errors="replace")
        if status != 0:
            raise RuntimeError(f"NVRTC could not compile {name} with {' '.join(command)}:\n{messages}")
        cubin = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return cubin, messages


def cubin(name: str, arch: str, macros: dict[str, object], load: Callable[[bytes | None], Any] = lambda image: image) -> Any:
    """The result of ``load`` on the cubin of ``csrc/<name>.cu``, which is taken from the cache if it is there and can be loaded."""
    command = options(arch, macros)
    path = files.path(name, _cache_key(name, command), "cubin")
    return files.kept(path, lambda: compile_kernel(name, command)[0], lambda path: load(files.content(path)))


def _cache_key(name: str, command: list[str]) -> tuple:
    _, nvrtc = _bindings()
    sources = SOURCES / f"{name}.cu", *sorted(SOURCES.glob("*.cuh"))
    return command, check(nvrtc.nvrtcVersion()), [(source.name, source.read_bytes()) for source in sources]


class Kernel:
    """A loaded kernel, whose argument is one structure.

    ``packed(ctas, arguments, ...)`` is a launch of it, as host.pack_launch() has it.
    """

    def __init__(self, image: bytes | None, name: str, block: tuple[int, int], shared_bytes: int, cluster: int = 1) -> None:
        """Load the kernel into the current CUDA context.

        image:        the cubin
        block:        threads of a CTA in x and y
        shared_bytes: dynamic shared memory of a CTA
        cluster:      CTAs of a cluster, as the kernel is compiled
        """

        driver, _ = _bindings()
        self.cluster = cluster
        self._module = check(driver.cuModuleLoadData(image))
        function = check(driver.cuModuleGetFunction(self._module, name.encode()))
        if shared_bytes > _DEFAULT_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
        self.packed = functools.partial(host.pack_launch, int(function), block, shared_bytes)
