#include <algorithm>
#include <string>

#include "group_by.cuh"
#include "row_vector.cuh"

namespace hstu::cuda {
namespace {

constexpr int kMostTables = 4, kThreads = 256;

template <typename T>
struct Terms {
  const T* table[kMostTables];
  const int64_t* ids[kMostTables];
  int64_t rows[kMostTables];
  int count;
};

// A row of y belongs to 1, 2, 4 .. 32 neighbouring lanes, as many as it has vectors of kCount elements.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    embedding_sum_kernel(T* y, const __grid_constant__ Terms<T> terms, int64_t rows, int64_t d, int lanes) {
  int lane = threadIdx.x % lanes, rows_a_block = kThreads / lanes;
  int64_t step = int64_t(gridDim.x) * rows_a_block;
  for (int64_t t = int64_t(blockIdx.x) * rows_a_block + threadIdx.x / lanes; t < rows; t += step) {
    int64_t id[kMostTables];
    bool wrong = false;
#pragma unroll
    for (int n = 0; n < kMostTables; ++n) {
      id[n] = n < terms.count ? terms.ids[n][t] : -1;
      wrong |= id[n] < -1 || (n < terms.count && id[n] >= terms.rows[n]);
    }
    for (int64_t j = lane * kCount; j < d; j += lanes * kCount) {
      float sum[kCount] = {}, row[kCount];
      bool first = true;
#pragma unroll
      for (int n = 0; n < kMostTables; ++n) {
        if (id[n] < 0 || wrong) continue;
        load(row, terms.table[n] + id[n] * d + j);
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum[e] = first ? row[e] : to_float(from_float<T>(sum[e] + row[e]));
        first = false;
      }
      if (wrong)
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum[e] = __int_as_float(0x7fc00000);
      store(y + t * d + j, sum);
    }
  }
}

}  // namespace

void embedding_sum(Tensor& y, TensorList tables, TensorList ids, Stream stream) {
  size_t count = tables.items.size();
  HSTU_CHECK(count == ids.items.size(), kInvalidArgument, "embedding_sum: ", count, " tables, ids of ", ids.items.size());
  HSTU_CHECK(count >= 1 && count <= kMostTables, kInvalidArgument, "embedding_sum: 1 to ", kMostTables, " tables, got ", count);
  pick_dtype("embedding_sum", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = y.rows(), d = y.cols();
    Terms<T> terms{};
    terms.count = int(count);
    bool wide = aligned(y.as<T>(), d);
    for (size_t n = 0; n < count; ++n) {
      const Tensor &table = tables.items[n], &of = ids.items[n];
      check_ids("embedding_sum", message("ids[", n, "]").c_str(), of.as<int64_t>(), rows, -1, table.rows() - 1, stream);
      terms.table[n] = table.as<T>(), terms.ids[n] = of.as<int64_t>(), terms.rows[n] = table.rows();
      wide = wide && aligned(table.as<T>(), d);
    }
    if (rows == 0 || d == 0) return;
    pick_vector<T>(wide, [&](auto kCount) {
      int lanes = 1;
      while (lanes < 32 && lanes * kCount < d) lanes *= 2;
      launch(embedding_sum_kernel<T, kCount>, blocks_for(rows, kThreads / lanes, 1 << 20), dim3(kThreads), 0, stream, y.as<T>(), terms,
             rows, d, lanes);
    });
  });
}

}  // namespace hstu::cuda
