#include "gather_rows.cuh"
#include "jagged.cuh"

namespace hstu::cuda {
namespace {

// Row t of a part, in its sequence s, stands in y after the rows of the other part up to others[s + before]: a's sequence s follows
// b's first s sequences, b's sequence s follows a's first s + 1.
struct Part {
  const char* y;
  const int64_t *own, *others;
  int64_t batch, bytes;
  int before;
  __device__ const char* operator()(int64_t t) const { return y + (t + others[sequence_of(own, batch, t) + before]) * bytes; }
};

}  // namespace

void split(Tensor& a, Tensor& b, const Tensor& y, const Tensor& a_offsets, const Tensor& b_offsets, Stream stream) {
  check_offsets("split", "a_offsets", a_offsets, a.shape[0], stream);
  check_offsets("split", "b_offsets", b_offsets, b.shape[0], stream);
  const int64_t *first = a_offsets.as<int64_t>(), *second = b_offsets.as<int64_t>();
  int64_t batch = a_offsets.size() - 1, bytes = row_bytes(y);
  gather_rows(a.data, a.shape[0], bytes, Part{y.as<char>(), first, second, batch, bytes, 0}, {y.data}, 0, stream);
  gather_rows(b.data, b.shape[0], bytes, Part{y.as<char>(), second, first, batch, bytes, 1}, {y.data}, 0, stream);
}

}  // namespace hstu::cuda
