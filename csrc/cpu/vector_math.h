// Branch-free exp and what is built on it, written so that loops over them vectorise in a cloned function.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace hstu::cpu {

#define HSTU_VECTOR_INLINE inline __attribute__((always_inline))

// exp for float32 within 2 ulp: 2^n times a degree-6 polynomial of the remainder; clamped to the finite range.
HSTU_VECTOR_INLINE float vexp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * std::bit_cast<float>((int32_t(n) + 127) << 23);
}
HSTU_VECTOR_INLINE double vexp(double x) { return std::exp(x); }

template <typename T>
HSTU_VECTOR_INLINE T vsigmoid(T x) {
  return T(1) / (T(1) + vexp(-x));
}

}  // namespace hstu::cpu
