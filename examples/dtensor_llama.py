"""The Llama of llama.py as a plain model, made tensor-parallel by ``parallelize_module``.

    torchrun --nproc-per-node 2 examples/dtensor_llama.py

Takes the same arguments as llama.py and prints the same.
"""

import torch.distributed as dist
from llama import Llama, main
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


def parallel_llama(config, device):
    model = Llama(config)  # whole, on the meta device: nothing is allocated before it is sharded
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layer = {
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    plan = {f"layers.*.{name}": style for name, style in layer.items()}
    plan["embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


if __name__ == "__main__":
    main(parallel_llama)
