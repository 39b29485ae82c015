// kCount neighbours of a row as floats: in 16-byte accesses where kCount elements are a multiple of 16 bytes, which must then be
// aligned, else one by one. Kernels take kCount as their one axis of layout: kVector<T> where aligned() holds for all they touch, or 1.
#pragma once
#include "common.cuh"

namespace hstu::cuda {

template <typename T>
constexpr int kVector = 16 / sizeof(T);

// Whether rows of `n` elements that stand one after another at `data` (null is fine) can be taken kVector<T> at a time.
template <typename T>
bool aligned(const T* data, int64_t n) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && n % kVector<T> == 0;
}

// pick_vector<T>(wide, [&](auto kCount) { ... }): kCount = kVector<T> or 1.
template <typename T, typename Fn>
void pick_vector(bool wide, Fn&& fn) {
  if (wide) return fn(std::integral_constant<int, kVector<T>>{});
  fn(std::integral_constant<int, 1>{});
}

template <int kCount, typename T>
__device__ __forceinline__ void load(float (&v)[kCount], const T* from) {
  if constexpr (kCount * sizeof(T) % 16 == 0) {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      uint4 bits = *reinterpret_cast<const uint4*>(from + i);
      const T* each = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int e = 0; e < kEach; ++e) v[i + e] = to_float(each[e]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = to_float(from[i]);
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void store(T* to, const float (&v)[kCount]) {
  if constexpr (kCount * sizeof(T) % 16 == 0) {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kCount; i += kEach) {
      uint4 bits;
      T* each = reinterpret_cast<T*>(&bits);
#pragma unroll
      for (int e = 0; e < kEach; ++e) each[e] = from_float<T>(v[i + e]);
      *reinterpret_cast<uint4*>(to + i) = bits;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from_float<T>(v[i]);
  }
}

}  // namespace hstu::cuda
