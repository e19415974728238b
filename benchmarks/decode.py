"""A decode step of a Llama's layers: one token for each sequence of a batch, with a full KV cache.

    torchrun --nproc-per-node 4 benchmarks/decode.py --model 70B --layers 4 --batch 1 4 16 64

All sides run in one process, each as a CUDA graph, in turns. Writes benchmarks/results/decode-*.json after each batch size.
common.py describes the sides and the rows.
"""

import argparse
import functools

import common
import quantisation
import torch
import torch.distributed as dist
import torch.nn.functional as F
import variants
from variants import llama

SIDES = [side for side in common.SIDES if side not in ("fuse", "weave")]  # auto always fuses so few tokens


class CachedAttention(llama.Attention):
    """Attention with a static KV cache, at the last step for which the cache has room: the new token attends to the whole cache."""

    def __init__(self, config, tp, batch, length):
        super().__init__(config, tp)
        heads = config.kv_heads // llama.ranks_of(tp)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.empty(batch, length, heads, config.head_dim), persistent=False)

    def forward(self, x, cos, sin, position):
        batch = x.shape[0]
        q, k, v = (proj(x).view(batch, 1, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = llama.rotate(q, cos, sin), llama.rotate(k, cos, sin)
        sequence = torch.arange(batch, device=x.device)
        self.k_cache[sequence, position], self.v_cache[sequence, position] = k[:, 0], v[:, 0]
        k, v = (cache[:batch].transpose(1, 2) for cache in (self.k_cache, self.v_cache))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, 1, -1))


class CachedLlama(llama.Llama):
    """ids [batch, 1], position [batch] -> (hidden states [batch, 1, hidden], logits [batch, vocab])."""

    def __init__(self, config, tp, batch, length):
        super().__init__(config, tp)
        for layer in self.layers:
            layer.self_attn = CachedAttention(config, tp, batch, length)

    def forward(self, ids, position):
        x = self.embed_tokens(ids)
        angles = position[:, None, None, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = x + layer.self_attn(layer.input_layernorm(x), cos, sin, position)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden = self.norm(x)
        logits = self.lm_head(hidden[:, -1])
        return hidden, logits if self.tp is None else llama.all_gather(logits, 1, self.tp)


def build(name, layers, device, batch, length):
    model, config = variants.build(name, layers, device, functools.partial(CachedLlama, batch=batch, length=length))
    for cache in model.buffers():
        if cache is not model.frequencies:
            cache.normal_()
    return model, config


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=variants.MODELS, default="70B", help="shapes of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="sequences")
    parser.add_argument("--cache", type=int, default=2048, help="tokens of each sequence in the KV cache, with the new one")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    quantisation.add_option(parser)
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()

    device, ranks = llama.start()
    measured_rows = []
    with torch.no_grad():
        model, config = build(args.model, args.layers, device, max(args.batch), args.cache)
        quantisation.quantised(model, args.quant)
        sides = [common.Side(name, model) for name in quantisation.able(args.sides, args.quant)]
        for batch in sorted(args.batch):
            size = {"model": args.model, "quant": args.quant, "layers": args.layers, "batch": batch, "tokens": 1}
            # Tokens in the first rank's part of the vocabulary, as the side without all-reduces can look up only its own part.
            ids = torch.randint(config.vocab // ranks, (batch, 1), device=device)
            position = torch.full((batch,), args.cache - 1, device=device)
            measured = common.measure(sides, (ids, position), args.samples)
            common.show(size, measured)
            measured_rows += common.rows(size, measured, device)
            common.write(
                quantisation.name("decode", args.model, args.quant, ranks),
                device,
                f"a step with {args.cache} tokens in the KV cache; ms of a whole forward pass, from embedding to logits",
                measured_rows,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
