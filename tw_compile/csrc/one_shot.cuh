// one_shot: each rank finishes all rows for itself. For few tokens: it has one barrier per row, and data crosses the links once.
//
//   for each row of the CTA:
//   1. copy the row of this rank's partial sums to the staging place of this CTA
//   2. barrier: all ranks have copied the row
//   3. fetch the row from all ranks, add the residual, norm, quantise, and store the results on this rank
//
// A CTA does not wait until the peers have finished reading. Instead it has two staging places, which it uses in turns. The place
// that it writes in round e was last read before round e - 1. The CTA has seen all peers arrive at the barrier of round e - 1, and
// they arrive there after their reads of all earlier rounds. `x` and the outputs are private to the rank. The outputs may have the
// memory of x, since the thread that writes a vector has copied it before.
#pragma once
#include "norm.cuh"
#include "sync.cuh"

namespace tw {

template <template <class, int, int> class TransportOf, class Norm, class Output, class Layout, int kWorld, int kRank>
__device__ __forceinline__ void one_shot(const Site<kWorld>& site) {
  using Transport = TransportOf<typename Layout::Element, kWorld, kRank>;
  const Transport transport{site};
  Barrier<kWorld> barrier(site);
  using OneGroup = Group<Layout::kThreads, 1>;
  Rows<Norm, Output, Layout, Transport, OneGroup, kWorld> rows(site, transport, ptx::shared_memory());
  rows.fetch_weight();
  bool first = true;

  for (u32 row = blockIdx.x; row < site.rows; row += gridDim.x) {
    const u64 at = row * Layout::kRowBytes;
    const u64 staging_at = site.staging_at + (blockIdx.x * 2 + barrier.epoch() % 2) * Layout::kRowBytes;
    const u64 float_at = row * Layout::kFloatRowBytes;
    const char* residual = site.residual + (site.takes_carried ? float_at : at);
    constexpr bool kInRegisters = Transport::kPlaces <= 4;  // the registers have no room for more
    uint4 places[kInRegisters ? kPlacesOfChunk<Layout, Transport> + 1 : 1];  // no array can be empty
    typename Transport::Pending pending[Layout::kUnroll];
    const auto chunk = [&] {
      if constexpr (kInRegisters) {
        return Chunk<Layout, Transport, RegisterPlaces>(RegisterPlaces{places}, pending);
      } else {
        return Chunk<Layout, Transport, SharedPlaces<Layout::kThreads>>(rows.places(0), pending);
      }
    }();

    Local<Layout, Transport> local;
    if (site.residual != nullptr) local.load_residual(residual, site.takes_carried, 0);  // overlaps with the barrier
    for (int c = 0; c < Layout::kChunks; ++c) {
#pragma unroll
      for (int u = 0; u < Layout::kUnroll; ++u) {
        if (!Layout::holds(Layout::vector(c, u))) continue;
        ptx::store_sys(site.workspace[0] + staging_at + Layout::offset(c, u), ptx::load(site.x + at + Layout::offset(c, u)));
      }
    }
    if constexpr (Norm::kCenters) rows.prefetch_shift();
    if constexpr (Transport::kAliases) ptx::fence_alias();
    barrier.arrive_and_wait(0);
    if constexpr (Transport::kAliases) ptx::fence_alias();
    if (first) rows.keep_weight();
    first = false;

#pragma unroll 1
    for (int c = 0; c < Layout::kChunks; ++c) {
      chunk.load(transport, staging_at, c);
      local.load_own(transport, staging_at, c);
      if (c > 0 && site.residual != nullptr) local.load_residual(residual, site.takes_carried, c);
      if constexpr (!kInRegisters) {
        ptx::close_copies();
        ptx::copies_arrived<0>();
      }
      rows.add(chunk, local, c);
      rows.each(c, [&](u64 offset, const float (&r)[Layout::kVector]) {
        if (site.whole_residual) {
          ptx::store(site.residual_out + at + offset, Layout::Element::pack(r));
        } else {
          store_carried<Layout>(site.residual_out + float_at + offset, r);
        }
      });
    }
    rows.normalise([&](u64 offset, uint4 norm) { ptx::store(site.norm_out + at + offset, norm); });
    if constexpr (Output::kQuantises) {
      rows.quantise([&](u64 offset, uint2 q) { ptx::store(site.quantised_out + at / 2 + offset, q); },
                    [&](int i, u32 scale) { ptx::store_word(site.scale_out + row * kScales<Output, Layout> + i, scale); });
    }
  }
  barrier.close();
}

}  // namespace tw
