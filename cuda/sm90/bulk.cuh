// Ways out of shared memory and into it: bulk copies and reductions to global memory (PTX ISA 9.7.9.25, "cp.async.bulk", "cp.reduce.async.bulk"),
// and stmatrix (9.7.14.5.16).
#pragma once
#include "barrier.cuh"

namespace hstu::cuda::sm90 {

// to[x] += from[x], or to[x] = from[x]: `bytes` of floats, a multiple of 16, by the copy engine.
__device__ __forceinline__ void add_bulk(float* to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void store_bulk(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
// to[x] = from[x], from global memory; completes on `barrier`.
__device__ __forceinline__ void load_bulk(uint32_t to, const float* from, int bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier.address())
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's copies have read their source; until they are done.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements: the inverse of load_matrices.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// The same, transposed: the inverse of load_matrices_transposed.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
               "r"(r[3])
               : "memory");
}

// Lane t of a quad gets word t of each of its lanes: words[y] of lane x goes to words[x] of lane y.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int x = 0; x < 4; ++x)
      if (!(x & bit)) {
        bool odd = threadIdx.x & bit;
        uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? words[x] : words[x | bit], bit);
        (odd ? words[x] : words[x | bit]) = got;
      }
}

}  // namespace hstu::cuda::sm90
