#include "gather_rows.cuh"
#include "jagged.cuh"

namespace hstu::cuda {
namespace {

struct Sums {
  const int64_t *a, *b;
  __device__ int64_t operator[](int64_t i) const { return a[i] + b[i]; }
};

// Row t of y, in sequence s: a's rows of s stand before its end a_offsets[s + 1] + b_offsets[s], b's from there on.
struct Joined {
  const char *a, *b;
  Sums offsets;
  int64_t batch, bytes;
  __device__ const char* operator()(int64_t t) const {
    int64_t s = sequence_of(offsets, batch, t), from_a = t - offsets.b[s];
    return from_a < offsets.a[s + 1] ? a + from_a * bytes : b + (t - offsets.a[s + 1]) * bytes;
  }
};

__global__ void add_offsets(int64_t* y, Sums sums, int64_t count) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) y[i] = sums[i];
}

}  // namespace

void concat(Tensor& y, Tensor& y_offsets, const Tensor& a, const Tensor& b, const Tensor& a_offsets, const Tensor& b_offsets,
            Stream stream) {
  check_offsets("concat", "a_offsets", a_offsets, a.shape[0], stream);
  check_offsets("concat", "b_offsets", b_offsets, b.shape[0], stream);
  Sums sums{a_offsets.as<int64_t>(), b_offsets.as<int64_t>()};
  launch(add_offsets, unsigned(ceil_div(a_offsets.size(), 256)), 256, 0, stream, y_offsets.as<int64_t>(), sums, a_offsets.size());
  Joined joined{a.as<char>(), b.as<char>(), sums, a_offsets.size() - 1, row_bytes(y)};
  gather_rows(y.data, y.shape[0], joined.bytes, joined, {a.data, b.data}, 0, stream);
}

}  // namespace hstu::cuda
