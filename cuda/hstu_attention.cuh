// What all kernels of HSTU attention share: one call's arguments, the geometry of a sequence, the visible keys of a row as intervals,
// scores, dropout bits.
//
// Positions fit in 32 bits, row offsets are 64-bit. A warp's scores stand in the accumulator layout of mma m16n8 (PTX ISA, "Matrix
// fragments for mma.m16n8k16"): with quad = lane / 4 and t = lane % 4, element [n][2 half + e] is row quad + 8 half, column 8 n + 2 t + e.
// float32 keeps that layout with 3xTF32 products, so that every kernel is written once.
#pragma once
#include <algorithm>
#include <climits>
#include <cstdlib>

#include "../csrc/mask.h"
#include "common.cuh"
#include "hstu_attention_check.cuh"
#include "mma.cuh"

namespace hstu::cuda::attention {

enum class Mode { kSilu, kSiluBias, kSoftmax };  // softmax takes a bias where there is one

// A bias table: float32, or of the dtype of q.
template <typename T>
struct Table {
  const void* data;
  bool wide;
  __device__ __forceinline__ float at(int64_t x) const { return value(bits(x)); }
  // The same in two steps: what waits for the load comes later.
  __device__ __forceinline__ uint32_t bits(int64_t x) const {
    return wide || sizeof(T) == 4 ? static_cast<const uint32_t*>(data)[x] : static_cast<const uint16_t*>(data)[x];
  }
  __device__ __forceinline__ float value(uint32_t bits) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(bits);
    uint16_t half = uint16_t(bits);
    return wide ? __uint_as_float(bits) : to_float(*reinterpret_cast<T*>(&half));
  }
};

template <typename T>
struct Call {
  const T *q, *k, *v;
  const int64_t *seq_offsets, *q_offsets;
  const int32_t *num_targets, *contextual_lengths;
  Table<T> pos_w, time_w;
  const int64_t *query_time, *key_time;
  const float* scales;
  const T* kv_pages;
  const int32_t* page_table;
  const int64_t* page_offsets;
  const int32_t* kv_lengths;
  const int64_t* time_offsets;
  uint64_t max_seq_len, seed, offset;
  int64_t time_width;  // NB + 1, the row of time_w
  int sequences, heads, key_dim, value_dim, page_size, page_width;
  int64_t page_count;
  int positions;    // P, 0 without a table
  int last_bucket;  // -1 without a table
  int contextual, max_attn_len, min_full, group;
  bool pos_per_head, time_per_head, causal, contextual_full;
  int key_piece, value_piece;  // bytes that rows of D, of V can be copied in: 16, 4 or 0
  float alpha, scale, keep_scale;
  float unit;  // of the scores in registers: 1 / 2 where silu goes by tanh, else 1
  uint32_t dropout;  // threshold of the Philox word, 0 without dropout
};

template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;
template <typename T, int kDim>
constexpr bool kPlain = kIsHalf<T> && (kDim == 64 || kDim == 128);  // has kernels of its own for silu without a bias

// The largest pieces that rows of `row` elements from `data` on fall into.
template <typename T>
int piece_of(const T* data, int64_t row) {
  uint64_t bits = uint64_t(row) * sizeof(T) | reinterpret_cast<uintptr_t>(data);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 0;
}

template <typename T>
Call<T> call_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& seq_offsets, const Tensor* q_offsets,
                const Tensor* num_targets, const Tensor* contextual_lengths, const Tensor* pos_w, const Tensor* time_w,
                const Tensor* query_time, const Tensor* key_time, const Tensor* scales, int64_t max_seq_len, int contextual,
                int max_attn_len, int min_full_attn_seq_len, int target_group_size, bool causal, bool contextual_full, bool softmax,
                double alpha, double scale, double dropout, int64_t seed, int64_t offset) {
  Call<T> p{};
  p.q = q.as<T>(), p.k = k.as<T>(), p.v = v.as<T>(), p.seq_offsets = seq_offsets.as<int64_t>();
  p.q_offsets = data_or_null<int64_t>(q_offsets), p.num_targets = data_or_null<int32_t>(num_targets);
  p.contextual_lengths = data_or_null<int32_t>(contextual_lengths);
  if (pos_w) p.pos_w = {pos_w->data, pos_w->dtype == Dtype::kFloat32};
  if (time_w) p.time_w = {time_w->data, time_w->dtype == Dtype::kFloat32};
  p.query_time = data_or_null<int64_t>(query_time), p.key_time = data_or_null<int64_t>(key_time), p.scales = data_or_null<float>(scales);
  p.max_seq_len = uint64_t(max_seq_len), p.seed = uint64_t(seed), p.offset = uint64_t(offset);
  p.sequences = int(seq_offsets.size() - 1), p.heads = int(q.shape[1]), p.key_dim = int(q.shape[2]), p.value_dim = int(v.shape[2]);
  p.positions = pos_w ? int(pos_w->shape[1]) : 0, p.pos_per_head = pos_w && pos_w->shape[0] > 1;
  p.time_width = time_w ? time_w->shape[1] : 0, p.time_per_head = time_w && time_w->shape[0] > 1;
  p.last_bucket = int(std::min<int64_t>(p.time_width - 1, kTimeThresholds));
  p.contextual = contextual, p.max_attn_len = max_attn_len, p.min_full = min_full_attn_seq_len, p.group = target_group_size;
  p.causal = causal, p.contextual_full = contextual_full;
  p.key_piece = std::min(piece_of(p.q, q.shape[2]), piece_of(p.k, q.shape[2])), p.value_piece = piece_of(p.v, v.shape[2]);
  p.unit = kIsHalf<T> && !softmax ? 0.5f : 1.f;
  p.alpha = float(alpha), p.scale = float(scale), p.keep_scale = float(1 / (1 - dropout)), p.dropout = dropout_threshold(dropout);
  return p;
}

// The smallest bucket that holds both head dims.
template <typename Fn>
void pick_dim(int64_t key_dim, int64_t value_dim, Fn&& fn) {
  int64_t dim = std::max(key_dim, value_dim);
  pick<32, 64, 128, 256>("head_dim", dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : dim <= 256 ? 256 : dim, fn);
}

// Bytes of shared memory a block may have: sm_90, sm_80, and the least of later ones (sm_86, sm_89, sm_120). HSTU_ATTENTION_SHARED_KB
// lowers what is taken for the device's, so that the tiles of smaller devices run on larger ones.
constexpr size_t kHopperShared = 227 << 10, kAmpereShared = 163 << 10, kLeastShared = 99 << 10;
inline size_t shared_limit() {
  static const size_t most = [] {
    const char* text = std::getenv("HSTU_ATTENTION_SHARED_KB");
    return text ? size_t(std::max(std::atoi(text), 0)) << 10 : SIZE_MAX;
  }();
  int device = 0, limit = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return std::min(most, size_t(limit));
}

// fn(mode): the kernel that a call takes. Silu without a bias has its own where that is worth it.
template <typename T, int kDim, typename Fn>
void pick_mode(bool softmax, bool bias, Fn&& fn) {
  if (softmax) return fn(std::integral_constant<Mode, Mode::kSoftmax>{});
  if constexpr (kPlain<T, kDim>)
    if (!bias) return fn(std::integral_constant<Mode, Mode::kSilu>{});
  fn(std::integral_constant<Mode, Mode::kSiluBias>{});
}

// ---- Geometry ----------------------------------------------------------------------------------------------------------------

struct Sequence {
  int index, length, queries, shift, history, contextual;  // query row r stands at key position shift + r
  int paged;                                               // keys that stand in pages
  int64_t query, key, time;                                // first row in q; in k and v; of key 0 in key_time
};

__device__ __forceinline__ int limited(int64_t x, int64_t most) { return int(max(int64_t(0), min(x, most))); }

// Values out of range, which HSTU_DEBUG=1 reports, are limited: no more than max_seq_len keys, no more queries or targets than keys.
template <typename T>
__device__ __forceinline__ Sequence sequence_of(const Call<T>& p, int b) {
  Sequence s;
  s.index = b;
  s.key = p.seq_offsets[b];
  int64_t keys = p.seq_offsets[b + 1] - s.key, queries = keys, most = min(p.max_seq_len, uint64_t(INT_MAX / 2));
  s.query = s.key;
  if (p.q_offsets) s.query = p.q_offsets[b], queries = p.q_offsets[b + 1] - s.query;
  s.paged = p.kv_lengths ? limited(p.kv_lengths[b], most) : 0;
  s.length = limited(s.paged + max(keys, int64_t(0)), most);
  s.queries = limited(queries, s.length);
  s.shift = s.length - s.queries;
  s.history = s.length - (p.num_targets ? limited(p.num_targets[b], s.length) : 0);
  s.contextual = limited(p.contextual_lengths ? p.contextual_lengths[b] : p.contextual, s.history);
  s.time = p.time_offsets ? p.time_offsets[b] : s.key;
  return s;
}

// History keys [0, prefix) and [begin, end), prefix < begin or prefix = 0; the own group of a target i is [own, i].
struct VisibleKeys {
  int prefix, begin, end, own;
  __device__ __forceinline__ bool has(int j) const { return j < prefix || (j >= begin && j < end); }
  __device__ __forceinline__ bool any(int first, int last) const { return (first < prefix) | ((first < end) & (last > begin)); }
  __device__ __forceinline__ bool all(int first, int last) const { return (last <= prefix) | ((first >= begin) & (last <= end)); }
  // Bit c: whether key first + c is seen.
  __device__ __forceinline__ uint64_t bits(int first) const {
    return below(prefix - first) | (below(end - first) & ~below(begin - first));
  }
  __device__ __forceinline__ uint32_t bits32(int first) const {
    return below32(prefix - first) | (below32(end - first) & ~below32(begin - first));
  }
  // What covers all that some lane's rows see, and what all of them see.
  __device__ __forceinline__ VisibleKeys any_of_warp() const {
    return {__reduce_max_sync(kFullWarp, prefix), __reduce_min_sync(kFullWarp, begin), __reduce_max_sync(kFullWarp, end), 0};
  }
  __device__ __forceinline__ VisibleKeys all_of_warp() const {
    return {__reduce_min_sync(kFullWarp, prefix), __reduce_max_sync(kFullWarp, begin), __reduce_min_sync(kFullWarp, end), 0};
  }
  static __device__ __forceinline__ uint32_t below32(int n) { return ~__funnelshift_lc(0, ~0u, max(n, 0)); }
  static __device__ __forceinline__ uint64_t below(int n) { return n >= 64 ? ~uint64_t(0) : n <= 0 ? 0 : (uint64_t(1) << n) - 1; }
};

// The interval form of visible() in mask.h.
template <typename T>
__device__ __forceinline__ VisibleKeys visible_keys(const Call<T>& p, const Sequence& s, int i) {
  bool target = i >= s.history;
  int own = target ? i - (i - s.history) % p.group : i + 1;
  if (!target && p.contextual_full && i < s.contextual) return {0, 0, s.history, own};
  int end = target || !p.causal ? s.history : i + 1;
  bool windowed = p.max_attn_len > 0 && (target ? p.min_full == 0 : i < int64_t(s.history) - p.min_full);
  if (!windowed) return {0, 0, end, own};
  int position = min(i, s.history), prefix = min(s.contextual, end);
  int64_t begin = int64_t(position) - p.max_attn_len, last = int64_t(position) + p.max_attn_len + 1;
  end = int(min(int64_t(end), last));
  if (begin <= prefix) return {0, 0, max(prefix, end), own};
  return {prefix, int(begin), end, own};
}

// Key tiles [0, gap) and [resume, last): the gap lies between what rows see as contextual and where the earliest window begins.
struct KeyTiles {
  int gap, resume, last;
  __device__ __forceinline__ int from(int n) const { return n == gap ? resume : n; }
  // Of `size` keys each, where `any` covers all that the rows see.
  static __device__ __forceinline__ KeyTiles of(VisibleKeys any, int size) {
    KeyTiles tiles{(any.prefix + size - 1) / size, any.end > 0 ? any.begin / size : 0, (any.end + size - 1) / size};
    tiles.last = max(tiles.last, tiles.gap);
    if (tiles.gap >= tiles.resume) tiles.gap = -1;
    return tiles;
  }
};

// What the query rows of a block see, in shared memory; a warp has kRows / kWarps rows in turn.
template <int kRows, int kWarps>
struct SeenKeys {
  VisibleKeys row[kRows], any[kWarps], all[kWarps];  // any, all: tiles that some or all rows of a warp see

  template <typename T>
  __device__ __forceinline__ void stage(const Call<T>& p, const Sequence& s, int i0, int rows) {
    constexpr int kEach = kRows / kWarps;
    static_assert(kEach <= 32);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = warp * kEach + lane;
    VisibleKeys keys{0, 0, 0, i0 + r + 1}, some{0, INT_MAX, 0, 0}, every{INT_MAX, 0, INT_MAX, 0};
    if (lane < kEach) {
      if (r < rows) keys = visible_keys(p, s, i0 + r);
      row[r] = every = keys;
      some.prefix = keys.prefix;
      if (keys.begin < keys.end) some.begin = keys.begin, some.end = keys.end;
    }
    some = some.any_of_warp(), every = every.all_of_warp();
    if (lane == 0) any[warp] = some, all[warp] = every;
  }
  // After a barrier.
  __device__ __forceinline__ KeyTiles tiles(int size) const {
    VisibleKeys some = any[0];
    for (int w = 1; w < kWarps; ++w)
      some = {max(some.prefix, any[w].prefix), min(some.begin, any[w].begin), max(some.end, any[w].end), 0};
    return KeyTiles::of(some, size);
  }
};

// Rows of one head's keys or values by key position.
template <typename T>
struct Rows {
  const T* jagged;  // of key position `paged`
  const T* pages;
  const int32_t* table;
  int64_t stride, page_stride, slot_stride;
  int paged, page_size;

  __device__ __forceinline__ const T* at(int j) const {
    if (j >= paged) return jagged + (j - paged) * stride;
    return pages + table[j / page_size] * page_stride + j % page_size * slot_stride;
  }
};

template <typename T>
__device__ __forceinline__ Rows<T> rows_of(const Call<T>& p, const Sequence& s, int head, const T* data, int dim, bool values) {
  Rows<T> rows{data + (s.key * p.heads + head) * dim, nullptr, nullptr, int64_t(p.heads) * dim, 0, 0, s.paged, 1};
  if (p.kv_pages) {
    rows.page_size = p.page_size;
    rows.slot_stride = int64_t(p.heads) * p.page_width;
    rows.page_stride = 2 * p.page_size * rows.slot_stride;
    rows.pages = p.kv_pages + int64_t(head) * p.page_width + (values ? rows.page_stride / 2 : 0);
    rows.table = p.page_table + p.page_offsets[s.index];
  }
  return rows;
}

// ---- Scores ------------------------------------------------------------------------------------------------------------------

// <a, b> in float32 by the four lanes of a quad, known to all of them. Every lane of the warp takes part; inactive quads get 0.
template <typename T>
__device__ __forceinline__ float quad_dot(const T* a, const T* b, int n, bool active) {
  float sum = 0;
  if (active)
    for (int x = threadIdx.x % 4; x < n; x += 4) sum = fmaf(to_float(a[x]), to_float(b[x]), sum);
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  return sum + __shfl_xor_sync(kFullWarp, sum, 2);
}

// float32 keeps the exact functions; the others round the weight to 8 or 11 bits.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (!kIsHalf<T>) return expf(x);
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
// silu(s) from the score in registers: s, or s / 2 for the 16-bit types, where silu(s) = s / 2 (1 + tanh(s / 2)) is one instruction of the
// special function unit.
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
template <typename T>
__device__ __forceinline__ float weight_of(float score) {
  if constexpr (kIsHalf<T>) return fmaf(score, tanh_approx(score), score);
  return score / (1.f + expf(-score));
}

template <typename T>
__device__ __forceinline__ bool kept(const Call<T>& p, int b, int head, int i, int j) {
  uint64_t element = ((uint64_t(b) * p.heads + head) * p.max_seq_len + i) * p.max_seq_len + j;
  Philox4 four = philox4x32(p.seed, p.offset + element / 4);
  uint32_t low = element & 1 ? four.word[1] : four.word[0], high = element & 1 ? four.word[3] : four.word[2];
  return (element & 2 ? high : low) >= p.dropout;  // no indexing: that would put the words in local memory
}

// Bit 2 n + e: whether dropout keeps column 8 n + 2 t + e of this thread's row, pair(column) giving query and key. The loop stays a loop:
// ten rounds for each column would be most of a kernel's code.
template <int kN, typename T, typename Element>
__device__ __forceinline__ uint32_t kept_columns(const Call<T>& p, int b, int head, Element&& element) {
  if (!p.dropout) return ~0u;
  uint32_t bits = 0;
#pragma unroll 1
  for (int x = 0; x < 2 * kN; ++x) {
    int2 pair = element(x / 2 * 8 + int(threadIdx.x % 4) * 2 + x % 2);
    bits |= uint32_t(kept(p, b, head, pair.x, pair.y)) << x;
  }
  return bits;
}

constexpr float kInfinity = __builtin_huge_valf();

}  // namespace hstu::cuda::attention
