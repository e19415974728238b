"""What vLLM calls in each of its processes: names its collectives, registers rules, and hooks into two functions of vLLM.

Nothing changes for models that are compiled with another backend.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ...backend import tokenweave
from ...compat import get_opaque_type_name
from ...options import PREFIX, TokenWeaveError
from ...passes.find import AllReduce, register_all_reduce, register_collective
from ...passes.rules.paged import Engine, register_engine
from ...report import say_once
from ...transports import agree
from . import attention, rows

NAME = "tokenweave"
# The version of vLLM that was tested.
TESTED = "0.32"

log = logging.getLogger("tw_compile")
_library = torch.library.Library("tokenweave_vllm", "DEF")


@functools.cache
def register() -> None:
    """The entry point ``vllm.general_plugins``. vLLM goes on without this package if it does not fit."""
    import vllm

    try:
        _register()
    except Exception as error:
        log.warning("the plug-in of tw_compile does not fit vLLM %s: %s: %s", vllm.__version__, type(error).__name__, error)


def _register() -> None:
    import vllm.model_executor.layers.attention.attention  # noqa: F401  # it defines the ops
    from vllm.config import CompilationConfig
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import LayerName

    current_platform.import_kernels()
    ops = torch.ops.vllm
    register_all_reduce(ops.all_reduce.default, lambda node: AllReduce(node.args[0], "sum", _group_of(node)))
    register_collective(ops.all_gather.default, _group_of)
    register_collective(ops.reduce_scatter.default, _group_of)
    rows.register()
    update, attend = ops.unified_kv_cache_update.default, ops.unified_attention_with_output.default
    register_engine(Engine(update, attend, attention.why_not, attention.halved, get_opaque_type_name(LayerName)), _library)

    platform = type(current_platform)
    platform.check_and_update_config = classmethod(_checking(platform.check_and_update_config))
    platform.use_custom_op_collectives = classmethod(_using_custom_ops(platform.use_custom_op_collectives))
    CompilationConfig.init_backend = _with_options(CompilationConfig.init_backend)


def _group_of(node: Node) -> str:
    """The name of the process group of a call of one of vLLM's collectives. In the call, groups have names of vLLM's own."""
    from vllm.distributed import parallel_state

    name = node.kwargs.get("group_name", node.args[-1])
    group: str = parallel_state._groups[name]().device_group.group_name
    return group


# --- hooks -------------------------------------------------------------------------------------------------------------------


def _checking(check_and_update_config: Callable) -> Callable:
    """``Platform.check_and_update_config``, which vLLM calls for each configuration. It replaces the backend on CPUs, silently."""

    def check(cls, vllm_config):
        from vllm.config import CompilationMode

        config = vllm_config.compilation_config
        if config.backend == NAME and config.mode == CompilationMode.VLLM_COMPILE:
            raise ValueError(
                "backend tokenweave needs the mode DYNAMO_TRACE_ONCE: with VLLM_COMPILE, vLLM ends each graph at an attention, and "
                'compiles with its own backend. Say --compilation-config \'{"mode": "DYNAMO_TRACE_ONCE", "backend": "tokenweave"}\''
            )
        if config.backend == NAME:
            # Its files cannot hold what this backend returns. Workers inherit this.
            os.environ["VLLM_USE_AOT_COMPILE"] = "0"
        asked = config.backend == NAME
        check_and_update_config(vllm_config)
        if asked and config.mode != CompilationMode.DYNAMO_TRACE_ONCE:
            say_once(
                f"vLLM compiles nothing with these settings (compilation mode {config.mode.name}), so the backend tokenweave does nothing. "
                "vLLM does so for enforce_eager, and on CPUs for LoRA"
            )

    return check


def _using_custom_ops(use_custom_op_collectives: Callable) -> Callable:
    """``Platform.use_custom_op_collectives``: on CPUs, vLLM's collectives are ops only if this says so."""

    def uses(cls):
        from vllm.config import get_current_vllm_config_or_none

        if use_custom_op_collectives():
            return True
        config = get_current_vllm_config_or_none()
        if config is None or config.compilation_config.backend != NAME:
            return False
        _return_new_sums()
        return True

    return uses


@functools.cache
def _return_new_sums() -> None:
    """Let all-reduces on CPUs not write to their input, as the op ``vllm.all_reduce`` promises to the compiler."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    in_place = CpuCommunicator.all_reduce
    CpuCommunicator.all_reduce = lambda self, x: in_place(self, x.clone())


def _with_options(init_backend: Callable) -> Callable:
    """``CompilationConfig.init_backend``, with the options for this backend, which vLLM gives to Inductor only."""

    @functools.wraps(init_backend)
    def init(self, *args, **kwargs):
        backend = init_backend(self, *args, **kwargs)
        if backend != NAME:
            return backend
        _meet_the_others()
        return functools.partial(tokenweave, options=_options(self))

    return init


# Seconds that a rank waits for the others, which make the same model.
PATIENCE_S = 120.0


def _meet_the_others() -> None:
    """Raises TokenWeaveError if a rank of the tensor-parallel group does not come: without the plug-in it finds no all-reduce."""
    import vllm
    from vllm.distributed import parallel_state

    if parallel_state._TP is None:
        return
    group = parallel_state._TP.device_group.group_name
    try:
        agree.exchange(group, "the start of the plug-in for vLLM", vllm.__version__, PATIENCE_S)
    except TokenWeaveError:
        raise
    except RuntimeError as error:
        raise TokenWeaveError(f"{error}. If it has no plug-in of tw_compile: install it, and set VLLM_PLUGINS alike on all ranks") from None


def _options(config: Any) -> dict[str, Any]:
    """The options of a model: those in ``inductor_compile_config`` whose names begin with "tokenweave."."""
    import vllm
    from vllm.config import CUDAGraphMode

    if not vllm.__version__.startswith(f"{TESTED}."):
        say_once(
            f"tw_compile was tested with vLLM {TESTED}, and this is {vllm.__version__}. "
            "If tokens are wrong, compare them with those of the backend inductor, and report it"
        )
    # A form is compiled, and its workspaces are made, in a call that is not captured.
    config.cudagraph_num_of_warmups = max(1, config.cudagraph_num_of_warmups)
    given = {name: option for name, option in config.inductor_compile_config.items() if name.startswith(PREFIX)}
    return {f"{PREFIX}cuda_graphs": config.cudagraph_mode == CUDAGraphMode.FULL} | given
