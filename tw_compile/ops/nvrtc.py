"""Compiles the CUDA kernels at run time, for this GPU and these sizes, and loads them.

NVRTC and the driver come from cuda-python, which torch's CUDA builds bring along: no toolkit, no compiler, no header is
needed. Compiled kernels are kept in ``$TW_COMPILE_CACHE_DIR`` (``~/.cache/tw_compile``), to be shared by all processes.
Importing this module needs neither a GPU nor cuda-python.
"""

import functools
import hashlib
import os
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "csrc"

# Shared memory that a kernel may use without asking for more.
_DEFAULT_SHARED_BYTES = 48 * 1024


def _bindings():
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise RuntimeError(
            "the kernels are compiled with cuda-python, which is not installed: pip install 'cuda-python>=13.0' "
            f"({error})"
        ) from error
    return driver, nvrtc


@functools.cache
def missing() -> str | None:
    """What this process lacks to compile kernels, with what to install; None if nothing."""
    try:
        _, nvrtc = _bindings()
        check(nvrtc.nvrtcVersion())
    except Exception as error:  # what cuda.bindings raises for a missing library differs between its versions
        message = str(error).strip().splitlines()
        return message[0] if message else type(error).__name__
    return None


def check(answer: tuple):
    """The value in what a cuda.bindings function returned. Raises RuntimeError if the call failed."""
    status, *values = answer
    if status != 0:
        raise RuntimeError(f"CUDA call failed: {status.name if hasattr(status, 'name') else status}")
    return values[0] if len(values) == 1 else values


def architecture(capability: tuple[int, int]) -> str:
    """NVRTC's name of a compute capability: (9, 0) -> "sm_90a"."""
    major, minor = capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def options(arch: str, macros: dict[str, object]) -> list[str]:
    """NVRTC's command line."""
    return [f"--gpu-architecture={arch}", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]


def compile_kernel(name: str, command: list[str]) -> tuple[bytes, str]:
    """Compile ``csrc/<name>.cu``: see compile_source."""
    return compile_source((SOURCES / f"{name}.cu").read_bytes(), f"{name}.cu", command)


def compile_source(source: bytes, name: str, command: list[str]) -> tuple[bytes, str]:
    """Compile a program that may include the headers in ``csrc``.

    Returns (cubin, the compiler's messages). Raises RuntimeError with these.
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


def cubin(name: str, arch: str, macros: dict[str, object]) -> bytes:
    """The compiled ``csrc/<name>.cu``, from the cache if it is there."""
    command = options(arch, macros)
    path = _cache_directory() / f"{name}-{_fingerprint(name, command)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    compiled, _ = compile_kernel(name, command)
    try:
        # Many ranks may do this at once: each writes a file of its own, and the rename is atomic.
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(compiled)
        os.replace(file.name, path)
    except OSError:
        pass  # a directory that cannot be written only costs the time to compile again
    return compiled


def _cache_directory() -> Path:
    directory = os.environ.get("TW_COMPILE_CACHE_DIR")
    return Path(directory) if directory else Path.home() / ".cache" / "tw_compile"


def _fingerprint(name: str, command: list[str]) -> str:
    _, nvrtc = _bindings()
    digest = hashlib.sha256(repr((command, check(nvrtc.nvrtcVersion()))).encode())
    for path in (SOURCES / f"{name}.cu", *sorted(SOURCES.glob("*.cuh"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


class Kernel:
    """A loaded kernel that takes one structure.

    block:        threads of a CTA, in x and y
    shared_bytes: dynamic shared memory of a CTA
    """

    def __init__(self, image: bytes, name: str, block: tuple[int, int], shared_bytes: int):
        """Load into the current CUDA context, which is torch's."""
        driver, _ = _bindings()
        self._module = check(driver.cuModuleLoadData(image))
        self._function = check(driver.cuModuleGetFunction(self._module, name.encode()))
        if shared_bytes > _DEFAULT_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))
        self._launch = driver.cuLaunchKernel
        self._block, self._shared_bytes = block, shared_bytes

    def launch(self, ctas: int, stream: int, arguments: int) -> None:
        """Enqueue the kernel on a stream.

        arguments: address of the array of pointers to the kernel's arguments
        """
        status = self._launch(
            self._function, ctas, 1, 1, *self._block, 1, self._shared_bytes, stream, arguments, 0
        )[0]
        if status != 0:
            check((status,))
