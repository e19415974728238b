// The barrier between the CTAs with the same index on all ranks, and the reasons why it is sufficient.
//
// Flags. Word [cta * W + p] of a rank's signal pad is written only by rank p. Its upper bits have the number of the last barrier (the
// "epoch") at which p's CTA arrived; the others have the site of p's call and its number of rows. So ranks that are at different sites,
// or run different numbers of tokens, notice it here, before any of them has a result. A CTA counts its own barriers in `epochs`, in
// device memory. So the host does not keep epochs, and a CUDA graph can be replayed. Epochs only grow and are never reset, so that the
// flag of one call is never taken for that of another. A rank is never more than one barrier ahead, and flags are compared by their
// difference, so that few bits are enough and may wrap around. A CTA has the same count on all ranks, because the grid and the number of
// barriers are functions of (rows, H, W, ctas) alone.
//
// Order. A barrier is: __syncthreads of all groups; thread p stores the flag into rank p's pad with release at system scope, then reads
// its own pad with acquire at system scope until p's flag has arrived; __syncthreads.
//   * All earlier reads and writes of the CTA's threads happen before the first __syncthreads, hence before the release (which is
//     cumulative), hence before everything that a peer's CTA does after its acquire.
//   * The same holds for earlier kernels of this stream, and of streams that it waited for, such as the GEMM that wrote the partial sums:
//     they complete before this kernel starts, and the release is cumulative. So after the entry barrier the partial sums of all ranks
//     may be read, whichever CTA or kernel wrote them.
//   * After the exit barrier, all stores into this rank's memory by the peers' CTAs of this index happen before this CTA ends. The kernel
//     ends when all its CTAs have ended, so that later kernels of this stream see all rows.
//   * When a kernel has ended on this rank, no peer reads this rank's partial sums any more: each peer's CTA arrives at the exit barrier
//     after its last read. So the next GEMM may overwrite them without another barrier.
//
// Progress. A CTA waits only for the CTAs with its index on other ranks. All CTAs of a grid must be resident at the same time, or be
// dispatched in the same order on all ranks. So grids are much smaller than the number of SMs.
#pragma once
#include "site.cuh"

namespace tw {

// What a CTA writes to site.error when it gives up. The host raises an error for it (transports/symmetric/arguments.py).
constexpr u32 kErrorMagic = 0x7457f417u;
constexpr u32 kOtherCall = 2;  // a phase: the peer has arrived, at another site or with another number of rows

// call: the site and rows of the peer's flag, if phase is kOtherCall
// The trap ends the CUDA context of the process, so that no wrong result can be read and no flag is used again.
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

  // The number of barriers that this CTA has passed, in this kernel and all earlier ones.
  __device__ u32 epoch() const { return epoch_; }

  // phase: the number of the barrier in the kernel, for the error message
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

  // Stores the count for the next kernel. To be called after the last barrier.
  __device__ void close() const {
    if (threadIdx.y == 0 && threadIdx.x == 0) ptx::store_word(site_.epochs + blockIdx.x, epoch_);
  }

 private:
  // The bits of a flag; epochs have the other bits of 32. Larger values wrap around. The host has the same numbers
  // (transports/symmetric/arguments.py).
  static constexpr u32 kRowBits = 18, kSiteBits = 10, kCallBits = kRowBits + kSiteBits;

  static __device__ u32 low(u32 value, u32 bits) { return value & ((1u << bits) - 1); }
  __device__ u32 flag() const {
    return epoch_ << kCallBits | low(site_.site, kSiteBits) << kRowBits | low(site_.rows, kRowBits);
  }

  __device__ void wait_for(const u32* place, u32 peer, u32 phase) const {
    constexpr u32 kPollsPerLookAtTheClock = 1024;
    u64 begin = 0;
    u32 theirs = ptx::load_acquire_sys(place);
    // Negative if the peer has not arrived: a difference of epochs, times 2^kCallBits.
    const auto behind = [&] { return static_cast<int>((theirs >> kCallBits << kCallBits) - (epoch_ << kCallBits)); };
    for (u32 polls = 1; behind() < 0; ++polls) {
      theirs = ptx::load_acquire_sys(place);
      if (polls % kPollsPerLookAtTheClock != 0) continue;
      const u64 now = ptx::global_timer();
      if (begin == 0) begin = now;
      if (now - begin > site_.timeout_ns) give_up(site_, peer, phase, 0);
    }
    // A peer that is ahead has compared this rank's flag with its own already.
    if (behind() == 0 && theirs != flag()) give_up(site_, peer, kOtherCall, low(theirs, kCallBits));
  }

  const Site<kWorld>& site_;
  u32 epoch_;
};

}  // namespace tw
