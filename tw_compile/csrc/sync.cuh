// The barrier between the CTAs with the same index on all ranks, and the argument why it suffices.
//
// Flags. Word [cta * W + p] of a rank's signal pad is written by rank p only, and only ever grows: its upper bits hold the
// number of the last barrier ("epoch") at which p's CTA arrived, and the others say at which site p's call is and how many rows
// it has: ranks that run different numbers of tokens, or are at different sites, notice it here, before any of them has a
// result. A CTA counts its own barriers in `epochs`,
// in device memory, so the host knows nothing of epochs and a CUDA graph can be replayed. Nothing is reset, so there is no
// moment at which a flag of one call could be taken for one of another; a rank is never more than one barrier ahead, and
// the comparison is of the difference, so wrapping is harmless, and few bits are enough. A CTA counts the same on all ranks because the grid and
// the number of barriers are functions of (rows, H, W, ctas) alone.
//
// Order. One barrier is: __syncthreads, of all groups; thread p stores the epoch into rank p's pad with release at system
// scope, then reads its own pad with acquire at system scope until p's flag has arrived; __syncthreads.
//   * Everything a thread of the CTA did before, reads and writes, happens before the first __syncthreads, hence before
//     the release (which is cumulative), hence before whatever a peer's CTA does after its acquire.
//   * The same holds for earlier kernels of this stream, and of streams this one waited for, such as the GEMM that wrote
//     the partial sums: they complete before this kernel starts, and cumulativity carries them along. So after the entry
//     barrier the partial sums of all ranks may be read, whichever CTA or kernel wrote them.
//   * After the exit barrier every store that the peers' CTAs of this index made into our memory happens before our CTA
//     ends. The kernel ends when all its CTAs have, so later kernels of this stream see all rows.
//   * Once a kernel has ended here, no peer reads our partial sums any more: each peer's CTA arrives at the exit barrier
//     after its last read. So the next GEMM may overwrite them without asking anybody.
//
// Progress. A CTA waits only for its namesakes on other ranks. All CTAs of a grid must come to be resident at once, or be
// dispatched in the same order on all ranks: grids are kept far below the number of SMs.
#pragma once
#include "site.cuh"

namespace tw {

// What a CTA writes to site.error when it gives up. The host raises on it (transports/symmetric/arguments.py).
constexpr u32 kErrorMagic = 0x7457f417u;
constexpr u32 kOtherCall = 2;  // as the phase: the peer has come, at another site or with another number of rows

// call: of the peer's flag, where phase is kOtherCall
// The trap ends the process's CUDA context: no wrong result can be read afterwards, and nothing remains set.
template <int kWorld>
__device__ __noinline__ void give_up(const Site<kWorld>& site, u32 peer, u32 phase, u32 call) {
  volatile u32* error = site.error;
  error[1] = site.rank;
  error[2] = site.site;
  error[3] = peer;
  error[4] = phase;
  error[5] = site.rows;
  error[6] = call;
  ptx::store_release_sys(site.error, kErrorMagic);
  printf("tw_compile: rank %u gave up on rank %u at site %u\n", site.rank, peer, site.site);
  __trap();
}

template <int kWorld>
class Barrier {
 public:
  __device__ explicit Barrier(const Site<kWorld>& site)
      : site_(site), epoch_(ptx::load_word(site.epochs + blockIdx.x)) {}

  // Barriers passed by this CTA, in this and all earlier kernels.
  __device__ u32 epoch() const { return epoch_; }

  // phase: number of the barrier in the kernel, for the error message
  __device__ void arrive_and_wait(u32 phase) {
    ++epoch_;
    __syncthreads();
    if (threadIdx.y == 0 && threadIdx.x < kWorld) {
      const u32 peer = (site_.rank + threadIdx.x) % kWorld;
      const u32 row = blockIdx.x * kWorld;
      ptx::store_release_sys(site_.pad[threadIdx.x] + row + site_.rank, flag());
      wait_for(site_.pad[0] + row + peer, peer, phase);
    }
    __syncthreads();
  }

  // Remember the count for the next kernel. After the last barrier.
  __device__ void close() const {
    if (threadIdx.y == 0 && threadIdx.x == 0) ptx::store_word(site_.epochs + blockIdx.x, epoch_);
  }

 private:
  // Of a flag's 32: more rows, sites or epochs begin again at 0. The host knows this, too (transports/symmetric/arguments.py).
  static constexpr u32 kRowBits = 18, kSiteBits = 10, kCallBits = kRowBits + kSiteBits;

  static __device__ u32 low(u32 value, u32 bits) { return value & ((1u << bits) - 1); }
  __device__ u32 flag() const {
    return epoch_ << kCallBits | low(site_.site, kSiteBits) << kRowBits | low(site_.rows, kRowBits);
  }

  __device__ void wait_for(const u32* place, u32 peer, u32 phase) const {
    constexpr u32 kPollsPerLookAtTheClock = 1024;
    u64 begin = 0;
    u32 theirs = ptx::load_acquire_sys(place);
    // In epochs, times 2^kCallBits.
    const auto behind = [&] { return static_cast<int>((theirs >> kCallBits << kCallBits) - (epoch_ << kCallBits)); };
    for (u32 polls = 1; behind() < 0; ++polls) {
      theirs = ptx::load_acquire_sys(place);
      if (polls % kPollsPerLookAtTheClock != 0) continue;
      const u64 now = ptx::global_timer();
      if (begin == 0) begin = now;
      if (now - begin > site_.timeout_ns) give_up(site_, peer, phase, 0);
    }
    // A peer that is ahead has seen ours, and found nothing wrong.
    if (behind() == 0 && theirs != flag()) give_up(site_, peer, kOtherCall, low(theirs, kCallBits));
  }

  const Site<kWorld>& site_;
  u32 epoch_;
};

}  // namespace tw
