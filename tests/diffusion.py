"""Diffusion transformers as diffusers has them: tiny, random, made parallel with ``parallelize_module``, and compiled on a rank."""

import copy

import torch
import torch.distributed as dist
from graphs import without_codegen
from torch.distributed.tensor.parallel import parallelize_module
from zoo import distance

import tw_compile
from tw_compile import backend

SIZES = dict(num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32)
AXES = dict(axes_dims_rope=(4, 6, 6))
# Of SD3, which comes without one.
COLUMNS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "ff.net.0.proj",
    "ff_context.net.0.proj",
)  # fmt: skip
ROWS = "attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"
TEXT = 8  # tokens


def flux():
    import diffusers

    model = diffusers.FluxTransformer2DModel(num_single_layers=2, in_channels=16, pooled_projection_dim=32, **SIZES, **AXES)
    places = dict(img_ids=torch.arange(24.0)[:, None].repeat(1, 3), txt_ids=torch.zeros(TEXT, 3))
    return model, dict(hidden_states=torch.randn(1, 24, 16), pooled_projections=torch.randn(1, 32), timestep=torch.tensor([0.5]), **places)


def sd3():
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, caption_projection_dim=64, pooled_projection_dim=32,
        pos_embed_max_size=8, **SIZES,
    )  # fmt: skip
    return model, dict(hidden_states=torch.randn(1, 4, 8, 8), pooled_projections=torch.randn(1, 32), timestep=torch.tensor([5]))


def qwen_image():
    import diffusers

    model = diffusers.QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, **SIZES, **AXES)
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    given = dict(hidden_states=torch.randn(1, 24, 16), encoder_hidden_states_mask=mask, timestep=torch.tensor([0.5]))
    return model, dict(img_shapes=[(1, 4, 6)], **given)


MODELS = {"Flux": flux, "SD3": sd3, "Qwen-Image": qwen_image}


def parallel(model, mesh):
    from diffusers.hooks import tensor_parallel

    names = [(name, style) for style, names in (("colwise", COLUMNS), ("rowwise", ROWS)) for name in names]
    plan = model._tp_plan or {f"transformer_blocks.*.{name}": style for name, style in names}
    for module, styles in tensor_parallel._resolve_tp_plan(model, plan):
        parallelize_module(module, mesh, tensor_parallel._styles(styles))
    return model


def forward(name, dtype=torch.float32):
    """On a rank: (reports, difference of compiled and eager, error against float64 on one rank, eager's error)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, given = MODELS[name]()
    given |= dict(encoder_hidden_states=torch.randn(1, TEXT, 32), return_dict=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.2))
    exact = cast(copy.deepcopy(model), given, torch.float64)()
    run = cast(parallel(model.eval(), dist.init_device_mesh("cpu", (dist.get_world_size(),))), given, dtype)
    eager, before = run(), len(tw_compile.reports())
    compiled = torch.compile(run, backend=backend.tokenweave, fullgraph=True, options={"tokenweave.min_tokens": 2})
    with without_codegen():
        out = compiled()
    return tw_compile.reports()[before:], distance(out, eager), distance(out, exact), distance(eager, exact)


def cast(model, given, dtype):
    """A function without arguments: the forward pass in a dtype."""
    given = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    model = model.to(dtype)

    def run():
        with torch.no_grad():
            return model(**given)[0]

    return run
