#include <cmath>
#include <limits>

#include "../ops.h"
#include "jagged.h"

namespace hstu::cpu {
namespace {

// The bits of x in a 16-bit float with this many exponent and fraction bits, rounded once to nearest even.
uint16_t narrow(double x, int exponent_bits, int fraction_bits) {
  uint64_t infinity = ((uint64_t(1) << exponent_bits) - 1) << fraction_bits, bits = 0;
  if (std::isnan(x)) {
    bits = infinity | uint64_t(1) << (fraction_bits - 1);
  } else if (std::isinf(x)) {
    bits = infinity;
  } else if (x != 0) {
    int lowest = 2 - (1 << (exponent_bits - 1)), exponent;
    std::frexp(x, &exponent);
    exponent = std::max(exponent - 1, lowest);
    // A fraction that rounds up to the next power of two carries into the exponent.
    bits = uint64_t(exponent - lowest) << fraction_bits;
    bits = std::min(infinity, bits + uint64_t(std::nearbyint(std::ldexp(std::fabs(x), fraction_bits - exponent))));
  }
  return uint16_t(bits | uint64_t(std::signbit(x)) << 15);
}

// Eight bytes that repeat the element's, so that padding is copied without a look at the dtype.
uint64_t pattern(Dtype dtype, double value) {
  auto repeated = [](auto element) {
    uint64_t bits = 0;
    for (size_t i = 0; i < 8; i += sizeof element) std::memcpy(reinterpret_cast<char*>(&bits) + i, &element, sizeof element);
    return bits;
  };
  switch (dtype) {
    case Dtype::kFloat32: return repeated(float(value));
    case Dtype::kFloat64: return repeated(value);
    case Dtype::kBFloat16: return repeated(narrow(value, 8, 7));
    case Dtype::kFloat16: return repeated(narrow(value, 5, 10));
    case Dtype::kInt32: return repeated(int32_t(value));
    case Dtype::kInt64: break;
  }
  return repeated(int64_t(value));
}

void fill(char* y, int64_t bytes, uint64_t pattern) {
  for (; bytes >= 8; bytes -= 8, y += 8) std::memcpy(y, &pattern, 8);
  std::memcpy(y, &pattern, bytes);
}

}  // namespace

void jagged_to_dense(Tensor& y, const Tensor& x, const Tensor& seq_offsets, double padding, Stream) {
  const int64_t* offsets = check_offsets("jagged_to_dense", "seq_offsets", seq_offsets, x.shape[0]);
  int64_t length = y.shape[1], bytes = row_bytes(x);
  uint64_t padded = pattern(y.dtype, padding);
  parallel_blocks(y.shape[0] * length, row_grain(bytes), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t sequence = begin / length, start = sequence * length, stop = std::min(end, start + length);
      int64_t filled = std::clamp(start + offsets[sequence + 1] - offsets[sequence], begin, stop);
      std::memcpy(y.as<char>() + begin * bytes, x.as<char>() + (offsets[sequence] + begin - start) * bytes, (filled - begin) * bytes);
      fill(y.as<char>() + filled * bytes, (stop - filled) * bytes, padded);
      begin = stop;
    }
  });
}

}  // namespace hstu::cpu
