// What the forward and the backward of HSTU attention on the CPU share: the geometry of a sequence, the visible keys of a row as
// intervals, packed keys, the bias of a row, dropout bits.
//
// Key columns come in panels of kPanel keys counted from key 0 of the sequence; the last panel of the history is zero-filled and a
// target's own group is never in one. A row's score, weight and output are FMA chains over ascending columns, with zeros where
// the row does not see, so that neither the tiles nor the neighbours of a row can change its bits.
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "../dispatch.h"
#include "../mask.h"
#include "../ops.h"
#include "gemm.h"
#include "vector_math.h"

namespace hstu::cpu::attention {

// The tensors and numbers of one call that both passes have, under their names in ops.h.
struct Call {
  const char* op;
  const Tensor &q, &k, &v, &seq_offsets;
  const Tensor *q_offsets, *num_targets, *contextual_lengths, *pos_w, *time_w, *query_time, *key_time, *scales;
  const Tensor *kv_pages, *page_table, *page_offsets, *kv_lengths, *time_offsets;
  int64_t max_seq_len;
  int contextual, max_attn_len, min_full_attn_seq_len, target_group_size;
  bool causal, contextual_full;
  AttentionActivation activation;
  double alpha, scale, dropout;
  int64_t seed, offset;

  int64_t sequences() const { return seq_offsets.size() - 1; }
  int64_t heads() const { return q.shape[1]; }
  int64_t key_dim() const { return q.shape[2]; }
  int64_t value_dim() const { return v.shape[2]; }
  bool softmax() const { return activation == AttentionActivation::kSoftmax; }
};

struct Sequence {
  int64_t index;
  MaskShape mask;
  int64_t query, queries;  // first row in q, number of rows; they stand at key positions shift ..
  int64_t shift;
  int64_t key;             // first row in k and v; holds key position `paged`
  int64_t paged;           // keys that stand in pages
  int64_t time;            // of key 0 in key_time
};

// Reads and checks the geometry of every sequence.
std::vector<Sequence> sequences(const Call& call);

// History keys [0, prefix) and [begin, end), prefix < begin or prefix = 0; the own group of a target i is [own, i].
struct VisibleKeys {
  int64_t prefix, begin, end, own;
};

inline VisibleKeys visible_keys(const MaskShape& m, int64_t i) {
  bool target = i >= m.history;
  int64_t own = target ? i - (i - m.history) % m.group : i + 1;
  if (!target && m.contextual_full && i < m.contextual) return {0, 0, m.history, own};
  int64_t end = target || !m.causal ? m.history : i + 1;
  bool windowed = m.max_attn_len > 0 && (target ? m.min_full == 0 : i < m.history - m.min_full);
  if (!windowed) return {0, 0, end, own};
  int64_t position = mask_position(m, i), prefix = std::min(m.contextual, end), begin = position - m.max_attn_len;
  end = std::min(end, position + m.max_attn_len + 1);
  if (begin <= prefix) return {0, 0, std::max(prefix, end), own};
  return {prefix, begin, end, own};
}

// Whole panels of keys that cover what some rows see: [0, first) and [begin, end). Columns of scratch number them without the gap.
struct Columns {
  int64_t first = 0, begin = 0, end = 0;
  int64_t count() const { return first + end - begin; }
  int64_t of(int64_t key) const { return key < first ? key : key - begin + first; }
};

// Rows i0 .. i1 - 1 in key positions.
inline Columns columns_of(const MaskShape& m, int64_t i0, int64_t i1, int64_t panel) {
  int64_t prefix = 0, begin = std::numeric_limits<int64_t>::max(), end = 0;
  for (int64_t i = i0; i < i1; ++i) {
    VisibleKeys keys = visible_keys(m, i);
    prefix = std::max(prefix, keys.prefix);
    if (keys.begin < keys.end) begin = std::min(begin, keys.begin), end = std::max(end, keys.end);
  }
  if (end == 0) return {};
  Columns c{(prefix + panel - 1) / panel * panel, begin / panel * panel, (end + panel - 1) / panel * panel};
  if (c.first >= c.begin) c.first = c.begin = 0;
  return c;
}

// body(first key, last key, first column) for each of the one or two runs.
template <typename Body>
void each_run(const Columns& c, Body&& body) {
  if (c.first > 0) body(int64_t(0), c.first, int64_t(0));
  if (c.begin < c.end) body(c.begin, c.end, c.first);
}

// Rows of one head's keys or values by key position.
template <typename T>
struct Rows {
  const T* jagged;  // of key position `paged`
  int64_t stride;
  int64_t paged = 0, page_size = 1, page_stride = 0, slot_stride = 0;
  const T* pages = nullptr;
  const int32_t* table = nullptr;

  const T* at(int64_t j) const {
    if (j >= paged) return jagged + (j - paged) * stride;
    return pages + table[j / page_size] * page_stride + j % page_size * slot_stride;
  }
  // Distance of neighbouring rows in [j, j + count), 0 where it is not one.
  int64_t step(int64_t j, int64_t count) const {
    if (j >= paged) return stride;
    return j + count <= paged && j % page_size + count <= page_size ? slot_stride : 0;
  }
};

// Packs the keys of `columns` that are history for `multiply`: transposed as [dim, columns], plain as [columns, dim]; either may be null.
template <typename T>
void pack_rows(const Rows<T>& rows, const Columns& columns, int64_t history, int64_t dim, T* transposed, T* plain) {
  constexpr int64_t kWidth = kPanel<T>;
  int64_t total = columns.count();
  T copy[kWidth * 256];
  each_run(columns, [&](int64_t first, int64_t last, int64_t column) {
    for (int64_t j = first; j < last; j += kWidth, column += kWidth) {
      int64_t count = std::min(kWidth, history - j), step = rows.step(j, count);
      const T* source = rows.at(j);
      if (step == 0) {
        for (int64_t n = 0; n < count; ++n) std::copy_n(rows.at(j + n), dim, copy + n * dim);
        source = copy, step = dim;
      }
      if (transposed) pack<T>(transposed + column * dim, {source, 1, step}, dim, count);
      for (int64_t p = 0; plain && p < dim; p += kWidth) {
        T* panel = plain + p * total + column * kWidth;
        pack<T>(panel, {source + p, step, 1}, count, std::min(kWidth, dim - p));
        std::fill(panel + count * kWidth, panel + kWidth * kWidth, T(0));
      }
    }
  });
}

constexpr int kZeroBucket = kTimeThresholds + 1;  // of a pair without a time term; its entry in Bias::time is 0
constexpr int kBuckets = kZeroBucket + 1;

// The bias tables of a call laid out for rows. pos: [Hr][2 reach + kPanel], entry reach + j - pos(i), so that a row reads it along j.
// time: [Hr][kBuckets].
template <typename T>
struct Bias {
  int64_t reach = 0, width, positions, last_bucket;
  Scratch<T> pos, time;
  bool per_head_pos, per_head_time;

  Bias(const Call& call, const std::vector<Sequence>& all);
  // Indexed by key position.
  const T* pos_row(const MaskShape& m, int64_t head, int64_t i) const {
    return width ? pos + (per_head_pos ? head * width : 0) + reach - mask_position(m, i) : nullptr;
  }
  const T* time_row(int64_t head) const { return last_bucket < 0 ? nullptr : time + (per_head_time ? head * kBuckets : 0); }
};

// Time buckets of row i against keys [first, last) of the history, then kZeroBucket for the rest of the panel.
void bucket_row(uint8_t* out, const Call& call, const Sequence& s, int64_t i, int64_t first, int64_t last, int64_t last_bucket);

// Scores of a row's own group [own, i]: out[j - own].
template <typename T>
void own_scores(T* out, const Call& call, const Sequence& s, const Bias<T>& bias, int64_t head, int64_t i, int64_t own, const T* q,
                const Rows<T>& keys);

template <typename T>
T dot(const T* a, const T* b, int64_t n);
template <typename T>
void add_scaled(T* sum, T factor, const T* x, int64_t n);  // sum += factor x

// s = alpha s + pos + time[bucket] over n columns (whole panels); pos and time may be null.
template <typename T>
void score_row(T* s, T alpha, const T* pos, const T* time, const uint8_t* bucket, int64_t n);

// Sets `value` where the row does not see, in the run of keys [first, last) whose columns begin at s.
template <typename T>
void fill_hidden(T* s, const VisibleKeys& keys, int64_t first, int64_t last, T value) {
  int64_t a = std::max(first, keys.prefix), b = std::min(last, keys.begin);
  if (a < b) std::fill(s + a - first, s + b - first, value);
  a = std::max(first, std::max(keys.prefix, keys.end));
  if (a < last) std::fill(s + a - first, s + last - first, value);
}

// x[n] *= 1 where dropout keeps element first + n of the call's draw, else 0; times `keep_scale`.
template <typename T>
void drop(T* x, const Call& call, int64_t first, int64_t n, T keep_scale);

inline int64_t dropout_element(const Call& call, const Sequence& s, int64_t head, int64_t i, int64_t j) {
  return ((s.index * call.heads() + head) * call.max_seq_len + i) * call.max_seq_len + j;
}

}  // namespace hstu::cpu::attention
