// two_shot: each rank finishes its own part of the rows for all ranks. For many tokens: each row crosses the links once in each
// direction.
//
//   1. entry barrier: the partial sums of all ranks are written
//   2. for each own row: fetch it from all ranks, add the residual, norm, store the norm to all ranks, in place. A norm that is quantised
//      goes elsewhere, in 8 bits with its scale
//   3. exit barrier: the rows of all ranks have arrived, and no rank reads this rank's partial sums any more
//
// The kernel may work in place: only the owner of a row reads it, and each vector is read only by the thread that overwrites it later,
// after the data has arrived.
#pragma once
#include "norm.cuh"
#include "sync.cuh"

namespace tw {

// A position in the chunks of a group's rows.
template <class Layout, class Group>
struct Cursor {
  u32 row;
  int chunk = 0;

  __device__ __forceinline__ bool last_chunk() const { return Layout::kChunks == 1 || chunk == Layout::kChunks - 1; }
  __device__ __forceinline__ void advance() {
    if (last_chunk()) {
      chunk = 0;
      row += gridDim.x * Group::kGroups;
    } else {
      ++chunk;
    }
  }
};

// kDepth: chunks that a thread has in flight. The next chunk is fetched into the places of a chunk as soon as that is summed, so that the
// links stay busy during the norm and the stores.
template <template <class, int, int> class TransportOf, class Norm, class Output, class Layout, class Group, int kWorld,
          int kRank, int kDepth>
__device__ __forceinline__ void two_shot(const Site<kWorld>& site) {
  using Transport = TransportOf<typename Layout::Element, kWorld, kRank>;
  const Transport transport{site};
  Barrier<kWorld> barrier(site);

  using AllRows = Rows<Norm, Output, Layout, Transport, Group, kWorld>;
  constexpr int kSharedBytes = AllRows::shared_bytes(kDepth);
  static_assert(kSharedBytes * Group::kGroups == TW_SHARED_BYTES, "the host gives another amount of shared memory");
  AllRows rows(site, transport, Group::shared_memory(kSharedBytes));

  const u32 per_rank = (site.rows + kWorld - 1) / kWorld;  // the last ranks may have fewer rows, or none
  const u32 begin = site.rank * per_rank;
  const u32 end = min(begin + per_rank, site.rows);

  // The first groups of all CTAs have the first rows, so that few rows are distributed over all SMs.
  using Walk = Cursor<Layout, Group>;
  Walk next{begin + Group::index() * gridDim.x + blockIdx.x}, now = next;

  using InFlight = Chunk<Layout, Transport, SharedPlaces<Layout::kThreads>>;
  typename InFlight::Pending pending[kDepth];
  const auto fetch = [&](int i) {
    if (next.row < end) {
      InFlight(rows.places(i), pending[i]).load(transport, next.row * Layout::kRowBytes, next.chunk);
      next.advance();
    }
    ptx::close_copies();
  };
  Local<Layout, Transport> local;
  const auto fetch_local = [&] {
    if (now.row >= end) return;
    const u64 at = now.row * Layout::kRowBytes;
    const u64 residual_at = site.takes_carried ? (now.row - begin) * Layout::kFloatRowBytes : at;
    local.load_own(transport, at, now.chunk);
    if (site.residual != nullptr) local.load_residual(site.residual + residual_at, site.takes_carried, now.chunk);
  };

  rows.fetch_weight();
  barrier.arrive_and_wait(0);
#pragma unroll
  for (int i = 0; i < kDepth; ++i) fetch(i);
  if (AllRows::kLoadsAhead) fetch_local();
  rows.keep_weight();
  while (now.row < end) {
#pragma unroll(Transport::kPlaces == 0 ? kDepth : 1)  // without places the data is in registers, which cannot be indexed
    for (int i = 0; i < kDepth; ++i) {
      if (now.row >= end) break;
      if (!AllRows::kLoadsAhead) fetch_local();
      ptx::copies_arrived<kDepth - 1>();
      rows.add(InFlight(rows.places(i), pending[i]), local, now.chunk);
      fetch(i);
      const Walk done = now;
      now.advance();
      if (AllRows::kLoadsAhead) fetch_local();
      const u64 at = done.row * Layout::kRowBytes;
      rows.each(done.chunk, [&](u64 offset, const float (&r)[Layout::kVector]) {
        if (site.whole_residual) {
          transport.store(site.whole_residual_at + at + offset, Layout::Element::pack(r));
        } else {
          store_carried<Layout>(site.residual_out + (done.row - begin) * Layout::kFloatRowBytes + offset, r);
        }
      });
      if (!done.last_chunk()) continue;
      rows.normalise([&](u64 offset, uint4 norm) { transport.store(at + offset, norm); });
      if constexpr (Output::kQuantises) {
        const u64 scales_at = site.scales_at + done.row * (4ull * kScales<Output, Layout>);
        rows.quantise([&](u64 offset, uint2 q) { transport.store(site.whole_residual_at + at / 2 + offset, q); },
                      [&](int i, u32 scale) { transport.store(scales_at + i * 4, scale); });
      }
    }
  }
  barrier.arrive_and_wait(1);
  barrier.close();
}

}  // namespace tw
