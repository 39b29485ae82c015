// Thin named wrappers of the warp-level matrix instructions of sm_80 and later (PTX ISA 9.7.14, "Warp Level Matrix Instructions", and
// 9.7.9, "cp.async"). With g = lane / 4 and t = lane % 4 a thread holds, row x column:
//   m16n8k16, bf16 and fp16, two consecutive k a register (the lower k in the lower half):
//     a0 (g, 2t)  a1 (g + 8, 2t)  a2 (g, 2t + 8)  a3 (g + 8, 2t + 8)     b0 (2t, g)  b1 (2t + 8, g)
//   m16n8k8, tf32:  a0 (g, t)  a1 (g + 8, t)  a2 (g, t + 4)  a3 (g + 8, t + 4)     b0 (t, g)  b1 (t + 4, g)
//   both:  c0 (g, 2t)  c1 (g, 2t + 1)  c2 (g + 8, 2t)  c3 (g + 8, 2t + 1)
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace hstu::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Copies `bytes` of kBytes from global to shared memory and fills the rest with zeros; both addresses are multiples of kBytes.
// 16 bytes pass by L1 (.cg), less cannot.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's latest groups are under way. A barrier makes them known to the block.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements. Lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i (16 bytes each, 16-byte
// aligned); r[i] holds (g, 2t), (g, 2t + 1) of matrix i, or of its transpose: (2t, g), (2t + 1, g) as stored.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d = a b + c, m16n8k16, T = __nv_bfloat16 or __half, float32 accumulators.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float* c) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}
// c += a b.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16<T>(c, a, b0, b1, c);
}

// c += a b, m16n8k8, operands in tf32 (made by to_tf32).
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x rounded to tf32 (11 significant bits), as the bits of a float.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// x = high + low + at most 2^-22 |x|. Products high high + high low + low high (3xTF32) keep a float32 product to about 2^-21.
struct Tf32Pair {
  uint32_t high, low;
};
__device__ __forceinline__ Tf32Pair split_tf32(float x) {
  uint32_t high = to_tf32(x);
  return {high, to_tf32(x - __uint_as_float(high))};
}
// The same with one question for a NaN in place of two: one whose bits overflow in high stays one in low. For dense products; in attention
// it costs registers.
__device__ __forceinline__ Tf32Pair split_tf32_once(float x) {
  uint32_t high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  return {high, to_tf32(x - __uint_as_float(high))};
}

__device__ __forceinline__ void split_tf32(uint32_t (&high)[4], uint32_t (&low)[4], float x0, float x1, float x2, float x3) {
  Tf32Pair pairs[4] = {split_tf32(x0), split_tf32(x1), split_tf32(x2), split_tf32(x3)};
#pragma unroll
  for (int i = 0; i < 4; ++i) high[i] = pairs[i].high, low[i] = pairs[i].low;
}

// c += a b in 3xTF32. The three products of one k-step are summed from zero on the tensor core, which truncates, and added to c by an
// IEEE addition, so that truncation does not pile up along k (Ootomo and Yokota 2022). By the intrinsic, which the compiler does not fuse with
// a product before them: it would for some rows of a fragment and not for others (softmax's decay), whose bits then depend on their place.
__device__ __forceinline__ void mma_m16n8k8_3xtf32(float (&c)[4], const uint32_t (&a_high)[4], const uint32_t (&a_low)[4], Tf32Pair b0,
                                                   Tf32Pair b1) {
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  mma_m16n8k8_tf32(sum, a_low, b0.high, b1.high);
  mma_m16n8k8_tf32(sum, a_high, b0.low, b1.low);
  mma_m16n8k8_tf32(sum, a_high, b0.high, b1.high);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = __fadd_rn(c[i], sum[i]);
}

// Two floats rounded to T in one register, `low` in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  } else {
    static_assert(std::is_same_v<T, __half>);
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
  }
}

}  // namespace hstu::cuda
