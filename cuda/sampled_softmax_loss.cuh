// What the two directions of sampled_softmax_loss share: where the negatives come from and the scores of one row.
#pragma once
#include "softmax.cuh"

namespace hstu::cuda {

constexpr float kCollision = -5e4f;  // logit of a negative that is the positive
constexpr int kRowThreads = 128;     // a warp owns a row

// Negatives of position t: drawn, or ids [T, count], or ids [count] shared by all.
struct Negatives {
  Negatives(const Tensor* given, int64_t count, int64_t first, int64_t items, int64_t seed, int64_t offset, const Tensor* base)
      : ids(data_or_null<int64_t>(given)), shared(given && given->rank == 1), count(count), first(first), items(items),
        seed(uint64_t(seed)), offset{uint64_t(offset), data_or_null<int64_t>(base)} {}

  __device__ __forceinline__ int64_t operator()(int64_t t, int64_t r) const {
    if (ids) return ids[shared ? r : t * count + r];
    const uint64_t index = uint64_t(t * count + r);
    const Philox4 block = philox4x32(seed, offset + index / 4);
    const uint32_t low = index % 2 ? block.word[1] : block.word[0], high = index % 2 ? block.word[3] : block.word[2];
    return random_id(index % 4 < 2 ? low : high, first, items - first);
  }

  const int64_t* ids;
  bool shared;
  int64_t count, first, items;
  uint64_t seed;
  DrawOffset offset;
};

template <int kVector, typename T>
__device__ __forceinline__ void load_vector(float (&x)[kVector], const T* from) {
  constexpr int kBytes = kVector * sizeof(T);
  using Word = std::conditional_t<kBytes == 16, uint4,
                                  std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  static_assert(sizeof(Word) == kBytes);
  union {
    Word word;
    uint16_t halves[kBytes / 2];
    uint32_t words[(kBytes + 3) / 4];
  } value;
  value.word = *reinterpret_cast<const Word*>(from);
#pragma unroll
  for (int n = 0; n < kVector; ++n) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) x[n] = __bfloat162float(__ushort_as_bfloat16(value.halves[n]));
    else if constexpr (std::is_same_v<T, __half>) x[n] = __half2float(__ushort_as_half(value.halves[n]));
    else x[n] = __uint_as_float(value.words[n]);
  }
}

// <query, item> of the item that each lane of the warp names. Eight lanes read a row together and eight rows at a time, so that a load
// takes whole sectors and eight are under way; the exchange at the end adds eight sums up in seven shuffles and leaves each with the lane
// that named it. The order of addition is the same for all of them.
template <typename T, int kVector>
__device__ __forceinline__ float dots(const T* query, const T* table, int64_t dims, int32_t item) {
  const int lane = threadIdx.x % 32, sub = lane % 8;
  const T* rows[8];
  float sums[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    rows[j] = table + int64_t(__shfl_sync(kFullWarp, item, lane - sub + j)) * dims;
    sums[j] = 0.f;
  }
  for (int64_t c = sub * kVector; c < dims; c += 8 * kVector) {
    float q[kVector];
    load_vector(q, query + c);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float x[kVector];
      load_vector(x, rows[j] + c);
#pragma unroll
      for (int n = 0; n < kVector; ++n) sums[j] = fmaf(q[n], x[n], sums[j]);
    }
  }
#pragma unroll
  for (int half = 4; half > 0; half /= 2)
#pragma unroll
    for (int j = 0; j < half; ++j) {
      bool upper = sub & half;
      float keep = upper ? sums[j + half] : sums[j], send = upper ? sums[j] : sums[j + half];
      sums[j] = keep + __shfl_xor_sync(kFullWarp, send, half);
    }
  return sums[0];
}

// Elements of a load: 16 bytes, a pair or one, as the rows' alignment allows. fn(std::integral_constant<int, elements>).
template <typename T, typename Fn>
void pick_vector(int64_t dims, const void* a, const void* b, Fn&& fn) {
  uintptr_t bits = uintptr_t(dims * sizeof(T)) | reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  if (bits % 16 == 0) return fn(std::integral_constant<int, 16 / sizeof(T)>{});
  if (bits % (2 * sizeof(T)) == 0) return fn(std::integral_constant<int, 2>{});
  fn(std::integral_constant<int, 1>{});
}

// What the kernels over rows read.
template <typename T>
struct SampledInputs {
  const T *query, *table;
  const float* factors;
  const int64_t* positive_ids;
  const float* weights;
  const int32_t* positions;
  const LossTotals* totals;
  int64_t dims;
  float scale;  // 1 / temperature
  Negatives negatives;
};

// The log-sum-exp of a row, by its warp: element 0 is the positive, element 1 + r negative r. visit(element, id, logit) sees each once,
// 32 at a time, element 32 n + l by lane l; `positive` becomes the logit of element 0. An id that names no item scores NaN, so that the
// loss tells of it, and stands as the first item.
template <int kVector, typename T, typename Visit>
__device__ __forceinline__ RowSum score_row(const SampledInputs<T>& in, int64_t position, float& positive, Visit&& visit) {
  const int lane = threadIdx.x % 32;
  const Negatives& negatives = in.negatives;
  int64_t positive_id = in.positive_ids[position];
  RowSum row{0.f, 0.f};
  for (int64_t first = 0; first <= negatives.count; first += 32) {
    int64_t element = first + lane;
    int64_t id = element == 0 || element > negatives.count ? positive_id : negatives(position, element - 1);
    bool known = id >= negatives.first && id < negatives.items;
    int32_t item = int32_t(known ? id : negatives.first);
    float logit = dots<T, kVector>(in.query + position * in.dims, in.table, in.dims, item);
    logit = known ? logit * factor_of(in.factors, item) * in.scale : NAN;
    if (first == 0) positive = __shfl_sync(kFullWarp, logit, 0), row = {positive, 0.f};
    if (element > negatives.count) continue;
    if (element > 0) {
      if (id == positive_id) logit = kCollision;
      row.absorb(logit);
    }
    visit(element, item, logit);
  }
  __syncwarp();
  row.rescale(warp_max(row.maximum));
  row.others = warp_sum(row.others);
  return row;
}

}  // namespace hstu::cuda
