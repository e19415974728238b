// One-shot with the flags in the data, as in NCCL's LL protocol. For the fewest tokens: one trip over the wire in place of
// three, the flag's and there and back for the data; but it carries twice the bytes.
//
//   for each row of the CTA:
//   1. store the row of this rank's partial sums to a place in every peer's memory, each four bytes beside the flag
//   2. read the rows of all peers from the own memory until each flag is there, add the residual, norm, store both here
//
// The flag is the CTA's epoch, with the number of rows, and the places change over with it, as those of one_shot do. Four bytes and their flag are
// one access of eight, which is never torn; no order between accesses is needed. A thread sends for epoch e after it has
// read all of its vectors of epoch e - 1, and the peers' threads of the same index, which have the same vectors, write
// epoch e + 1 only when they have that: so nobody overwrites epoch e - 1 before it was read. The same holds for the staging
// places of one_shot, whatever order the two kernels come in. An epoch comes again after 2^27 rows of the CTA, when the flags
// of the time before have long been overwritten.
#pragma once
#include "row.cuh"
#include "sync.cuh"

namespace tw {

// The rows of the peers, as they arrive here; our own comes from where it is.
template <class Layout, int kWorld>
struct Arrivals {
  using Transport = Peer<typename Layout::Element, kWorld>;

  const Site<kWorld>& site;
  const char* own;   // our row
  const char* from;  // the places in our memory: a row of twice the length for each rank
  Flag<5> flag;
  int chunk;
  const Chunk<Layout, Transport>& kept;  // has the residual

  __device__ __forceinline__ void total(const Transport&, int u, float (&sum)[Layout::kVector]) const {
    const int v = Layout::vector(chunk, u);
    const uint4 mine = ptx::load(own + v * 16ull);
    add<0>(v, mine, sum);
  }
  __device__ __forceinline__ Vector<Layout> residual(int u, bool is_float) const { return kept.residual(u, is_float); }

 private:
  // In rank order, and so many ranks at a time as registers allow to poll at once.
  template <int kBegin>
  __device__ __forceinline__ void add(int v, uint4 mine, float (&sum)[Layout::kVector]) const {
    constexpr int kEnd = kBegin + 3 < kWorld ? kBegin + 3 : kWorld;
    uint4 words[kEnd - kBegin][2];
    receive<kBegin>(v, words);
#pragma unroll
    for (int rank = kBegin; rank < kEnd; ++rank) {
      const uint4 (&word)[2] = words[rank - kBegin];
      float part[Layout::kVector];
      Layout::Element::unpack(rank == site.rank ? mine : make_uint4(word[0].x, word[0].z, word[1].x, word[1].z), part);
#pragma unroll
      for (int i = 0; i < Layout::kVector; ++i) sum[i] = rank == 0 ? part[i] : __fadd_rn(sum[i], part[i]);
    }
    if constexpr (kEnd < kWorld) add<kEnd>(v, mine, sum);
  }

  template <int kBegin, int kRanks>
  __device__ __forceinline__ void receive(int v, uint4 (&words)[kRanks][2]) const {
    Patience<kWorld> patience(site);
    for (;;) {
#pragma unroll
      for (int i = 0; i < kRanks; ++i) {
#pragma unroll
        for (int w = 0; w < 2; ++w)
          words[i][w] = ptx::load_pairs(from + (kBegin + i) * 2 * Layout::kRowBytes + (2 * v + w) * 16ull);
      }
      u32 missing = kWorld, other_rows = 0;
#pragma unroll
      for (int i = 0; i < kRanks; ++i) {
        const uint4 (&word)[2] = words[i];
        const bool here = word[0].y == flag.word && word[0].w == flag.word && word[1].y == flag.word && word[1].w == flag.word;
        if (here || kBegin + i == site.rank) continue;
        missing = kBegin + i;
        const Flag<5> theirs(word[0].y);
        other_rows = theirs.ahead_of(flag) == 0 && theirs.word != flag.word ? theirs.rows() : 0;
      }
      if (missing == kWorld) return;
      patience.lose(missing, 0, other_rows);
    }
  }
};

template <class Norm, class Layout, int kWorld>
__device__ __forceinline__ void one_shot_ll(const Site<kWorld>& site) {
  using Transport = Peer<typename Layout::Element, kWorld>;
  const Transport transport(site);
  Barrier<kWorld> barrier(site);
  using AllRows = Rows<Norm, Layout, Transport, kWorld>;
  AllRows rows(site, transport);
  rows.fetch_weight();

  for (u32 row = blockIdx.x; row < site.rows; row += gridDim.x) {
    const u32 epoch = barrier.next_epoch();
    const Flag<5> flag(epoch, site.rows);  // there are less than 32
    const u64 at = row * Layout::kRowBytes;
    const u64 places_at = site.ll_at + (blockIdx.x * 2 + epoch % 2) * (2 * kWorld) * Layout::kRowBytes;
    const u64 float_at = row * Layout::kFloatRowBytes;
    const char* residual = site.residual == nullptr ? nullptr : site.residual + (site.takes_carried ? float_at : at);
    typename Chunk<Layout, Transport>::Pending pending;
    const Chunk<Layout, Transport> chunk(rows.memory_of_chunk(0), pending);

#pragma unroll 1
    for (int c = 0; c < Layout::kChunks; ++c) {
#pragma unroll
      for (int u = 0; u < Layout::kUnroll; ++u) {
        const int v = Layout::vector(c, u);
        if (!Layout::holds(v)) continue;
        const uint4 mine = ptx::load(site.x + at + v * 16ull);
        const u64 place_at = places_at + site.rank * 2 * Layout::kRowBytes + v * 32ull;
#pragma unroll
        for (int i = 1; i < kWorld; ++i) {
          ptx::store_pairs(site.workspace[i] + place_at, make_uint4(mine.x, flag.word, mine.y, flag.word));
          ptx::store_pairs(site.workspace[i] + place_at + 16, make_uint4(mine.z, flag.word, mine.w, flag.word));
        }
      }
    }
    if constexpr (Norm::kCenters) rows.prefetch_shift();
#pragma unroll 1
    for (int c = 0; c < Layout::kChunks; ++c) {
      chunk.load_residual(residual, site.takes_carried, c);
      ptx::close_copies();
      ptx::copies_arrived<0>();
      const Arrivals<Layout, kWorld> arrivals{site, site.x + at, site.workspace[0] + places_at, flag, c, chunk};
      rows.add(arrivals, c);
      rows.each(c, [&](int v, const float (&r)[Layout::kVector]) {
        if (site.whole_residual) {
          ptx::store(site.residual_out + at + v * 16ull, Layout::Element::pack(r));
        } else {
          store_carried<Layout>(site.residual_out + float_at, v, r);
        }
      });
    }
    rows.normalise([&](u64 offset, uint4 norm) { ptx::store(site.norm_out + at + offset, norm); });
  }
  barrier.close();
}

}  // namespace tw
