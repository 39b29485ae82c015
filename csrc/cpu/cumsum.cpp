#include "../check.h"
#include "../ops.h"

namespace hstu::cpu {
namespace {

template <typename T>
void running_sum(int64_t* offsets, const T* lengths, int64_t count) {
  offsets[0] = 0;
  for (int64_t b = 0; b < count; ++b) {
    HSTU_CHECK(lengths[b] >= 0, kInvalidArgument, "cumsum: lengths[", b, "] = ", lengths[b], " is negative");
    HSTU_CHECK(!__builtin_add_overflow(offsets[b], int64_t(lengths[b]), &offsets[b + 1]), kInvalidArgument,
               "cumsum: the sum passes 2^63 at lengths[", b, "] = ", lengths[b]);
  }
}

}  // namespace

void cumsum(Tensor& offsets, const Tensor& lengths, Stream) {
  if (lengths.dtype == Dtype::kInt32)
    running_sum(offsets.as<int64_t>(), lengths.as<int32_t>(), lengths.size());
  else
    running_sum(offsets.as<int64_t>(), lengths.as<int64_t>(), lengths.size());
}

}  // namespace hstu::cpu
