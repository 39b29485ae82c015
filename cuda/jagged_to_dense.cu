#include <cmath>
#include <cstring>

#include "gather_rows.cuh"
#include "jagged.cuh"

namespace hstu::cuda {
namespace {

struct Padded {
  const char* x;
  const int64_t* offsets;
  int64_t length, bytes;
  __device__ const char* operator()(int64_t row) const {
    int64_t b = row / length, n = row % length, start = offsets[b];
    return n < offsets[b + 1] - start ? x + (start + n) * bytes : nullptr;
  }
};

// float32 rounded to odd, so that a second rounding to 16 bits is exact.
float to_odd(double x) {
  float nearest = float(x);
  if (double(nearest) == x) return nearest;
  float cut = std::fabs(double(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.f) : nearest;
  uint32_t bits;
  std::memcpy(&bits, &cut, sizeof bits);
  bits |= 1;
  std::memcpy(&cut, &bits, sizeof bits);
  return cut;
}

// Eight bytes that repeat the element's.
uint64_t pattern(Dtype dtype, double value) {
  auto repeated = [](auto element) {
    uint64_t bits = 0;
    for (size_t i = 0; i < 8; i += sizeof element) std::memcpy(reinterpret_cast<char*>(&bits) + i, &element, sizeof element);
    return bits;
  };
  switch (dtype) {
    case Dtype::kFloat32: return repeated(float(value));
    case Dtype::kFloat64: return repeated(value);
    case Dtype::kBFloat16: return std::isnan(value) ? repeated(uint16_t(0x7fc0)) : repeated(__float2bfloat16_rn(to_odd(value)));
    case Dtype::kFloat16: return std::isnan(value) ? repeated(uint16_t(0x7e00)) : repeated(__float2half_rn(to_odd(value)));
    case Dtype::kInt32: return repeated(int32_t(value));
    case Dtype::kInt64: break;
  }
  return repeated(int64_t(value));
}

}  // namespace

void jagged_to_dense(Tensor& y, const Tensor& x, const Tensor& seq_offsets, double padding, Stream stream) {
  check_offsets("jagged_to_dense", "seq_offsets", seq_offsets, x.shape[0], stream);
  Padded padded{x.as<char>(), seq_offsets.as<int64_t>(), y.shape[1], row_bytes(x)};
  gather_rows(y.data, y.shape[0] * padded.length, padded.bytes, padded, {x.data}, pattern(y.dtype, padding), stream);
}

}  // namespace hstu::cuda
