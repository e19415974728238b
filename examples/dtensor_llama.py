"""The Llama of llama.py as a plain model, made tensor-parallel by ``parallelize_module``.

    torchrun --nproc-per-node 2 examples/dtensor_llama.py [--sequence-parallel]

It takes the arguments of llama.py and prints the same. With --sequence-parallel each rank has only its own tokens between the layers.
"""

import torch.distributed as dist
from llama import Llama, command_line, main
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def parallel_llama(config, device, between=Replicate()):
    """A tensor-parallel Llama. between: the placement of the hidden states between the layers"""
    model = Llama(config)  # not sharded yet, but on the meta device, so that nothing is allocated
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layer = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=between),
    }
    plan = {f"layers.*.{name}": style for name, style in layer.items()}
    plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def sequence_parallel_llama(config, device):
    """The same with sequence parallelism: each rank has its own tokens between the layers."""
    tokens = Shard(1)
    model = parallel_llama(config, device, between=tokens)
    mesh = model.lm_head.weight.device_mesh
    norms = "layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm"
    parallelize_module(model, mesh, {name: SequenceParallel() for name in norms})
    gather = {
        "layers.*.self_attn": PrepareModuleInput(
            input_layouts=(tokens, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "layers.*.mlp": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=Replicate()),
        "norm": PrepareModuleOutput(output_layouts=tokens, desired_output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, gather)


def build(config, device, args):
    return (sequence_parallel_llama if args.sequence_parallel else parallel_llama)(config, device)


if __name__ == "__main__":
    parser = command_line()
    parser.add_argument("--sequence-parallel", action="store_true", help="each rank holds and norms its own tokens between the layers")
    main(build, parser)
