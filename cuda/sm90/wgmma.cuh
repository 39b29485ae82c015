// Products of a warpgroup on the tensor cores (PTX ISA 9.7.15, "Asynchronous Warpgroup Level Matrix Instructions"): four warps, 64 rows;
// warp w holds rows 16 w .. 16 w + 15 of the accumulators, in the layout of mma m16n8: with g = lane / 4 and t = lane % 4, c[4 x + 2 half + e]
// is row g + 8 half, column 8 x + 2 t + e. Tiles in shared memory stand in chunks of columns, [chunk][row][kRowBytes], swizzled (tma.cuh).
#pragma once
#include "tma.cuh"

namespace hstu::cuda::sm90 {

// Where an operand stands (9.7.15.5.1, "Matrix descriptor"): address, leading and stride byte offsets in units of 16 bytes, swizzle.
template <int kBytes>
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading, int stride) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(kBytes == 128 ? 1 : 2) << 62;
}
// Rows of the tile are rows of the product, 16 columns a step: the first eight rows stand kBytes * 8 before the next.
template <int kBytes>
__device__ __forceinline__ uint64_t by_rows(uint32_t address) {
  return descriptor<kBytes>(address, 16, 8 * kBytes);
}
// Columns of the tile are columns of the product, 16 rows a step; chunks of columns stand `chunk` bytes apart.
template <int kBytes>
__device__ __forceinline__ uint64_t by_columns(uint32_t address, int chunk) {
  return descriptor<kBytes>(address, chunk, 8 * kBytes);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the latest groups are under way; `c` is what the compiler must not read before.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&c)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

template <int kRegisters>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

#define HSTU_C8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define HSTU_C16(i) HSTU_C8(i), HSTU_C8(i + 8)
#define HSTU_C32(i) HSTU_C16(i), HSTU_C16(i + 16)
#define HSTU_C64(i) HSTU_C32(i), HSTU_C32(i + 32)
#define HSTU_R16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HSTU_R32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HSTU_R64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HSTU_R128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c = a b, or c += a b where `add`; m64 n(2 kCount) k16 over 16-bit types. a from shared memory (descriptor) or from registers (the layout of
// an accumulator's 16 columns, rounded); kColumns: b is given by columns, else by rows (its transpose stands in memory).
#define HSTU_WGMMA(COUNT, N, A, B, P, TB, TYPE)                                                                                         \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " {" HSTU_R##COUNT "}, " A ", " B ", p, 1, 1" TB ";\n}"
#define HSTU_C128(i) HSTU_C64(i), HSTU_C64(i + 64)
template <typename T, bool kColumns>
__device__ __forceinline__ void wgmma(float (&c)[16], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(16, "32", "%16", "%17", "%18", ", 0, %19", "bf16") : HSTU_C16(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kColumns)));
  else
    asm volatile(HSTU_WGMMA(16, "32", "%16", "%17", "%18", ", 0, %19", "f16") : HSTU_C16(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
template <typename T, bool kColumns>
__device__ __forceinline__ void wgmma(float (&c)[16], const uint32_t* a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(16, "32", "{%16, %17, %18, %19}", "%20", "%21", ", %22", "bf16")
                 : HSTU_C16(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
  else
    asm volatile(HSTU_WGMMA(16, "32", "{%16, %17, %18, %19}", "%20", "%21", ", %22", "f16")
                 : HSTU_C16(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
template <typename T, bool kColumns>
__device__ __forceinline__ void wgmma(float (&c)[32], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(32, "64", "%32", "%33", "%34", ", 0, %35", "bf16") : HSTU_C32(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kColumns)));
  else
    asm volatile(HSTU_WGMMA(32, "64", "%32", "%33", "%34", ", 0, %35", "f16") : HSTU_C32(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
template <typename T, bool kColumns>
__device__ __forceinline__ void wgmma(float (&c)[32], const uint32_t* a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(32, "64", "{%32, %33, %34, %35}", "%36", "%37", ", %38", "bf16")
                 : HSTU_C32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
  else
    asm volatile(HSTU_WGMMA(32, "64", "{%32, %33, %34, %35}", "%36", "%37", ", %38", "f16")
                 : HSTU_C32(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
template <typename T, bool kColumns>
__device__ __forceinline__ void wgmma(float (&c)[64], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(64, "128", "%64", "%65", "%66", ", 0, %67", "bf16") : HSTU_C64(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kColumns)));
  else
    asm volatile(HSTU_WGMMA(64, "128", "%64", "%65", "%66", ", 0, %67", "f16") : HSTU_C64(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
template <typename T, bool kColumns>
__device__ __forceinline__ void wgmma(float (&c)[64], const uint32_t* a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(64, "128", "{%64, %65, %66, %67}", "%68", "%69", ", %70", "bf16")
                 : HSTU_C64(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
  else
    asm volatile(HSTU_WGMMA(64, "128", "{%64, %65, %66, %67}", "%68", "%69", ", %70", "f16")
                 : HSTU_C64(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
template <typename T, bool kColumns>
__device__ __forceinline__ void wgmma(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(128, "256", "%128", "%129", "%130", ", 0, %131", "bf16") : HSTU_C128(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kColumns)));
  else
    asm volatile(HSTU_WGMMA(128, "256", "%128", "%129", "%130", ", 0, %131", "f16") : HSTU_C128(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
template <typename T, bool kColumns>
__device__ __forceinline__ void wgmma(float (&c)[128], const uint32_t* a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(128, "256", "{%128, %129, %130, %131}", "%132", "%133", ", %134", "bf16")
                 : HSTU_C128(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
  else
    asm volatile(HSTU_WGMMA(128, "256", "{%128, %129, %130, %131}", "%132", "%133", ", %134", "f16")
                 : HSTU_C128(0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kColumns)));
}
// Both from shared memory; kAColumns: a is given by columns, too.
template <typename T, bool kAColumns, bool kBColumns>
__device__ __forceinline__ void wgmma_both(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm volatile(HSTU_WGMMA(128, "256", "%128", "%129", "%130", ", %131, %132", "bf16")
                 : HSTU_C128(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kAColumns)), "n"(int(kBColumns)));
  else
    asm volatile(HSTU_WGMMA(128, "256", "%128", "%129", "%130", ", %131, %132", "f16")
                 : HSTU_C128(0) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kAColumns)), "n"(int(kBColumns)));
}

}  // namespace hstu::cuda::sm90
