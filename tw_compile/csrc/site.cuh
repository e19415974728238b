// The one argument of every kernel. The host packs it (transports/symmetric/arguments.py): keep the two in step.
#pragma once
#include "ptx.cuh"

namespace tw {

template <int kWorld>
struct Site {
  // Of this rank's workspace. Entry i of an array belongs to rank (rank + i) % kWorld: every rank begins with itself and
  // goes round from there, so that at any moment the ranks address different peers, by indices known when compiling.
  char* workspace[kWorld];  // [activations | carried residual | whole residual | staging], at the same offsets on every rank
  u32* pad[kWorld];         // signal pads
  char* multicast;          // the workspaces of all ranks at one address; null without multicast
  u32* epochs;              // one word a CTA, private to this rank: how many barriers the CTA has passed
  u32* error;               // in pinned host memory: see sync.cuh
  u64 timeout_ns;           // a barrier that waits longer gives up
  u64 whole_residual_at;    // byte offsets in the workspace
  u64 staging_at;
  u32 rank;

  // Of this call.
  u32 rows;              // tokens, on all ranks together
  const char* x;         // one_shot: [rows, H] this rank's partial sums. two_shot finds them in the workspace
  const char* residual;  // [rows, H] or null; two_shot reads this rank's own rows only. Or a carried one: see below
  const char* bias;      // [H] or null
  const char* weight;    // [H] or null: ones
  char* norm_out;        // one_shot: [rows, H]. two_shot leaves the norm in the workspace, in place of the partial sums
  char* residual_out;    // one_shot: [rows, H]. two_shot: where to carry it, or with whole_residual left alone
  u32 site;              // number of the call in the model: the same on all ranks, and named in error messages
  u32 weight_is_float;   // the weight is float32, and the element is not
  // A carried residual goes from site to site in float32; two_shot carries this rank's own rows only, from the first on.
  u32 takes_carried;
  u32 whole_residual;  // do not carry the new residual, but round it; two_shot gives it to the workspaces of all ranks
  float eps, scale, offset;

  // Of a LayerNorm.
  u32 shift_is_float;
  const char* shift;  // [H] or null: zeros
};

}  // namespace tw
