// Several neighbouring elements in one load or store.
#pragma once
#include <initializer_list>

#include "common.cuh"

namespace hstu::cuda {

template <typename T, int kN>
struct alignas(sizeof(T) * kN < 16 ? sizeof(T) * kN : 16) Vector {
  T at[kN];
};

template <int kN, typename T>
__device__ __forceinline__ Vector<T, kN> load(const T* x) {
  return *reinterpret_cast<const Vector<T, kN>*>(x);
}
template <int kN, typename T>
__device__ __forceinline__ void store(T* y, const Vector<T, kN>& x) {
  *reinterpret_cast<Vector<T, kN>*>(y) = x;
}

// Whether Vector<T, kN> can be loaded at x.
template <int kN, typename T>
bool aligned(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % alignof(Vector<T, kN>) == 0;
}

// pick_width<T>(d, {pointers}, [&](auto kN) { ... }): how many elements of rows of d elements a lane can take at once: 4, 2 or 1.
template <typename T, typename Fn>
void pick_width(int64_t d, std::initializer_list<const T*> pointers, Fn&& fn) {
  bool four = d % 4 == 0, two = d % 2 == 0;
  for (const T* x : pointers) four = four && aligned<4>(x), two = two && aligned<2>(x);
  if (four) return fn(std::integral_constant<int, 4>{});
  if (two) return fn(std::integral_constant<int, 2>{});
  fn(std::integral_constant<int, 1>{});
}

}  // namespace hstu::cuda
