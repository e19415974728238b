#include "two_shot.cuh"

static_assert(sizeof(tw::Site<TW_WORLD>) == TW_SITE_BYTES, "the host packs the argument differently");

extern "C" __global__ void __launch_bounds__(TW_THREADS * TW_GROUPS, 1)
two_shot(const __grid_constant__ tw::Site<TW_WORLD> site) {
  using Layout = tw::Layout<tw::TW_ELEMENT, TW_HIDDEN, TW_THREADS, TW_UNROLL, TW_CHUNKS>;
  using Group = tw::Group<TW_THREADS, TW_GROUPS>;
  tw::two_shot<tw::TW_TRANSPORT, tw::TW_DELIVERY, tw::TW_NORM, Layout, Group, TW_WORLD, TW_RANK, TW_DEPTH>(site);
}
