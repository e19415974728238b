"""Models that people load: tiny random checkpoints, made on the spot, and what the backend does with them on a rank."""

import contextlib
import functools
import os
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from graphs import without_codegen
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode

import tw_compile
from tw_compile import backend
from tw_compile.autotune import plan

VOCAB, LAYERS = 128, 2
SMALL = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MOE = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
BIAS = dict(attention_bias=True, attention_out_bias=True)
WINDOW = dict(sliding_window=8)


@dataclass(frozen=True)
class Model:
    """A model of the library, and what is expected of it.

    embedding: why the all-reduce of the embedding is no site
    merged:    how many sites are two all-reduces of the model
    unsplit:   op -> how many of it run whole where the model is woven, at most: versions of transformers differ
    scans:     functions of the model that go through the tokens of a sequence: of one sequence, and not of a batch, their ops run whole
    since:     the first version of transformers that has a plan for it; by earlier ones each rank runs the whole model
    """

    config: str
    changes: dict = field(default_factory=dict)
    embedding: str = ""
    merged: int = 0
    unsplit: dict = field(default_factory=dict)
    scans: tuple = ()
    since: str = "5.0"

    @property
    def is_parallel(self) -> bool:
        """Whether the installed version of transformers has a plan for it."""
        import transformers

        return Version(transformers.__version__) >= Version(self.since)


# An entry of the sorted tokens may come from either half.
BY_EXPERT = {"aten.sort.default": LAYERS, "aten.index.Tensor": 2 * LAYERS}
IN_ONE_LAYER = {"aten.sort.default": 1, "aten.index.Tensor": 2}
# Inductor of PyTorch 2.11 and 2.12 makes the mask of groups of experts an int64, and leaves float32 in the metadata of the next op.
BY_GROUP = IN_ONE_LAYER | ({"aten.unsqueeze.default": 1} if torch.__version__ < "2.13" else {})
# Experts in the second layer, and one that all tokens go to.
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1)
LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, num_key_value_heads=8)
OLD = dict(n_embd=64, n_layer=LAYERS, n_head=8, rotary_dim=8, n_inner=96)
LINEAR = dict(linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16)
ERNIE = dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1, moe_layer_start_index=1)
# Its sum is the input of q, k, v and the first residual: no norm reads it.
NO_NORM = "the reduced value has 4 users"


MODELS = {
    "Llama": Model("LlamaConfig"),
    "Mistral": Model("MistralConfig", WINDOW),
    "Qwen2": Model("Qwen2Config"),
    "Qwen2, sliding window": Model("Qwen2Config", dict(use_sliding_window=True, max_window_layers=1, **WINDOW)),
    "Qwen3": Model("Qwen3Config", dict(head_dim=16)),
    "Phi-3": Model("Phi3Config"),
    "Gemma 2": Model("Gemma2Config", dict(head_dim=16, **WINDOW)),
    "Gemma 3": Model("Gemma3TextConfig", dict(head_dim=16, **WINDOW)),
    "Granite": Model("GraniteConfig", dict(residual_multiplier=0.5)),
    "OLMo 2": Model("Olmo2Config", embedding=NO_NORM),
    "OLMo 3": Model("Olmo3Config", WINDOW, embedding=NO_NORM),
    "Seed-OSS": Model("SeedOssConfig", dict(head_dim=16, **BIAS)),
    "Ministral": Model("MinistralConfig", dict(head_dim=16, **WINDOW)),
    "Starcoder 2": Model("Starcoder2Config", WINDOW),
    "Mixtral": Model("MixtralConfig", dict(num_local_experts=4), unsplit=BY_EXPERT),
    "Qwen3-MoE": Model("Qwen3MoeConfig", dict(head_dim=16, **MOE), unsplit=BY_EXPERT),
    # Attention and MLP of one norm.
    "GPT-NeoX": Model("GPTNeoXConfig", merged=LAYERS),
    "GPT-J": Model("GPTJConfig", OLD, merged=LAYERS, since="5.24"),
    "CodeGen": Model("CodeGenConfig", OLD, merged=LAYERS, since="5.24"),
    "Phi": Model("PhiConfig", dict(num_key_value_heads=8), merged=LAYERS),
    "Cohere": Model("CohereConfig", merged=LAYERS),
    "Cohere 2": Model("Cohere2Config", WINDOW, merged=LAYERS),
    # Experts, and one that all tokens go to.
    "DeepSeek-V2": Model("DeepseekV2Config", dict(n_group=1, topk_group=1, **ROUTED, **LATENT), merged=1, unsplit=IN_ONE_LAYER),
    "DeepSeek-V3": Model("DeepseekV3Config", dict(n_group=2, topk_group=1, **ROUTED, **LATENT), merged=1, unsplit=BY_GROUP),
    "GLM-4-MoE": Model("Glm4MoeConfig", dict(head_dim=16, n_group=1, topk_group=1, **ROUTED), merged=1, unsplit=BY_GROUP),
    "dots.llm1": Model("Dots1Config", dict(head_dim=16, n_group=1, topk_group=1, **ROUTED), merged=1, unsplit=BY_GROUP),
    "Ernie 4.5 MoE": Model("Ernie4_5_MoeConfig", ERNIE, merged=1, unsplit=IN_ONE_LAYER),
    "Qwen2-MoE": Model("Qwen2MoeConfig", dict(shared_expert_intermediate_size=32, **MOE), unsplit=BY_EXPERT),
    "Qwen3-Next": Model(
        "Qwen3NextConfig",
        dict(head_dim=16, shared_expert_intermediate_size=32, layer_types=["linear_attention", "full_attention"], **MOE, **LINEAR),
        merged=LAYERS,
        unsplit=BY_EXPERT,
        scans=("causal_conv1d_fn", "torch_chunk_gated_delta_rule"),
    ),
    "Llama 4": Model(
        "Llama4TextConfig",
        dict(head_dim=16, intermediate_size_mlp=96, num_local_experts=4, interleave_moe_layer_step=1, attention_chunk_size=16),
        merged=LAYERS,
    ),
    "Granite MoE shared": Model(
        "GraniteMoeSharedConfig",
        dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32),
        unsplit=BY_EXPERT,
        since="5.21",
    ),
}


def make(name: str, folder) -> str:
    """Write a checkpoint of random float32 weights below ``folder``, as safetensors; returns its path."""
    import transformers

    path, model = os.path.join(folder, name), MODELS[name]
    if not os.path.exists(path):
        torch.manual_seed(0)
        config = getattr(transformers, model.config)(**SMALL | model.changes)
        checkpoint = transformers.AutoModelForCausalLM.from_config(config)
        for kind, weight in checkpoint.named_parameters():
            # As they come, norms are the identity, biases are zero, and one token's logits are like another's.
            with torch.no_grad():
                weight.add_(torch.randn_like(weight) * (0.2 if "norm" in kind or "bias" in kind else 0.05))
        checkpoint.save_pretrained(path)
    return path


def load(path: str, dtype=torch.float32, parallel=True, **how):
    """The checkpoint as users load it: over all ranks, or whole. how: further arguments of ``from_pretrained``"""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    os.environ.update({key: str(number) for key, number in place.items()})  # as torchrun does
    how |= {"tp_plan": "auto"} if parallel else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **how).eval()
    if torch.__version__ < "2.12":  # whose Dynamo does not trace through them; they are for training
        for module in model.modules():
            module._backward_hooks.clear()
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped GEMMs have no float64
    return model


@dataclass
class Outcome:
    """What a compiled forward pass made of the model, and eager PyTorch beside it. Errors are relative."""

    reports: list
    all_reduces: int  # in eager mode
    embedding: bool  # whether it is over the ranks, and so ends in one
    difference: float  # of compiled and eager
    error: float  # against float64 on one rank
    eager_error: float


def splits_embedding(model) -> bool:
    """Whether the embedding is over the ranks too, so that it ends in an all-reduce: not in the first versions of 5."""
    parts = {**(model.base_model._tp_plan or {}), **(getattr(model, "_tp_plan", None) or {})}
    return bool({"embed_tokens", "embed_in", "wte"} & {name.rpartition(".")[2] for name in parts})


@functools.cache
def loaded(path, dtype, device):
    """The parallel model, and the same one in float64 on one rank."""
    return load(path, dtype).to(device), load(path, torch.float64, parallel=False).to(device)


def with_experts_cut(path) -> Outcome:
    """On a rank: as with so many tokens that the rule cuts experts."""
    with mock.patch.object(plan, "EXPERT_ROWS", 0):
        return forward(path)


class _AllReduces(TorchDispatchMode):
    """Counts the all-reduces of eager mode."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func._opname.rstrip("_") in ("allreduce", "all_reduce")  # of c10d, or of functional collectives
        return func(*args, **(kwargs or {}))


def outcome(run, model, reference, codegen=False, dynamic=False) -> Outcome:
    """On a rank: ``run(forward)``, which gives logits, of the model compiled, of the model as it is, and of the reference."""
    torch._dynamo.reset()
    before = len(tw_compile.reports())
    with torch.no_grad(), contextlib.nullcontext() if codegen else without_codegen():
        with _AllReduces() as counted:
            eager = run(model)
        options = {"tokenweave.min_tokens": 2}
        out = run(torch.compile(model, backend=backend.tokenweave, dynamic=dynamic, fullgraph=True, options=options))
        exact = run(reference)
    found = distance(out, eager), distance(out, exact), distance(eager, exact)
    return Outcome(tw_compile.reports()[before:], counted.calls, splits_embedding(model), *found)


def forward(path, batch=1, tokens=32, dynamic=False, dtype=torch.float32, codegen=False, device="cpu") -> Outcome:
    """On a rank: the model's forward pass without a cache, compiled."""
    model, reference = loaded(path, dtype, device)
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    return outcome(lambda forward: forward(ids, use_cache=False).logits, model, reference, codegen, dynamic)


def verified(path) -> float:
    """On a rank: the largest relative difference at a site, as ``tw_compile.verify`` tells it. It must find nothing wrong."""
    model, _ = loaded(path, torch.float32, "cpu")
    ids = torch.randint(3, VOCAB, (1, 32), generator=torch.Generator().manual_seed(1))
    found = tw_compile.verify(model, ids, use_cache=False, options={"tokenweave.min_tokens": 2})
    assert found.ok, str(found)
    return max(difference.relative for difference in found.differences)


def check_report(outcome: Outcome, model: Model, batch: int = 1) -> None:
    """Every all-reduce is in the report as expected, and whatever can be woven is."""
    (report,) = outcome.reports
    refused = [model.embedding] if model.embedding and outcome.embedding else []
    assert [refusal.reason.split(" (")[0] for refusal in report.refusals] == refused
    assert sum(site.merged for site in report.sites) == outcome.all_reduces - len(refused) > 0
    assert [site.merged for site in report.sites if site.merged > 1] == [2] * model.merged
    assert report.mode == "weave" and all(site.woven for site in report.sites)
    scans = [f"in {function}:" for function in model.scans if batch == 1]
    unsplit = Counter(each.op for each in report.joins if not any(scan in each.source for scan in scans))
    assert set(unsplit) == set(model.unsplit) and all(unsplit[op] <= model.unsplit[op] for op in unsplit), unsplit


@dataclass
class Generated:
    """What ``generate`` made, compiled and eager. Errors are those of the logits of every new token, as in ``Outcome``."""

    reports: list
    tokens: torch.Tensor
    eager_tokens: torch.Tensor
    error: float
    eager_error: float


PROMPT, NEW = 24, 6


def generate(path, cache="dynamic", dtype=torch.float32, device="cpu", **how) -> Generated:
    """On a rank: two sequences, of which one is padded on the left, continued by NEW tokens.

    cache: ``dynamic``, or what ``generate`` calls ``cache_implementation``
    """
    torch._dynamo.reset()
    before = len(tw_compile.reports())
    model, exact = loaded(path, dtype, device)
    ids = torch.randint(3, VOCAB, (2, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    ids[1, :7], mask[1, :7] = 0, 0
    how |= dict(max_new_tokens=NEW, min_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, disable_compile=True)
    how |= {} if cache == "dynamic" else {"cache_implementation": cache}

    def run():
        torch.manual_seed(3)
        result = model.generate(ids, attention_mask=mask, **how)
        tokens = result.sequences
        seen = torch.cat((mask, torch.ones_like(tokens[:, PROMPT:])), 1)
        reference = exact(tokens, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0)).logits
        return tokens, distance(torch.stack(result.logits, 1), reference[:, PROMPT - 1 : -1])

    eager = model.forward
    with torch.no_grad(), without_codegen():
        eager_tokens, eager_error = run()
        options = {"tokenweave.min_tokens": 16}
        model.forward = torch.compile(eager, backend=backend.tokenweave, fullgraph=True, options=options)
        try:
            tokens, error = run()
        finally:
            model.forward = eager
    return Generated(tw_compile.reports()[before:], tokens, eager_tokens, error, eager_error)


def chunks(path, cache="dynamic") -> Outcome:
    """On a rank: one prompt in three calls, each with the cache of those before it."""
    import transformers

    model, reference = loaded(path, torch.float32, "cpu")
    ids = torch.randint(3, VOCAB, (1, 3 * 8), generator=torch.Generator().manual_seed(1))

    def run(forward):
        if cache == "dynamic":
            past = transformers.DynamicCache(config=model.config)
        else:
            past = transformers.StaticCache(config=model.config, max_cache_len=32)
            model(ids[:, :1], past_key_values=past)  # so that there is one
            past.reset()
        return torch.cat([forward(part, past_key_values=past).logits for part in ids.split(8, 1)], 1)

    return outcome(run, model, reference, dynamic=None)


def distance(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
