#include "two_shot.cuh"

static_assert(sizeof(tw::Site<TW_WORLD>) == TW_SITE_BYTES, "the host packs the argument differently");

using Group = tw::Group<TW_THREADS, TW_GROUPS>;

// A cluster of two is on neighbouring SMs, so that the other pairs of SMs are free for the clusters of GEMMs beside this kernel.
#if TW_CLUSTER > 1
#define TW_CLUSTERS __cluster_dims__(TW_CLUSTER)
#else
#define TW_CLUSTERS  // GPUs before compute capability 9.0 have no clusters
#endif

extern "C" __global__ void TW_CLUSTERS __launch_bounds__(Group::kThreads * Group::kGroups, 1)
two_shot(const __grid_constant__ tw::Site<TW_WORLD> site) {
  using Layout = tw::Layout<tw::TW_ELEMENT, TW_HIDDEN, TW_THREADS, TW_UNROLL, TW_CHUNKS>;
  tw::two_shot<tw::TW_TRANSPORT, tw::TW_NORM, tw::TW_OUTPUT, Layout, Group, TW_WORLD, TW_RANK, TW_DEPTH>(site);
}
