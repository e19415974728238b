"""What each rank of test_vllm.py runs: vLLM in eager mode and with the backend, engine after engine in one process.

The engines of the ranks go in step (executor ``external_launcher``), so that in all runs requests arrive at the same steps.
"""

import contextlib
import os
import random
import time

import torch
import torch.distributed as dist

import tw_compile

# Before vLLM is imported. Its scheduler is to run in this process.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip
VOCAB, REQUESTS, TOKENS, BLOCK = 128, 48, 12, 32
SMALL = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=91, eos_token_id=92,
)  # fmt: skip
WINDOWS = dict(sliding_window=64, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
MODELS = {
    "Llama": ("LlamaConfig", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma 3": ("Gemma3TextConfig", WINDOWS),
    "Mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
}
# The model that runs with vLLM's own kernels, such as rotary_embedding, in place of those that Inductor generates.
ALL_OPS = "Qwen3"
# Prompts come in chunks, and the cache is too small for the requests that run.
SERVED = dict(max_model_len=256, max_num_batched_tokens=96, max_num_seqs=16, block_size=BLOCK, num_gpu_blocks_override=24)
COMPILED = {"mode": "DYNAMO_TRACE_ONCE", "backend": "tokenweave", "inductor_compile_config": {"tokenweave.min_tokens": 16}}


def make(name, folder):
    """Write a checkpoint of random float32 weights, and a tokenizer with one character for each token; returns its path."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    path = os.path.join(folder, name.replace(" ", "-"))
    config, changes = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**SMALL | changes))
    for weight in model.parameters():
        if weight.dim() > 1:  # as they come, one token's logits are like another's
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(path)
    special = {"<unk>": 90, "<s>": 91, "</s>": 92}
    tokens = {chr(33 + i): i for i in range(90)} | special | {chr(300 + i): i for i in range(93, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


def arrivals():
    """(step, prompt) of each request. They arrive unevenly; a third of them begin as another one does."""
    draw, requests, step = random.Random(0), [], 0
    for i in range(REQUESTS):
        prompt = [draw.randrange(90) for _ in range(draw.choice((1, 2, 7, 31, 32, 33, 61, 64, 90, 97, 130, 180)))]
        long = [other for _, other in requests if len(other) > BLOCK]
        if i % 3 == 2 and long:
            prompt = (draw.choice(long)[:96] + prompt)[:200]
        step += draw.choice((0, 0, 0, 0, 1, 2, 7))
        requests.append((step, prompt))
    return requests


@contextlib.contextmanager
def engine(path, store, compilation=None, **changes):
    """vLLM for a checkpoint over all ranks, which meet by the file ``store``; in eager mode without a ``compilation``."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    rank = int(os.environ["RANK"])
    ExecutorWithExternalLauncher._distributed_args = lambda self: (f"file://{store}", rank, rank)
    how = dict(tensor_parallel_size=int(os.environ["WORLD_SIZE"]), distributed_executor_backend="external_launcher", dtype="float32")
    how |= dict(compilation_config=compilation) if compilation else dict(enforce_eager=True)
    llm = LLM(path, kv_cache_memory_bytes=1 << 23, **how | SERVED | changes)
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    torch._dynamo.reset()


def serve(llm):
    """The tokens of each request, and what happened."""
    from vllm import SamplingParams

    engine, preempted = llm.llm_engine, []
    scheduler = engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **kwargs: (preempted.append(request), preempt(request, *args, **kwargs))
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    waiting, done, step = list(enumerate(arrivals())), {}, 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1][0] <= step:
            number, (_, prompt) = waiting.pop(0)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy)
        done |= {int(output.request_id): output for output in engine.step() if output.finished}
        step += 1
    tokens = [list(done[number].outputs[0].token_ids) for number in range(REQUESTS)]
    return tokens, dict(preempted=len(preempted), cached=sum(output.num_cached_tokens for output in done.values()), steps=step)


# Name of a run -> what it changes.
RUNS = {
    "eager": {},
    "compiled": dict(compilation=COMPILED),
    # Each rank is alone in its tensor-parallel group: it is a pipeline stage, or has a model of its own.
    "stages": dict(compilation=COMPILED, tensor_parallel_size=1, pipeline_parallel_size=2),
    "replicas": dict(compilation=COMPILED, tensor_parallel_size=1, data_parallel_size=2),
}


def begin():
    """The ranks' group ends, as vLLM makes its own; Inductor keeps what it has compiled, for the engines that come after."""
    os.environ |= ENVIRONMENT
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    dist.destroy_process_group()
    torch._inductor.config.fx_graph_cache = True


def run(path, name):
    """What vLLM does with a checkpoint in one of RUNS."""
    start, cpu, before = time.perf_counter(), sum(os.times()[:4]), len(tw_compile.reports())
    how = dict(RUNS[name])
    if "compilation" in how and os.path.basename(path) == ALL_OPS:
        how["compilation"] = how["compilation"] | {"custom_ops": ["all"]}
    with engine(path, f"{path}/{name}", **how) as llm:
        tokens, happened = serve(llm)
    reports = [report.to_dict() for report in tw_compile.reports()[before:]]
    took = f"{time.perf_counter() - start:.0f} s, {sum(os.times()[:4]) - cpu:.0f} s of CPU"
    print(f"{os.path.basename(path)}, {name}: {took}, {happened}", flush=True)
    return dict(tokens=tokens, reports=reports, **happened)
