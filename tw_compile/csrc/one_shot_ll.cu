#include "one_shot_ll.cuh"

static_assert(sizeof(tw::Site<TW_WORLD>) == TW_SITE_BYTES, "the host packs the argument differently");

extern "C" __global__ void __launch_bounds__(TW_THREADS, 1)
one_shot_ll(const __grid_constant__ tw::Site<TW_WORLD> site) {
  using Layout = tw::Layout<tw::TW_ELEMENT, TW_HIDDEN, TW_THREADS, TW_UNROLL, TW_CHUNKS>;
  tw::one_shot_ll<tw::TW_NORM, Layout, TW_WORLD>(site);
}
