#include "gather_rows.cuh"
#include "jagged.cuh"

namespace hstu::cuda {
namespace {

struct Packed {
  const char* y;
  const int64_t* offsets;
  int64_t batch, length, bytes;
  __device__ const char* operator()(int64_t t) const {
    int64_t b = sequence_of(offsets, batch, t), n = t - offsets[b];
    return n < length ? y + (b * length + n) * bytes : nullptr;
  }
};

}  // namespace

void dense_to_jagged(Tensor& x, const Tensor& y, const Tensor& seq_offsets, Stream stream) {
  check_offsets("dense_to_jagged", "seq_offsets", seq_offsets, x.shape[0], stream);
  Packed packed{y.as<char>(), seq_offsets.as<int64_t>(), seq_offsets.size() - 1, y.shape[1], row_bytes(x)};
  gather_rows(x.data, x.shape[0], packed.bytes, packed, {y.data}, 0, stream);
}

}  // namespace hstu::cuda
