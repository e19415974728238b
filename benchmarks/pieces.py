"""What a site is made of over a link, piece by piece: collectives in 16, 8 and 4 bits, the kernels between them, and whole sites.

    torchrun --nproc-per-node 2 benchmarks/pieces.py --link host
    torchrun --nproc-per-node 2 benchmarks/pieces.py --link nvlink

It answers, without a model:

- whether reduce-scatter, add and norm of the own rows, and all-gather would be faster in 16 bits than all-reduce, add and norm
- what a wire of fewer bits takes, and which of its pieces
- with ``--link nvlink``, whether a codec in two_shot could win: ``peer, 8 bits at best`` is the kernel on half of the bytes, and packing
  before it and unpacking behind it as kernels of their own. A codec inside of the kernel can hide a part of these two

The whole sites are measured as autotuning measures them. ``link``: see prefill.py. Each piece is a CUDA graph, in turns with the others.
Writes benchmarks/results/pieces-*.json, one row for each piece and size, with

    ranks, link, hidden, tokens, piece, us      the median over samples of the slowest rank; of a sum of pieces, their sum
    against, ratio                              what does the same in 16 bits, and its time divided by this one's
"""

import argparse
import functools
import os
from collections.abc import Callable

import accuracy
import prefill
import result_file
import timing
import torch
import torch.distributed as dist
from variants import llama

from tw_compile.site import SLOT_WHOLE, Planned, Site
from tw_compile.transports.low_bit import codec
from tw_compile.transports.low_bit.transport import LowBit
from tw_compile.transports.process_group import ProcessGroup, add_norm_of, c10d
from tw_compile.transports.symmetric.transport import Symmetric

CALLS = 4  # in a CUDA graph
ALL_REDUCED, PEER = "all-reduce + add and norm", "peer, 16 bits"
PACKED = 8, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link", choices=prefill.LINKS, default="nvlink", help="the fastest link that NCCL may use")
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096, 8192])
    parser.add_argument("--samples", type=int, default=7)
    args = parser.parse_args()

    os.environ.update(prefill.LINKS[args.link])  # NCCL reads it when the first group is made
    device, ranks = llama.start()
    peer = device.type == "cuda" and args.link == "nvlink" and not Symmetric.unavailable(_group(), device, multicast=False)
    rows = []
    with torch.inference_mode():
        for hidden in args.hidden:
            for tokens in args.tokens:
                pieces = of_process_group(device, tokens, hidden) | (of_peer(device, tokens, hidden) if peer else {})
                size = {"ranks": ranks, "link": args.link, "hidden": hidden, "tokens": tokens}
                rows += [size | row for row in measured(pieces, device, args.samples)]
                result_file.write(f"pieces-tp{ranks}-{args.link}", device, "microseconds, in CUDA graphs", rows)
    dist.destroy_process_group()


def _group():
    return dist.group.WORLD.group_name


def measured(pieces, device, samples):
    """The rows of one size, of pieces and their sums."""
    runs = {}
    for name, run in pieces.items():
        run()
        runs[name] = timing.recorded(functools.partial(_repeated, run), device)
    us = {name: seconds / CALLS * 1e6 for name, seconds in timing.median_times(runs, device, samples, calls=1).items()}
    known = {name: of for name, of in sums(us).items() if all(part in us for part in of[0])}
    us = {name: sum(us[part] for part in parts) for name, (parts, _) in known.items()}
    for name, (_, against) in known.items():
        ratio = us[against] / us[name] if against in us else None
        llama.say(f"{name:58} {us[name]:9.1f} µs" + (f"  {ratio:.2f} × {against}" if ratio else ""))
        yield {"piece": name, "us": round(us[name], 1)} | ({"against": against, "ratio": round(ratio, 3)} if ratio else {})


def _repeated(run):
    for _ in range(CALLS):
        run()


def sums(names):
    """name -> (the pieces that it is the sum of, what it is compared with), also of each piece alone."""
    of: dict[str, tuple[tuple[str, ...], str]] = {name: ((name,), "") for name in names}
    of[ALL_REDUCED] = ("all-reduce", "add and norm"), ""
    of["reduce-scatter + add and norm of own rows + all-gather"] = (
        ("reduce-scatter", "add and norm of own rows", "all-gather, 16 bits"), ALL_REDUCED,
    )  # fmt: skip
    for wire, (first, second) in codec.TRIPS.items():
        parts = f"pack, {first} bits", f"all-to-all, {first} bits", f"reduce, {wire} bits", f"all-gather, {second} bits"
        of[f"pieces of {wire} bits"] = (*parts, f"unpack, {second} bits"), ALL_REDUCED
        of[f"site, {wire} bits"] = (f"site, {wire} bits",), ALL_REDUCED
    for bits in PACKED:
        of[f"peer, {bits} bits at best"] = (f"peer, {bits} bits of 16", f"pack, {bits} bits", f"unpack, {bits} bits"), PEER
    return of


def of_process_group(device, tokens, hidden):
    """name -> a function that does one piece over the process group. All values are zeros, as their sum in place is zero again."""
    group, world, rank, on = _group(), dist.get_world_size(), dist.get_rank(), accuracy.codec_of(device)
    own = -(-tokens // world)
    zeros = functools.partial(torch.zeros, device=device, dtype=torch.bfloat16)
    x, residual = zeros(world * own, hidden), zeros(world * own, hidden)
    weight = torch.ones(hidden, device=device, dtype=torch.bfloat16)
    site, mine = Site(x, residual, weight), Site(x[:own], residual[:own], weight)
    kept, out = torch.zeros(world * own, hidden, device=device), torch.empty_like(x)
    packed = {bits: on.pack(x, world * own, bits) for bits in PACKED}
    parts = [own] * world

    def waited(collective, *args):
        return lambda: c10d.wait_tensor(collective(*args, group))

    pieces: dict[str, Callable] = {
        "all-reduce": waited(c10d.all_reduce_, x, "sum"),
        "reduce-scatter": waited(c10d.reduce_scatter_tensor, x, "sum", world),
        "add and norm": functools.partial(add_norm_of, x, site),
        "add and norm of own rows": functools.partial(add_norm_of, mine.x, mine),
        "all-gather, 16 bits": waited(c10d.all_gather_into_tensor, mine.x, world),
    }
    for bits in PACKED:
        pieces |= {
            f"pack, {bits} bits": functools.partial(on.pack, x, world * own, bits),
            f"all-to-all, {bits} bits": waited(c10d.all_to_all_single, packed[bits], parts, parts),
            f"all-gather, {bits} bits": waited(c10d.all_gather_into_tensor, packed[bits][:own], world),
            f"unpack, {bits} bits": functools.partial(on.unpack, packed[bits], out, bits),
        }
    carried = site._replace(residual=kept, fp32_residual=True, sharded_residual=True)
    for wire, trips in codec.TRIPS.items():
        received = packed[trips[0]].view(world, own, -1)
        pieces[f"reduce, {wire} bits"] = functools.partial(on.reduce, received, rank, carried, kept, trips)
        pieces[f"site, {wire} bits"] = functools.partial(LowBit(group, device, wire).fused, carried, False)
    plain = ProcessGroup(group, device)
    plain.in_place = True
    return pieces | {"site, 16 bits": functools.partial(plain.fused, site, False)}


def of_peer(device, tokens, hidden):
    """name -> a function that does a site over peer memory, as it is and on a half and a quarter of the bytes."""
    pieces = {}
    transport = Symmetric(_group(), device, multicast=False, timeout_s=30.0)
    for bits in (16, *PACKED):
        shape = torch.Size((tokens, hidden * bits // 16))
        transport.prepare([Planned(SLOT_WHOLE, torch.bfloat16, tuple(shape), False)])
        weight = torch.ones(shape[1], device=device, dtype=torch.bfloat16)
        given = {"weight": weight, "fp32_residual": True, "sharded_residual": True}
        x = transport.partials(SLOT_WHOLE, torch.bfloat16, shape).zero_()
        _, kept = transport.fused(Site(x, None, **given), True)
        pieces[PEER if bits == 16 else f"peer, {bits} bits of 16"] = functools.partial(transport.fused, Site(x, kept, **given), True)
    return pieces


if __name__ == "__main__":
    main()
