// Barriers in shared memory that count arrivals and bytes (PTX ISA 9.7.13.15, "mbarrier"), and named barriers (9.7.13.1, "bar").
#pragma once
#include "../common.cuh"
#include "../mma.cuh"

namespace hstu::cuda::sm90 {

// A phase ends when all arrivals, and all bytes that were announced, have come; then the next one begins. Phases alternate 0, 1.
struct Barrier {
  uint64_t state;
  // How many single threads arrive in a phase, and how many warps.
  __device__ __forceinline__ void init(int threads, int warps) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(threads + warps * kArrivalsOfWarp) : "memory");
  }
  __device__ __forceinline__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory"); }
  // The arrival of a warp, by all lanes that come here: after __syncwarp.
  __device__ __forceinline__ void arrive_for_warp(int lane) {
    if (arrives(lane)) arrive();
  }
  // The same without a lane's number, by all lanes of the warp.
  __device__ __forceinline__ void arrive_once() {
    if constexpr (kArrivalsOfWarp > 1) return arrive();
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n@one mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(address()) : "memory");
  }
  // The same where lane 0 arrives by expect.
  __device__ __forceinline__ void arrive_beside(int lane) {
    if (kArrivalsOfWarp > 1 && lane > 0) arrive();
  }
  // Arrives, and lets the phase wait for `bytes` of copies that complete on this barrier.
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  // Returns when the phase of this parity has ended. The last operand: nanoseconds that a thread may sleep at a time.
  __device__ __forceinline__ void wait(int parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n@!done bra again;\n}" ::"r"(address()),
        "r"(parity), "r"(10000000)
        : "memory");
  }
  __device__ __forceinline__ uint32_t address() const { return shared_address(&state); }
};
// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Orders this thread's ordinary writes to shared memory before what the copy engine and the tensor cores read or write next.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A ring of kStages buffers: where a side stands. Producers wait for parity ^ 1, so that the first round passes.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  static __device__ __forceinline__ Ring after(uint32_t steps) { return {int(steps % kStages), int(steps / kStages & 1)}; }
};

// `threads` threads meet at barrier `id` (1 .. 15; 0 is __syncthreads), or arrive without waiting.
__device__ __forceinline__ void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void announce(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace hstu::cuda::sm90
