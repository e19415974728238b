"""A Hugging Face model on several ranks, with ``from_pretrained(tp_plan="auto")``: compiled, and run on a prompt and with ``generate``.

    torchrun --nproc-per-node 2 examples/huggingface.py
    torchrun --nproc-per-node 8 examples/huggingface.py --model meta-llama/Llama-3.1-70B --tokens 4096 --new 128

Without --model it makes a tiny Llama with random weights in a temporary folder. It prints the reports of the backend, and the times of a
prompt and of ``generate`` with the backend and with Inductor. Only the call of ``torch.compile`` names the backend.
"""

import argparse
import functools
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from llama import error, median_times, say, start

import tw_compile

BACKENDS = "inductor", "tokenweave"


def command_line():
    parser = argparse.ArgumentParser(description='A Hugging Face model with tp_plan="auto", backend="tokenweave" against "inductor".')
    parser.add_argument("--model", help="name or folder of a checkpoint (default: a tiny Llama of random weights)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt (default: 1024)")
    parser.add_argument("--batch", type=int, default=1, help="prompts (default: 1)")
    parser.add_argument("--new", type=int, default=16, help="tokens that are generated (default: 16)")
    return parser


def run(args):
    device, ranks = start()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        model = load(args.model or tiny(folder), dtype)
        dist.barrier()  # all have read it
    ids = torch.randint(3, model.config.vocab_size, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    say(f"{args.model or 'a tiny Llama'}, {args.batch} × {args.tokens} tokens, {str(dtype).removeprefix('torch.')}, on {ranks} ranks")

    # dynamic=True, as the lengths of prompt and cache change.
    forwards = {"eager": model.forward} | {name: torch.compile(model.forward, backend=name, dynamic=True) for name in BACKENDS}
    runs = {name: functools.partial(generate, model, forward) for name, forward in forwards.items()}
    tokens, logits = {}, {}
    for name, each in runs.items():
        say(f"running {name} ..." if name == "eager" else f"compiling with {name} ...")
        tokens[name], logits[name] = each(ids, args.new)
    say("", *tw_compile.reports(), "", sep="\n")
    say("error of the logits after the prompt: " + ", ".join(f"{name} {error(logits[name], logits['eager']):.1e}" for name in BACKENDS))
    for what, new in (("a prompt", 1), (f"a prompt and {args.new} new tokens", args.new)):
        timed = {name: functools.partial(runs[name], new=new) for name in BACKENDS}
        compare(what, median_times(timed, ids, samples=3, calls=1))
    same = torch.equal(*(tokens[name] for name in BACKENDS))
    text = "the same tokens" if same else "different tokens: with random weights, or in bfloat16, two are often equally likely"
    say(f"both generated {text}")
    if device.type == "cpu":
        say("on CPUs the communication runs on the cores that compute: this shows that it works, not what it gains")


def load(path, dtype):
    """The model, sharded over all ranks of torchrun."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, tp_plan="auto").eval()
    if torch.__version__ < "2.12":  # its Dynamo does not trace these hooks, which are for training
        for module in model.modules():
            module._backward_hooks.clear()
    return model


def tiny(folder):
    """Rank 0 writes a checkpoint with random weights. Returns its path, on all ranks."""
    import transformers

    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8,
            max_position_embeddings=8192,
        )  # fmt: skip
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    said = [folder]
    dist.broadcast_object_list(said)
    return said[0]


def generate(model, forward, ids, new):
    """Greedy decoding with a forward function: (all tokens, logits of the first new token). With one new token only the prompt is run."""
    eager, model.forward = model.forward, forward
    try:
        # disable_compile: the library must not compile the model as well.
        how = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, disable_compile=True, pad_token_id=0)
        how |= dict(return_dict_in_generate=True, output_logits=True)
        result = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    finally:
        model.forward = eager
    return result.sequences, result.logits[0]


def compare(what, seconds):
    times = ", ".join(f"{name} {1e3 * taken:.2f} ms" for name, taken in seconds.items())
    say(f"{what}: {times}; tokenweave is {seconds['inductor'] / seconds['tokenweave']:.2f}× as fast")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments = command_line().parse_args()
    if "RANK" not in os.environ:
        sys.exit("This runs on several ranks. Start it with: torchrun --nproc-per-node 2 examples/huggingface.py")
    run(arguments)
    dist.destroy_process_group()
