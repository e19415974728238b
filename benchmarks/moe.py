"""Prefill time of layers whose sums are several all-reduces: mixtures of experts, and attention and MLP of one norm.

    torchrun --nproc-per-node 2 benchmarks/moe.py --model Mixtral-8x7B --layers 2 --tokens 1024 4096 8192

The models are those of transformers with ``tp_plan="auto"``, with random weights: routing is close to balanced. All sides run in one
process, each as a CUDA graph, in turns. Writes benchmarks/results/moe-*.json after each size. common.py describes the sides and the rows.
"""

import argparse
import os
import shutil
import tempfile

import common
import torch
import torch.distributed as dist
import transformers
from variants import llama

SIDES = "eager", "inductor", "fuse", "weave", "auto"
LARGE = 1024  # as in prefill.py

# name -> type of the model, its shapes
MODELS = {
    "Mixtral-8x7B": ("mixtral", dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_local_experts=8, num_experts_per_tok=2,
    )),
    "Qwen3-30B-A3B": ("qwen3_moe", dict(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8,
    )),
    "GLM-4.5-Air": ("glm4_moe", dict(
        hidden_size=4096, intermediate_size=10944, moe_intermediate_size=1408, num_attention_heads=96, num_key_value_heads=8, head_dim=128,
        n_routed_experts=128, num_experts_per_tok=8, n_shared_experts=1, first_k_dense_replace=0,
    )),
    "Command-8B": ("cohere", dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)),
    "Phi-2": ("phi", dict(hidden_size=2560, intermediate_size=10240, num_attention_heads=32, num_key_value_heads=32)),
    "tiny": ("mixtral", dict(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )),
}  # fmt: skip


def config_of(name, layers):
    kind, shapes = MODELS[name]
    return transformers.CONFIG_MAPPING[kind](
        **shapes, num_hidden_layers=layers, vocab_size=32768, max_position_embeddings=32768, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )


def build(name, layers, device):
    """(a function of token ids that returns the last token's logits, its vocabulary)"""
    config = config_of(name, layers)
    where = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(where)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        with device:
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(where[0])
    dist.barrier()
    model = transformers.AutoModelForCausalLM.from_pretrained(where[0], tp_plan="auto", dtype=torch.bfloat16).eval()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(where[0])

    def run(ids):
        return model(ids, use_cache=False, logits_to_keep=1).logits

    return run, config.vocab_size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="Mixtral-8x7B", help="shapes of the model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 1024, 4096, 8192], help="of one sequence")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["inductor", "fuse", "auto"])
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()
    torch._inductor.config.force_disable_caches = True

    device, ranks = llama.start()
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    measured_rows = []
    sizes = sorted(args.tokens)
    compiled_for = sizes[:1] + [tokens for tokens in sizes if tokens >= LARGE][:1]
    with torch.no_grad():
        model, vocab = build(args.model, args.layers, device)
        for tokens in sizes:
            if tokens in compiled_for:
                torch._dynamo.reset()
                sides = [common.Side(name, model) for name in args.sides]
            size = {"model": args.model, "layers": args.layers, "batch": 1, "tokens": tokens}
            ids = torch.randint(3, vocab, (1, tokens), device=device)
            measured = common.measure([side for side in sides if side.name != "weave" or tokens > 1], (ids,), args.samples)
            common.show(size, measured)
            measured_rows += common.rows(size, measured, device)
            note = "dynamic shapes; ms of a whole forward pass with embedding, last norm and the last token's logits; random routing"
            common.write(f"moe-{args.model}-tp{ranks}", device, note, measured_rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
