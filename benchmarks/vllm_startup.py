"""Start-up of vLLM in seconds, with this backend and with Inductor, with empty and with full caches. Needs vLLM: see docs/vllm.md.

    torchrun --nproc-per-node 2 benchmarks/vllm_startup.py --layers 16 --runs 3

The model is a narrow Llama with random weights. Its width changes nothing but the time of its steps. Each figure is the median of several
runs, in which the sides take turns at being first. Each run has new processes that have imported vLLM. They make an engine, which compiles
the model in its profiling run, and answer a long and a short prompt, of which the long one is woven. ``cold`` begins with empty caches of
vLLM, Inductor and this package, ``warm`` with those of ``cold``.

Writes benchmarks/results/vllm-startup-*.json, one row for each side and cache, with

    ratio (seconds / Inductor's seconds), cpu_ratio (the same of cpu_seconds), layers, tp, side, cache, runs
    seconds (engine and answers, on the slowest rank), answers_seconds, cpu_seconds (of a process and its compilers: on a machine that has
    other work, these tell more)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import result_file
import torch
import torch.distributed as dist
from compile_time import free_port

SIDES = "inductor", "tokenweave"
LONG, SHORT = 2000, 3  # tokens of the prompts
# The threads of the CPU are not vLLM's to bind, and the engine runs in the processes of torchrun.
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TORCHELASTIC_USE_AGENT_STORE": "False",
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="only start with this one, and print what it took")
    parser.add_argument("--model", help="folder of the model, for --side")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(start(args.model, args.side)))
        return
    dist.init_process_group("gloo")
    taken = {}
    for number in range(args.runs):
        for side in SIDES[:: 1 if number % 2 == 0 else -1]:
            for cache, seconds in in_new_processes(side, args.layers):
                taken.setdefault((side, cache), []).append(seconds)
    rows = []
    for (side, cache), runs in sorted(taken.items()):
        mine, inductor = median(runs), median(taken["inductor", cache])
        ratios = {of.replace("seconds", "ratio"): round(mine[of] / inductor[of], 3) for of in ("seconds", "cpu_seconds")}
        rows.append({**ratios, "layers": args.layers, "tp": dist.get_world_size(), "side": side, "cache": cache, "runs": len(runs), **mine})
        if dist.get_rank() == 0:
            print(rows[-1], flush=True)
    import vllm

    note = f"a narrow Llama in float32, prompts of {LONG} and {SHORT} tokens; vLLM {vllm.__version__}, imports not counted"
    device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    result_file.write(f"vllm-startup-tp{dist.get_world_size()}", device, note, rows)
    dist.destroy_process_group()


def median(runs):
    """The median of each figure."""
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def in_new_processes(side, layers):
    """Start a process on each rank, with empty caches and then with those of the first time. Yields (cache, what the slowest rank took)."""
    with tempfile.TemporaryDirectory() as own:
        for cache in ("cold", "warm"):
            shared = [(own, free_port())]
            dist.broadcast_object_list(shared)
            folder, port = shared[0]
            if cache == "cold" and dist.get_rank() == 0:
                make(layers, folder)
            dist.barrier()
            caches = dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "TW_COMPILE_CACHE_DIR"), folder)
            command = [sys.executable, __file__, "--side", side, "--model", folder]
            environment = {**os.environ, **SETTINGS, **caches, "MASTER_PORT": str(port)}
            printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            mine = json.loads(printed.splitlines()[-1])
            taken = torch.tensor([*mine.values()])
            dist.all_reduce(taken, dist.ReduceOp.MAX)  # rank 0 removes the folder of all ranks after this
            yield cache, dict(zip(mine, taken.tolist()))


def make(layers, folder):
    """Write the configuration of the model."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip


def start(model, side):
    """Seconds until an engine has answered, and seconds of the answers."""
    from vllm import LLM, SamplingParams

    begin, cpu = time.perf_counter(), sum(os.times()[:4])
    llm = LLM(
        model, load_format="dummy", skip_tokenizer_init=True, dtype="float32", tensor_parallel_size=int(os.environ["WORLD_SIZE"]),
        distributed_executor_backend="external_launcher", max_num_batched_tokens=2048, kv_cache_memory_bytes=1 << 26,
        compilation_config={"mode": "DYNAMO_TRACE_ONCE", "backend": side},
    )  # fmt: skip
    ready = time.perf_counter()
    prompts = [{"prompt_token_ids": [i % 512 for i in range(length)]} for length in (LONG, SHORT)]
    for prompt in prompts:
        llm.generate(prompt, SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
    answered = time.perf_counter()
    return {"seconds": answered - begin, "answers_seconds": answered - ready, "cpu_seconds": sum(os.times()[:4]) - cpu}


if __name__ == "__main__":
    main()
