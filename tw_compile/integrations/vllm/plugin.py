"""What vLLM calls in each of its processes: names its collectives, registers rules, and hooks into two functions of vLLM.

Nothing changes for models that are compiled with another backend.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from ...autotune.plan import TILE
from ...backend import tokenweave
from ...compat import OpOverload, get_opaque_type_name
from ...options import PREFIX, TokenWeaveError
from ...passes.find import AllReduce, register_all_reduce, register_collective
from ...passes.rules.paged import Engine, register_engine
from ...passes.rules.token_axis import register_token_rule
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
    register_engine(Engine(*_attention(), attention.why_not, attention.halved, get_opaque_type_name(LayerName)), _library)

    platform = type(current_platform)
    platform.check_and_update_config = classmethod(_checking(platform.check_and_update_config))
    platform.apply_config_platform_defaults = classmethod(_as_for_inductor(platform.apply_config_platform_defaults))
    platform.get_default_ir_op_priority = classmethod(_of_inductor(platform.get_default_ir_op_priority))
    platform.use_custom_op_collectives = classmethod(_using_custom_ops(platform.use_custom_op_collectives))
    CompilationConfig.init_backend = _with_options(CompilationConfig.init_backend)


def _attention() -> tuple[OpOverload, OpOverload]:
    """The ops of paged attention: the one that writes to the cache, and the one that reads it."""
    return torch.ops.vllm.unified_kv_cache_update.default, torch.ops.vllm.unified_attention_with_output.default


def _group_of(node: Node) -> str:
    """The name of the process group of a call of one of vLLM's collectives. In the call, groups have names of vLLM's own."""
    from vllm.distributed import parallel_state

    name = node.kwargs.get("group_name", node.args[-1])
    group: str = parallel_state._groups[name]().device_group.group_name
    return group


# --- hooks -------------------------------------------------------------------------------------------------------------------


def _compiles(config: Any) -> bool:
    """Whether a compilation configuration asks for this backend."""
    from vllm.config import CompilationMode

    return config.backend == NAME and config.mode != CompilationMode.NONE


def _as_for_inductor(apply_config_platform_defaults: Callable) -> Callable:
    """``Platform.apply_config_platform_defaults``: no custom ops unless the user asks for them, which is vLLM's default for Inductor.

    For other backends vLLM's default is all of them: kernels of its own in place of those that Inductor would fuse.
    """

    def apply(cls: Any, vllm_config: Any) -> None:
        apply_config_platform_defaults(vllm_config)
        config = vllm_config.compilation_config
        if _compiles(config) and not {"all", "none"} & set(config.custom_ops):
            config.custom_ops.append("none")

    return apply


def _of_inductor(get_default_ir_op_priority: Callable) -> Callable:
    """``Platform.get_default_ir_op_priority``: norms of PyTorch's ops, as for Inductor."""

    def priority(cls: Any, vllm_config: Any) -> Any:
        config = vllm_config.compilation_config
        if not _compiles(config):
            return get_default_ir_op_priority(vllm_config)
        config.backend = "inductor"
        try:
            return get_default_ir_op_priority(vllm_config)
        finally:
            config.backend = NAME

    return priority


def _checking(check_and_update_config: Callable) -> Callable:
    """``Platform.check_and_update_config``, which vLLM calls for each configuration. It replaces the backend on CPUs, silently."""

    def check(cls: Any, vllm_config: Any) -> None:
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
        if asked and config.mode == CompilationMode.NONE:
            say_once(
                "vLLM compiles nothing with these settings (compilation mode NONE), so the backend tokenweave does nothing. vLLM does so "
                "for enforce_eager, for models that it runs in breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH=0 ends that), and on "
                "CPUs for LoRA"
            )

    return check


def _using_custom_ops(use_custom_op_collectives: Callable) -> Callable:
    """``Platform.use_custom_op_collectives``: on CPUs, vLLM's collectives are ops only if this says so."""

    def uses(cls: Any) -> bool:
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
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        backend = init_backend(self, vllm_config, *args, **kwargs)
        if backend != NAME:
            return backend
        _meet_the_others()
        if reason := _why_whole(vllm_config):
            for op in _attention():
                register_token_rule(op)(rows.whole(reason))
        for module in RUNNERS:
            if module in sys.modules:  # the one that this worker has
                _profile_all_forms(sys.modules[module].GPUModelRunner)
        return functools.partial(tokenweave, options=_options(vllm_config))

    return init


def _why_whole(vllm_config: Any) -> str:
    """Why attention runs on all tokens, whatever the layer; '' if the configuration does not ask for it. Versions differ in its fields."""
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector sends the keys and values of a layer after its attention, once for a step"
    if getattr(vllm_config.attention_config, "use_non_causal", False):
        return "attention of this model is not causal in all steps, so the first half may need keys of the second"
    if getattr(vllm_config.model_config, "rswa_window", None) is not None:
        return "attention with a window and the whole prompt (R-SWA) cannot be cut"
    return ""


# Where vLLM's model runners are. That for CPUs is made of the first one.
RUNNERS = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
# Fewer tokens than those of a long step: one number for each form. A woven graph of few tokens is not cut in whole tiles.
FEWER = 2 * TILE - 1, 2


@functools.cache
def _profile_all_forms(runner: Any) -> None:
    """Let the profiling run of a model runner have steps of fewer tokens, too.

    So all forms are compiled, and their workspaces are made, before vLLM gives the memory to its cache, and before a request waits.
    """
    dummy_run = runner._dummy_run

    @functools.wraps(dummy_run)
    def run(self: Any, num_tokens: int, *args: Any, is_profile: bool = False, **kwargs: Any) -> Any:
        result = dummy_run(self, num_tokens, *args, is_profile=is_profile, **kwargs)
        if is_profile and self.vllm_config.compilation_config.backend == NAME:
            for fewer in FEWER:
                dummy_run(self, min(fewer, num_tokens), *args, is_profile=True, **kwargs)
        return result

    runner._dummy_run = run


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


def _options(vllm_config: Any) -> dict[str, Any]:
    """The options of a model: those in ``inductor_compile_config`` whose names begin with "tokenweave."."""
    import vllm
    from vllm.config import CUDAGraphMode

    if not vllm.__version__.startswith(f"{TESTED}."):
        say_once(
            f"tw_compile was tested with vLLM {TESTED}, and this is {vllm.__version__}. "
            "If tokens are wrong, compare them with those of the backend inductor, and report it"
        )
    config = vllm_config.compilation_config
    # A form is compiled, and its workspaces are made, in a call that is not captured.
    config.cudagraph_num_of_warmups = max(1, config.cudagraph_num_of_warmups)
    given = {name: option for name, option in config.inductor_compile_config.items() if name.startswith(PREFIX)}
    # Only steps of some hundred tokens are captured by default, which are not those that are woven.
    longest = vllm_config.scheduler_config.max_num_batched_tokens
    captured = config.cudagraph_mode == CUDAGraphMode.FULL and (config.max_cudagraph_capture_size or 0) >= longest
    return {f"{PREFIX}cuda_graphs": captured} | given
