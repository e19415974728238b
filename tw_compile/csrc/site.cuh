// The argument of all kernels. The host packs it in transports/symmetric/arguments.py, which must have the same layout.
#pragma once
#include "ptx.cuh"

namespace tw {

template <int kWorld>
struct Site {
  // The same for all calls in a workspace. Entry i of an array belongs to rank (rank + i) % kWorld. So each rank begins with itself,
  // the ranks address different peers at the same time, and the indices are compile-time constants.
  char* workspace[kWorld];  // [activations | carried residual | whole residual | staging], at the same offsets on every rank
  u32* pad[kWorld];         // signal pads
  char* multicast;          // multicast address of the workspaces of all ranks; null without multicast
  u32* epochs;              // one word for each CTA, private to this rank: the number of barriers that the CTA has passed
  u32* error;               // in pinned host memory: see sync.cuh
  u64 timeout_ns;           // a barrier that waits longer gives up
  u64 whole_residual_at;    // byte offsets in the workspace
  u64 staging_at;
  u64 scales_at;  // of quantised norms, which two_shot writes where a residual that is whole would be
  u32 rank;

  // Different in each call.
  u32 rows;              // the number of tokens, the same on all ranks
  const char* x;         // one_shot: [rows, H], the partial sums of this rank. two_shot reads them in the workspace
  const char* residual;  // [rows, H], or a carried residual (see below), or null. two_shot reads only this rank's own rows
  const char* bias;      // [H] or null
  const char* weight;    // [H], or null for ones
  char* norm_out;        // one_shot: [rows, H]. two_shot writes the norm to the workspace, over the partial sums
  char* residual_out;    // one_shot: [rows, H]. two_shot: the carried residual; not used with whole_residual
  u32 site;              // the number of the site in the model, the same on all ranks, for error messages
  u32 weight_is_float;   // whether the weight is float32 and the elements are not
  // A carried residual goes from site to site in float32. With two_shot it has only this rank's own rows, at the front.
  u32 takes_carried;   // whether residual is a carried one
  u32 whole_residual;  // the new residual is rounded and not carried. two_shot writes it to the workspaces of all ranks
  float eps, scale, offset;  // a negative eps: the norm is r, rounded

  // For a LayerNorm.
  u32 shift_is_float;
  const char* shift;  // [H], or null for zeros

  // For a norm that is quantised: see quantise.cuh. The numbers are those of quantise.Quantise.
  char* quantised_out;        // one_shot: [rows, H]. two_shot writes it to the workspaces, at whole_residual_at
  u32* scale_out;             // one_shot: [rows, kScales] in float32 (norm.cuh). two_shot writes them to the workspaces, at scales_at
  const u32* static_scale;    // one for all rows, a float32, or null where each has its own
  float added, least, most, floor, low, high, zero;
  u32 how, narrow, keeps_norm;
};

}  // namespace tw
