#include <algorithm>

#include "gather_rows.cuh"
#include "group_by.cuh"
#include "packed.cuh"

namespace hstu::cuda {
namespace {

// An id that is no row reads nothing: its row becomes NaN, so that the mistake shows without HSTU_DEBUG too.
constexpr int kMostTables = 4;
struct Lookups {
  const char* tables[kMostTables];
  char* y[kMostTables];
  int64_t bytes[kMostTables];
  const int64_t* ids;
  int64_t count, rows;
};

// Rows of table blockIdx.y; each belongs to `lanes` neighbouring lanes, as in gather_rows.
template <typename Word>
__global__ void __launch_bounds__(kGatherThreads) lookup_kernel(const __grid_constant__ Lookups p, int lanes, Word padding) {
  int lane = threadIdx.x % lanes, rows_a_block = kGatherThreads / lanes;
  int64_t words = p.bytes[blockIdx.y] / int64_t(sizeof(Word)), step = int64_t(gridDim.x) * rows_a_block;
  const Word* table = reinterpret_cast<const Word*>(p.tables[blockIdx.y]);
  Word* y = reinterpret_cast<Word*>(p.y[blockIdx.y]);
  for (int64_t t = int64_t(blockIdx.x) * rows_a_block + threadIdx.x / lanes; t < p.count; t += step) {
    int64_t id = p.ids[t];
    bool there = id >= 0 && id < p.rows;
#pragma unroll 4
    for (int64_t i = lane; i < words; i += lanes) y[t * words + i] = there ? __ldg(table + id * words + i) : padding;
  }
}

uint64_t nan_pattern(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return 0x7fc000007fc00000;
  return dtype == Dtype::kBFloat16 ? 0x7fc07fc07fc07fc0 : 0x7e007e007e007e00;
}

constexpr int kWarps = 4;
constexpr int64_t kChunk = 1024;  // rows of dy in one partial sum of a row of dtable

// A warp adds the rows of dy at order[begin .. end), in this order, to kN columns a lane. 32 positions are fetched at once and handed
// round; the loads of the rows do not wait for each other.
template <int kN, typename T>
__device__ __forceinline__ void add_rows(float (&sum)[kN], const T* dy, const uint32_t* order, int64_t begin, int64_t end, int64_t d,
                                         int64_t column) {
  int lane = threadIdx.x % 32;
  for (int64_t k = begin; k < end; k += 32) {
    int count = end - k < 32 ? int(end - k) : 32;
    uint32_t own = lane < count ? order[k + lane] : 0;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      int64_t t = __shfl_sync(kFullWarp, own, i);
      if (column < d) {
        Vector<T, kN> row = load<kN>(dy + t * d + column);
#pragma unroll
        for (int j = 0; j < kN; ++j) sum[j] += to_float(row.at[j]);
      }
    }
  }
}

// Rows of dtable with more than kChunk occurrences are summed in chunks beforehand, so that one id may take every position. Their
// chunks are found without a list: cut the order in windows of kChunk; in each begins at most one first chunk of a long row (which
// then holds the window's last position) and at most one later chunk (whose row holds the window's first position). A warp owns 32 kN
// columns of one such slot, partial[2 window + is first]; slots without a chunk stay unwritten and unread.
template <typename T, int kN>
__global__ void __launch_bounds__(kWarps * 32, 8) sum_long_rows(float* partial, const T* dy, const int64_t* ids, const int64_t* starts,
                                                             const uint32_t* order, int64_t slots, int64_t rows, int64_t d,
                                                             int64_t strips) {
  int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, slot = warp / strips;
  int64_t column = (warp % strips * 32 + threadIdx.x % 32) * kN;
  if (slot >= slots) return;
  bool is_first = slot % 2 == 1;
  int64_t window = slot / 2 * kChunk, probe = is_first ? window + kChunk - 1 : window;
  if (probe >= starts[rows]) return;
  int64_t row = ids[order[probe]], start = starts[row], end = starts[row + 1];
  if (end - start <= kChunk || (start >= window) != is_first) return;
  int64_t begin = is_first ? start : start + (window - start + kChunk - 1) / kChunk * kChunk;
  if (begin >= end) return;
  float sum[kN] = {};
  add_rows<kN>(sum, dy, order, begin, begin + kChunk < end ? begin + kChunk : end, d, column);
  if (column >= d) return;
  Vector<float, kN> result;
#pragma unroll
  for (int j = 0; j < kN; ++j) result.at[j] = sum[j];
  store(partial + slot * d + column, result);
}

// A warp owns 32 kN columns of one row of dtable.
template <typename T, int kN>
__global__ void __launch_bounds__(kWarps * 32, 8) sum_rows(T* dtable, const T* dy, const float* partial, const int64_t* starts,
                                                        const uint32_t* order, int64_t rows, int64_t d, int64_t strips) {
  int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, row = warp / strips;
  int64_t column = (warp % strips * 32 + threadIdx.x % 32) * kN;
  if (row >= rows) return;
  int64_t start = starts[row], end = starts[row + 1], chunks = (end - start + kChunk - 1) / kChunk;
  float sum[kN] = {};
  if (chunks <= 1) {
    add_rows<kN>(sum, dy, order, start, end, d, column);
  } else if (column < d) {
#pragma unroll 8
    for (int64_t c = 0; c < chunks; ++c) {
      Vector<float, kN> part = load<kN>(partial + (2 * (start / kChunk + c) + (c == 0)) * d + column);
#pragma unroll
      for (int j = 0; j < kN; ++j) sum[j] += part.at[j];
    }
  }
  if (column >= d) return;
  Vector<T, kN> result;
#pragma unroll
  for (int j = 0; j < kN; ++j) result.at[j] = from_float<T>(sum[j]);
  store(dtable + row * d + column, result);
}

}  // namespace

void embedding(TensorList y, TensorList tables, const Tensor& ids, Stream stream) {
  size_t count = tables.items.size();
  HSTU_CHECK(count == y.items.size() && count > 0, kInvalidArgument, "embedding: ", count, " tables, ", y.items.size(), " outputs");
  int64_t rows = tables.items[0].rows();
  check_ids("embedding", "ids", ids.as<int64_t>(), ids.size(), 0, rows - 1, stream);
  for (size_t first = 0; first < count; first += kMostTables) {
    Lookups p{};
    unsigned here = unsigned(std::min<size_t>(kMostTables, count - first));
    uintptr_t bits = 0;
    int64_t most = 0;
    for (unsigned n = 0; n < here; ++n) {
      const Tensor &table = tables.items[first + n], &to = y.items[first + n];
      p.tables[n] = table.as<char>(), p.y[n] = to.as<char>(), p.bytes[n] = ids.size() > 0 ? to.size() / ids.size() * size_of(to.dtype) : 0;
      bits |= reinterpret_cast<uintptr_t>(table.data) | reinterpret_cast<uintptr_t>(to.data) | uintptr_t(p.bytes[n]);
      most = std::max(most, p.bytes[n]);
    }
    p.ids = ids.as<int64_t>(), p.count = ids.size(), p.rows = rows;
    if (p.count == 0 || most == 0) continue;
    pick_word(bits, nan_pattern(y.items[0].dtype), [&](auto word) {
      int lanes = lanes_for(most / int64_t(sizeof word));
      dim3 blocks = blocks_for(p.count, kGatherThreads / lanes, 1 << 20);
      blocks.y = here;
      launch(lookup_kernel<decltype(word)>, blocks, kGatherThreads, 0, stream, p, lanes, word);
    });
  }
}

void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& ids, Stream stream) {
  pick_dtype("embedding_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = dtable.rows(), d = dtable.cols(), count = ids.size();
    check_ids("embedding_backward", "ids", ids.as<int64_t>(), count, 0, rows - 1, stream);
    if (rows == 0 || d == 0) return;
    Groups groups = group_by_id(ids.as<int64_t>(), count, rows, stream);
    int64_t slots = count > kChunk ? 2 * ceil_div(count, kChunk) : 0;
    Scratch<float> partial(slots * d, stream);
    const int64_t* starts = groups.starts;
    const uint32_t* order = groups.order;
    pick_width<T>(d, {dtable.as<T>(), dy.as<T>()}, [&](auto kN) {
      int64_t strips = ceil_div(d, 32 * kN);
      launch(sum_long_rows<T, kN>, unsigned(ceil_div(slots * strips, kWarps)), kWarps * 32, 0, stream, partial.get(), dy.as<T>(),
             ids.as<int64_t>(), starts, order, slots, rows, d, strips);
      launch(sum_rows<T, kN>, unsigned(ceil_div(rows * strips, kWarps)), kWarps * 32, 0, stream, dtable.as<T>(), dy.as<T>(),
             partial.get(), starts, order, rows, d, strips);
    });
  });
}

}  // namespace hstu::cuda
