// Clusters of blocks (PTX ISA 9.7.13.4, "barrier.cluster"; 10.12, "%cluster_ctarank"), and boxes that the copy engine gives to several of
// them.
#pragma once
#include "tma.cuh"

namespace hstu::cuda::sm90 {

__device__ __forceinline__ int cluster_rank() {
  int x;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int cluster_index() {
  int x;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int cluster_count() {
  int x;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(x));
  return x;
}
// All threads of all blocks of the cluster meet; what they wrote to shared memory is seen.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrives at block `rank`'s barrier that stands where this one does.
__device__ __forceinline__ void arrive_at(Barrier& barrier, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(
                   barrier.address()),
               "r"(rank)
               : "memory");
}
// The arrival of a warp at this barrier of each of kBlocks blocks.
template <int kBlocks>
__device__ __forceinline__ void arrive_at_all_for_warp(Barrier& barrier, int lane) {
  if constexpr (kArrivalsOfWarp > 1)
    for (int rank = 0; rank < kBlocks; ++rank) arrive_at(barrier, rank);
  else if (lane < kBlocks)
    arrive_at(barrier, lane);
}

// load_box to the same place of every block whose bit is set in `blocks`; it completes on the barrier of each.
__device__ __forceinline__ void load_box_for_all(uint32_t to, const CUtensorMap& map, int d, int head, int row, Barrier& barrier,
                                                 int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], "
      "%6;" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(d), "r"(head), "r"(row), "r"(barrier.address()), "h"(uint16_t(blocks))
      : "memory");
}

// `bytes` of this block's shared memory to the same place of block `rank`'s; completes on its barrier that stands where this one does.
__device__ __forceinline__ void copy_to_block(uint32_t from, int bytes, Barrier& barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 to, done;\nmapa.shared::cluster.u32 to, %0, %3;\nmapa.shared::cluster.u32 done, %2, %3;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%0], %1, [done];\n}" ::"r"(from),
      "r"(bytes), "r"(barrier.address()), "r"(rank)
      : "memory");
}

}  // namespace hstu::cuda::sm90
