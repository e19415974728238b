"""The environment variables that change what the package does, for ``tw-compile doctor``. docs/options.md lists those of the package."""

import os
from collections.abc import Callable

from .options import KILL_SWITCH
from .transports import link


def effects() -> list[str]:
    """What each variable that is set does, in words, without KILL_SWITCH and those that name compilers and directories."""
    given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    found = [f"{name}={value}: {_VARIABLES[name][1]}" for name, value in given.items() if _VARIABLES[name][0](value)]
    unknown = sorted(name for name in os.environ if name.startswith("TW_COMPILE_") and name not in _OURS)
    return found + [f"{name} has no effect; tw_compile reads {', '.join(_OURS)}" for name in unknown]


def _is_1(value: str) -> bool:
    return value == "1"


def _is_on(value: str) -> bool:
    return value not in ("", "0")


def _lacks_plug_in(names: str) -> bool:
    return "tokenweave" not in names.split(",")


_OURS = KILL_SWITCH, "TW_COMPILE_CACHE_DIR", link.HOST_NAME
_SLOWER = "NCCL's links are slower, so that another transport may be faster, and other plans are used"
# Name -> (which values have an effect, the effect).
_VARIABLES: dict[str, tuple[Callable[[str], bool], str]] = {
    link.HOST_NAME: (_is_on, "ranks with another name are taken to be on another host"),
    "TORCH_COMPILE_DISABLE": (_is_1, "torch.compile compiles nothing"),
    "TORCHDYNAMO_DISABLE": (_is_1, "torch.compile compiles nothing"),
    "TORCHINDUCTOR_CPP_WRAPPER": (_is_1, "each layer is compiled, as only code in Python can call one for several"),
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": (_is_on, "transport multimem is not available"),
    "NCCL_P2P_DISABLE": (_is_on, _SLOWER),
    "NCCL_SHM_DISABLE": (_is_on, _SLOWER),
    "CUDA_LAUNCH_BLOCKING": (_is_on, "kernels do not run beside each other, so that weaving hides nothing"),
    "VLLM_PLUGINS": (_lacks_plug_in, "vLLM does not load the plug-in tokenweave"),
}
