#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../dispatch.h"
#include "../ops.h"
#include "threads.h"
#include "vector_math.h"

namespace hstu::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, BFloat16> || std::is_same_v<T, Float16>;

HSTU_VECTOR_INLINE float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// Exponent and mantissa move in place; infinity and NaN take the larger exponent, subnormals are normalised by a subtraction.
HSTU_VECTOR_INLINE float widen(Float16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  uint32_t normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
  uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude + (113u << 23)) - std::bit_cast<float>(113u << 23));
  uint32_t bits = magnitude >= (31u << 23) ? special : magnitude < (1u << 23) ? subnormal : normal;
  return std::bit_cast<float>(bits | sign);
}

HSTU_VECTOR_INLINE void narrow(BFloat16& y, float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40u;
  y.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// Normal results round by an addition below the kept bits, subnormal ones by the hardware's addition of 1/2.
HSTU_VECTOR_INLINE void narrow(Float16& y, float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t result = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? subnormal : normal;
  y.bits = uint16_t(result | sign);
}

// float32 rounded to odd: cut, and the last bit set where something was cut off, so that a second rounding to 16 bits is exact.
HSTU_VECTOR_INLINE float to_odd(double x) {
  float nearest = float(x);
  uint32_t bits = std::bit_cast<uint32_t>(nearest);
  double magnitude = __builtin_fabs(x), rounded = __builtin_fabs(double(nearest));
  uint32_t cut = rounded > magnitude ? bits - 1 : bits;
  return std::bit_cast<float>(rounded > magnitude || rounded < magnitude ? cut | 1u : cut);
}
HSTU_VECTOR_INLINE float to_odd(float x) { return x; }
HSTU_VECTOR_INLINE float to_odd(BFloat16 x) { return widen(x); }
HSTU_VECTOR_INLINE float to_odd(Float16 x) { return widen(x); }
HSTU_VECTOR_INLINE float to_odd(int32_t x) { return to_odd(double(x)); }
HSTU_VECTOR_INLINE float to_odd(int64_t x) {
  double exact = double(x), cut = 65536.0 * double((x >> 16) | int64_t((x & 0xffff) != 0));  // odd at 2^16: a double holds it
  return to_odd(x > (int64_t(1) << 52) || x < -(int64_t(1) << 52) ? cut : exact);
}

template <typename To, typename From>
HSTU_VECTOR_INLINE To saturate(From x) {
  using Limits = std::numeric_limits<To>;
  if constexpr (std::is_integral_v<From>) {
    if (sizeof(To) >= sizeof(From)) return To(x);
    return To(x > From(Limits::max()) ? From(Limits::max()) : x < From(Limits::min()) ? From(Limits::min()) : x);
  } else {
    constexpr From kEnd = -From(Limits::min());  // 2^31 or 2^63, exact
    bool inside = x >= -kEnd && x < kEnd;
    To result = To(inside ? x : From(0));
    result = x >= kEnd ? Limits::max() : result;
    return x < -kEnd ? Limits::min() : result;
  }
}

template <typename To, typename From>
HSTU_VECTOR_INLINE void convert(To& y, From x) {
  if constexpr (kIsHalf<To>)
    narrow(y, to_odd(x));
  else if constexpr (kIsHalf<From>)
    convert(y, widen(x));
  else if constexpr (std::is_integral_v<To>)
    y = saturate<To>(x);
  else
    y = To(x);
}

template <typename To, typename From>
HSTU_CLONES void convert_all(To* y, const From* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) convert(y[i], x[i]);
}
#define HSTU_CAST_FROM(From)                                                     \
  template void convert_all<float, From>(float*, const From*, int64_t);          \
  template void convert_all<double, From>(double*, const From*, int64_t);        \
  template void convert_all<BFloat16, From>(BFloat16*, const From*, int64_t);    \
  template void convert_all<Float16, From>(Float16*, const From*, int64_t);      \
  template void convert_all<int32_t, From>(int32_t*, const From*, int64_t);      \
  template void convert_all<int64_t, From>(int64_t*, const From*, int64_t);
HSTU_CAST_FROM(float)
HSTU_CAST_FROM(double)
HSTU_CAST_FROM(BFloat16)
HSTU_CAST_FROM(Float16)
HSTU_CAST_FROM(int32_t)
HSTU_CAST_FROM(int64_t)
#undef HSTU_CAST_FROM

template <typename Fn>
void pick_type(Dtype dtype, Fn&& fn) {
  switch (dtype) {
    case Dtype::kFloat32: return fn(float{});
    case Dtype::kFloat64: return fn(double{});
    case Dtype::kBFloat16: return fn(BFloat16{});
    case Dtype::kFloat16: return fn(Float16{});
    case Dtype::kInt32: return fn(int32_t{});
    case Dtype::kInt64: return fn(int64_t{});
  }
}

constexpr int64_t kBlock = 1 << 14;

}  // namespace

// One parallel pass over fixed blocks of all tensors.
void cast(TensorList y, TensorList x, Stream) {
  if (x.items.empty()) return;
  if (y.items[0].dtype == x.items[0].dtype) {
    for (size_t n = 0; n < x.items.size(); ++n) std::memcpy(y.items[n].data, x.items[n].data, size_t(x.items[n].bytes()));
    return;
  }
  struct Block {
    size_t tensor;
    int64_t begin;
  };
  std::vector<Block> blocks;
  for (size_t tensor = 0; tensor < x.items.size(); ++tensor)
    for (int64_t begin = 0; begin < x.items[tensor].size(); begin += kBlock) blocks.push_back({tensor, begin});
  pick_type(y.items[0].dtype, [&](auto to) {
    pick_type(x.items[0].dtype, [&](auto from) {
      using To = decltype(to);
      using From = decltype(from);
      parallel_for(int64_t(blocks.size()), [&](int64_t index) {
        auto [tensor, begin] = blocks[index];
        int64_t count = std::min(kBlock, x.items[tensor].size() - begin);
        convert_all<To, From>(y.items[tensor].as<To>() + begin, x.items[tensor].as<From>() + begin, count);
      });
    });
  });
}

}  // namespace hstu::cpu
