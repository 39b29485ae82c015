// Scalar functions that the CPU and CUDA backends must agree on, bit for bit where they are integer.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HSTU_INLINE __host__ __device__ __forceinline__
#else
#define HSTU_INLINE inline __attribute__((always_inline))
#endif

namespace hstu {

template <typename T>
HSTU_INLINE T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

template <typename T>
HSTU_INLINE T silu(T x) {
  return x * sigmoid(x);
}

// d silu(x) / dx = sig (1 + x (1 - sig))
template <typename T>
HSTU_INLINE T silu_derivative(T x) {
  T s = sigmoid(x);
  return s * (T(1) + x * (T(1) - s));
}

// GELU with the exact error function: x Phi(x), and its derivative Phi(x) + x phi(x).
template <typename T>
HSTU_INLINE T gelu(T x) {
  return T(0.5) * x * (T(1) + std::erf(x * T(0.70710678118654752440)));
}
template <typename T>
HSTU_INLINE T gelu_derivative(T x) {
  T cdf = T(0.5) * (T(1) + std::erf(x * T(0.70710678118654752440)));
  return cdf + x * T(0.39894228040143267794) * std::exp(T(-0.5) * x * x);
}

// Losses of one element: value(z, y) of prediction z and label y, and its derivative with respect to z.
struct BceWithLogits {
  template <typename T>
  static HSTU_INLINE T value(T z, T y) {
    return (z > T(0) ? z : T(0)) - z * y + std::log1p(std::exp(-std::abs(z)));
  }
  template <typename T>
  static HSTU_INLINE T derivative(T z, T y) {
    return sigmoid(z) - y;
  }
};
struct SquaredError {
  template <typename T>
  static HSTU_INLINE T value(T z, T y) {
    return (z - y) * (z - y);
  }
  template <typename T>
  static HSTU_INLINE T derivative(T z, T y) {
    return T(2) * (z - y);
  }
};

// Philox4x32-10 (Salmon et al., SC 2011). Four 32-bit words from a 64-bit key and a 128-bit counter whose upper half is 0.
struct Philox4 {
  uint32_t word[4];
};
HSTU_INLINE Philox4 philox4x32(uint64_t key, uint64_t counter) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ k0, n2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The random word of element `index` of a draw that began at `offset`: block offset + index / 4, word index % 4.
// A draw of n elements uses ceil(n / 4) blocks, so the next draw begins at offset + ceil(n / 4).
HSTU_INLINE uint32_t philox_word(uint64_t seed, uint64_t offset, uint64_t index) {
  return philox4x32(seed, offset + index / 4).word[index % 4];
}

// Where a draw begins: `fixed`, or so far behind the counter that a tensor holds. A captured step reads it there at each replay.
struct DrawOffset {
  uint64_t fixed;
  const int64_t* base;
  HSTU_INLINE operator uint64_t() const { return base ? fixed + uint64_t(*base) : fixed; }
};

// Dropout keeps an element when its word is at or above p * 2^32.
HSTU_INLINE uint32_t dropout_threshold(double p) {
  double t = p * 4294967296.0;
  return t <= 0 ? 0u : t >= 4294967295.0 ? 4294967295u : uint32_t(t);
}

// A word as a signed number of 24 bits: exact in float32.
HSTU_INLINE int32_t signed_24(uint32_t word) { return int32_t(word) >> 8; }

// Where a key's probes of a hash table begin: the finaliser of MurmurHash3.
HSTU_INLINE uint64_t hash_key(int64_t key) {
  uint64_t x = uint64_t(key);
  x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCDull;
  x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53ull;
  return x ^ (x >> 33);
}

// Uniform integer in [low, low + range): the high word of word * range (bias at most range / 2^32).
HSTU_INLINE int64_t random_id(uint32_t word, int64_t low, int64_t range) {
  return low + int64_t((uint64_t(word) * uint64_t(range)) >> 32);
}

}  // namespace hstu
