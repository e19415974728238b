"""Compiles the CUDA kernels at run time, for this GPU and these sizes, and loads them.

NVRTC and the driver come from cuda-python, which torch's CUDA builds bring along: no toolkit and no header is needed.
Importing this module needs neither a GPU nor cuda-python.
"""

import functools

from ... import files
from . import host
from .host import SOURCES

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


def version() -> str:
    """NVRTC's own version. Raises RuntimeError where it is missing."""
    _, nvrtc = _bindings()
    return "{}.{}".format(*check(nvrtc.nvrtcVersion()))


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


def cubin(name: str, arch: str, macros: dict[str, object], load=lambda image: image):
    """What ``load`` makes of the compiled ``csrc/<name>.cu``, from the cache if it is there and can be loaded."""
    command = options(arch, macros)
    path = files.path(name, _ingredients(name, command), "cubin")
    return files.kept(path, lambda: compile_kernel(name, command)[0], lambda path: load(files.content(path)))


def _ingredients(name: str, command: list[str]) -> tuple:
    _, nvrtc = _bindings()
    sources = SOURCES / f"{name}.cu", *sorted(SOURCES.glob("*.cuh"))
    return command, check(nvrtc.nvrtcVersion()), [(source.name, source.read_bytes()) for source in sources]


class Kernel:
    """A loaded kernel that takes one structure.

    block:        threads of a CTA, in x and y
    shared_bytes: dynamic shared memory of a CTA
    cluster:      CTAs that come together, as the kernel is compiled

    launch(ctas, arguments, stream) enqueues it, and start(ctas, arguments, current, side, fork, done) does on a stream beside
    the current one: see csrc/host.c. arguments: address of the array of pointers to the kernel's arguments
    """

    def __init__(self, image: bytes, name: str, block: tuple[int, int], shared_bytes: int, cluster: int = 1):
        """Load into the current CUDA context, which is torch's."""
        driver, _ = _bindings()
        self.cluster = cluster
        self._module = check(driver.cuModuleLoadData(image))
        function = check(driver.cuModuleGetFunction(self._module, name.encode()))
        if shared_bytes > _DEFAULT_SHARED_BYTES:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
        self.launch, self.start = (
            functools.partial(call, int(function), *block, shared_bytes) for call in (host.calls().launch, host.calls().start)
        )
