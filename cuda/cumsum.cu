#include "debug.cuh"
#include "scan.cuh"

namespace hstu::cuda {
namespace {

template <typename T>
void running_sum(Tensor& offsets, const Tensor& lengths, Stream stream) {
  if (debugging()) {
    std::vector<T> values = values_of<T>(lengths, stream);
    int64_t sum = 0;
    for (size_t b = 0; b < values.size(); ++b) {
      HSTU_CHECK(values[b] >= 0, kInvalidArgument, "cumsum: lengths[", b, "] = ", values[b], " is negative");
      HSTU_CHECK(!__builtin_add_overflow(sum, int64_t(values[b]), &sum), kInvalidArgument, "cumsum: the sum passes 2^63 at lengths[", b,
                 "] = ", values[b]);
    }
  }
  exclusive_scan<int64_t, T>(offsets.as<int64_t>(), lengths.as<T>(), lengths.size(), stream);
}

}  // namespace

void cumsum(Tensor& offsets, const Tensor& lengths, Stream stream) {
  if (lengths.dtype == Dtype::kInt32)
    running_sum<int32_t>(offsets, lengths, stream);
  else
    running_sum<int64_t>(offsets, lengths, stream);
}

}  // namespace hstu::cuda
