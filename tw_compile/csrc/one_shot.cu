#include "one_shot.cuh"

static_assert(sizeof(tw::Site<TW_WORLD>) == TW_SITE_BYTES, "the host packs the argument differently");

extern "C" __global__ void __launch_bounds__(TW_THREADS, 1)
one_shot(const __grid_constant__ tw::Site<TW_WORLD> site) {
  using Layout = tw::Layout<tw::TW_ELEMENT, TW_HIDDEN, TW_THREADS, TW_UNROLL, TW_CHUNKS>;
  tw::one_shot<tw::TW_TRANSPORT, tw::TW_NORM, tw::TW_OUTPUT, Layout, TW_WORLD, TW_RANK>(site);
}
