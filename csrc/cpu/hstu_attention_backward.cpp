#include <numeric>
#include <vector>

#include "hstu_attention.h"

namespace hstu::cpu {
namespace attention {
namespace {

constexpr int64_t kTileRows = 48;      // query rows at once
constexpr int64_t kBlockPanels = 8;    // key panels at once: scores and their gradients, [48, 256] each, stay in the second-level cache
constexpr int kLanes = 8;              // copies of the time histogram, so that runs of one bucket do not wait for their own stores
constexpr int64_t kPending = 1 << 17;  // pairs added to a float32 histogram before it goes to float64

// p = silu(s) into s, dp silu'(s) into dp.
template <typename T>
HSTU_CLONES void silu_row(T* s, T* dp, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    T x = s[j], g = vsigmoid(x), p = x * g;
    s[j] = p;
    dp[j] = dp[j] * (g + p * (T(1) - g));
  }
}
template void silu_row<float>(float*, float*, int64_t);
template void silu_row<double>(double*, double*, int64_t);

// p = exp(s - lse) into s, p (dp - delta) into dp.
template <typename T>
HSTU_CLONES void softmax_row(T* s, T* dp, T lse, T delta, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    T p = vexp(s[j] - lse);
    s[j] = p;
    dp[j] = p * (dp[j] - delta);
  }
}
template void softmax_row<float>(float*, float*, float, float, int64_t);
template void softmax_row<double>(double*, double*, double, double, int64_t);

template <typename T>
HSTU_CLONES void scale_row(T* y, T factor, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = factor * x[i];
}
template void scale_row<float>(float*, float, const float*, int64_t);
template void scale_row<double>(double*, double, const double*, int64_t);

// Sums of dS by position difference and by time bucket for one (sequence, head): near in T, total in float64.
template <typename T>
class TableGradient {
 public:
  TableGradient(const MaskShape& mask, int64_t positions, double* pos, int64_t buckets, double* time)
      : history_(mask.history), positions_(positions), buckets_(buckets), pos_total_(pos), time_total_(time),
        diagonal_(pos ? 2 * (history_ + kPanel<T>) : 0, true), near_(time ? kBuckets * kLanes : 0, true) {}

  // Row i against keys [first, first + n), bias position pi.
  void add_pos(const T* ds, int64_t pi, int64_t first, int64_t n) {
    if (pos_total_) add_scaled<T>(diagonal_ + history_ - pi + first, T(1), ds, n);
  }
  void add_time(const T* ds, const uint8_t* bucket, int64_t n) {
    if (!time_total_ || n <= 0) return;
    for (int64_t j = 0; j < n; ++j) near_[bucket[j] * kLanes + j % kLanes] += ds[j];
    if ((pending_ += n) > kPending) flush_time();
  }
  void flush() {
    for (int64_t x = -history_; pos_total_ && x <= history_; ++x)
      pos_total_[std::min(std::abs(x), positions_ - 1)] += diagonal_[history_ + x];
    flush_time();
  }

 private:
  void flush_time() {
    for (int64_t bucket = 0; time_total_ && bucket < buckets_; ++bucket)
      for (int lane = 0; lane < kLanes; ++lane) time_total_[bucket] += near_[bucket * kLanes + lane];
    if (time_total_) std::fill(near_.get(), near_ + kBuckets * kLanes, T(0));
    pending_ = 0;
  }

  int64_t history_, positions_, buckets_, pending_ = 0;
  double *pos_total_, *time_total_;
  Scratch<T> diagonal_, near_;
};

// The gradients of one call; dtables are this (sequence, head)'s own sums.
template <typename T>
struct Gradients {
  T *dq, *dk, *dv;
  const T *dout, *out, *lse;
};

// One task: one head of one sequence, whose rows of dq, dk and dv it owns. Packs K^T, V^T and K once; for each tile of query rows and
// block of keys recomputes scores, then dQ += dS K, dK += dS^T Q, dV += P^T dO, where dO has scale_i folded in. Sums stand in padded
// scratch; alpha is applied when they are written. The targets' own groups are added pair by pair.
template <typename T>
void run_head(const Call& call, const Sequence& s, int64_t head, const Bias<T>& bias, const Gradients<T>& g, TableGradient<T>& tables) {
  constexpr int64_t kWidth = kPanel<T>, kBlock = kBlockPanels * kWidth;
  const MaskShape& m = s.mask;
  bool softmax = call.softmax(), dropped = softmax && call.dropout > 0;
  int64_t H = call.heads(), D = call.key_dim(), V = call.value_dim(), L = m.length;
  int64_t wide_d = (D + kWidth - 1) / kWidth * kWidth, wide_v = (V + kWidth - 1) / kWidth * kWidth;
  Columns all = columns_of(m, s.shift, L, kWidth);
  int64_t total = all.count(), ld = kBlock + kWidth / 2;
  Rows<T> keys{call.k.as<T>() + (s.key * H + head) * D, H * D}, values{call.v.as<T>() + (s.key * H + head) * V, H * V};
  Scratch<T> keys_t(total * D), values_t(total * V), keys_plain(total * wide_d);
  pack_rows<T>(keys, all, m.history, D, keys_t, keys_plain);
  pack_rows<T>(values, all, m.history, V, values_t, nullptr);
  Scratch<T> dk((L + kWidth) * wide_d, true), dv((L + kWidth) * wide_v, true), dq(kTileRows * wide_d);
  Scratch<T> weights(kTileRows * ld), ds(kTileRows * ld), dout(kTileRows * V), packed_q(kTileRows * wide_d), packed_dout(kTileRows * wide_v);
  Scratch<T> own(std::min(m.group, L - m.history));
  Scratch<uint8_t> buckets(bias.last_bucket >= 0 ? kTileRows * kBlock : 0);
  T delta[kTileRows] = {}, lse[kTileRows] = {}, keep_scale = T(1 / (1 - call.dropout));

  for (int64_t i0 = s.shift; i0 < L; i0 += kTileRows) {
    int64_t rows = std::min(kTileRows, L - i0), row0 = s.query + i0 - s.shift;
    Columns c = columns_of(m, i0, i0 + rows, kWidth);
    const T* q = call.q.as<T>() + (row0 * H + head) * D;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t at = (row0 + r) * H + head;
      T scale = softmax ? T(1) : call.scales ? T(call.scales->as<float>()[row0 + r]) : T(call.scale);
      scale_row<T>(dout + r * V, scale, g.dout + at * V, V);
      if (softmax) delta[r] = dot<T>(g.dout + at * V, g.out + at * V, V), lse[r] = g.lse[at];
    }
    pack<T>(packed_q, {q, H * D, 1}, rows, D);
    pack<T>(packed_dout, {dout, V, 1}, rows, V);
    std::fill(dq.get(), dq + rows * wide_d, T(0));

    auto block = [&](int64_t first, int64_t count) {
      multiply<T>(weights, ld, {q, H * D, 1}, keys_t + all.of(first) * D, rows, count, D, false);
      multiply<T>(ds, ld, {dout, V, 1}, values_t + all.of(first) * V, rows, count, V, false);
      for (int64_t r = 0; r < rows; ++r) {
        int64_t i = i0 + r, last = first + count;
        VisibleKeys seen = visible_keys(m, i);
        const T *pos = bias.pos_row(m, head, i), *time = bias.time_row(head);
        T *weight = weights + r * ld, *d = ds + r * ld;
        uint8_t* bucket = time ? buckets + r * kBlock : nullptr;
        if (time) bucket_row(bucket, call, s, i, first, last, bias.last_bucket);
        score_row<T>(weight, T(call.alpha), pos ? pos + first : nullptr, time, bucket, count);
        int64_t element = dropout_element(call, s, head, i, first);
        if (dropped) drop<T>(d, call, element, count, keep_scale);
        if (softmax) softmax_row<T>(weight, d, lse[r], delta[r], count);
        else silu_row<T>(weight, d, count);
        if (dropped) drop<T>(weight, call, element, count, keep_scale);
        fill_hidden(weight, seen, first, last, T(0));
        fill_hidden(d, seen, first, last, T(0));
        tables.add_pos(d, mask_position(m, i), first, count);
        int64_t begin = std::clamp(seen.begin, first, last), end = std::clamp(seen.end, first, last);
        if (time) tables.add_time(d + begin - first, bucket + begin - first, end - begin);
      }
      for (int64_t p = 0; p < wide_d; p += kWidth)
        multiply<T>(dq + p, wide_d, {ds, ld, 1}, keys_plain + p * total + all.of(first) * kWidth, rows, kWidth, count, true);
      multiply<T>(dk + first * wide_d, wide_d, {ds, 1, ld}, packed_q, count, wide_d, rows, true);
      multiply<T>(dv + first * wide_v, wide_v, {weights, 1, ld}, packed_dout, count, wide_v, rows, true);
    };
    each_run(c, [&](int64_t first, int64_t last, int64_t) {
      for (; first < last; first += kBlock) block(first, std::min(kBlock, last - first));
    });

    for (int64_t r = 0; r < rows; ++r) {
      int64_t i = i0 + r, first = visible_keys(m, i).own;
      const T *query = q + r * H * D, *gradient = dout + r * V;
      own_scores<T>(own, call, s, bias, head, i, first, query, keys);
      for (int64_t j = first; j <= i; ++j) {
        T weight = own[j - first], d = dot<T>(gradient, values.at(j), V);
        int64_t element = dropout_element(call, s, head, i, j);
        if (dropped) drop<T>(&d, call, element, 1, keep_scale);
        if (softmax) softmax_row<T>(&weight, &d, lse[r], delta[r], 1);
        else silu_row<T>(&weight, &d, 1);
        if (dropped) drop<T>(&weight, call, element, 1, keep_scale);
        add_scaled<T>(dq + r * wide_d, d, keys.at(j), D);
        add_scaled<T>(dk + j * wide_d, d, query, D);
        add_scaled<T>(dv + j * wide_v, weight, gradient, V);
        tables.add_pos(&d, m.history, m.history, 1);
        if (bias.last_bucket < 0) continue;
        const auto *query_time = call.query_time->as<int64_t>(), *key_time = call.key_time->as<int64_t>();
        uint8_t bucket = uint8_t(time_bucket(query_time[row0 + r], key_time[s.time + j], int(bias.last_bucket)));
        tables.add_time(&d, &bucket, 1);
      }
      scale_row<T>(g.dq + ((row0 + r) * H + head) * D, T(call.alpha), dq + r * wide_d, D);
    }
  }
  for (int64_t j = 0; j < L; ++j) {
    scale_row<T>(g.dk + ((s.key + j) * H + head) * D, T(call.alpha), dk + j * wide_d, D);
    std::copy_n(dv + j * wide_v, V, g.dv + ((s.key + j) * H + head) * V);
  }
  tables.flush();
}

}  // namespace
}  // namespace attention

void hstu_attention_backward(Tensor& dq, Tensor& dk, Tensor& dv, Tensor* dpos_w, Tensor* dtime_w, const Tensor& dout, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor* out, const Tensor* lse, const Tensor& seq_offsets,
                             const Tensor* q_offsets, const Tensor* num_targets, const Tensor* contextual_lengths, const Tensor* pos_w,
                             const Tensor* time_w, const Tensor* query_time, const Tensor* key_time, const Tensor* scales,
                             int64_t max_seq_len, int contextual, int max_attn_len, int min_full_attn_seq_len, int target_group_size,
                             bool causal, bool contextual_full, AttentionActivation activation, double alpha, double scale,
                             double dropout, int64_t seed, int64_t offset, bool, Stream) {
  using namespace attention;
  Call call{"hstu_attention_backward", q, k, v, seq_offsets, q_offsets, num_targets, contextual_lengths, pos_w, time_w, query_time,
            key_time, scales, nullptr, nullptr, nullptr, nullptr, nullptr, max_seq_len, contextual, max_attn_len,
            min_full_attn_seq_len, target_group_size, causal, contextual_full, activation, alpha, scale, dropout, seed, offset};
  std::vector<Sequence> all = sequences(call);
  HSTU_CHECK(!call.softmax() || (out && lse), kInvalidArgument, call.op, ": softmax wants out and lse");
  pick_float(call.op, q.dtype, [&](auto zero) {
    using T = decltype(zero);
    Bias<T> bias(call, all);
    Gradients<T> gradients{dq.as<T>(), dk.as<T>(), dv.as<T>(), dout.as<T>(), data_or_null<T>(out), data_or_null<T>(lse)};
    int64_t H = call.heads(), B = call.sequences(), times = bias.last_bucket + 1;
    // Each (sequence, head) has its own sums; of positions only those it can reach.
    std::vector<int64_t> reached(B), start(B + 1, 0), order(B * H);
    for (int64_t b = 0; b < B; ++b) {
      reached[b] = std::min(bias.positions, all[b].mask.history + 1);
      start[b + 1] = start[b] + reached[b] * H;
    }
    Scratch<double> pos_sums(start[B], true), time_sums(B * H * times, true);
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return all[x / H].mask.length > all[y / H].mask.length; });
    parallel_for(B * H, [&](int64_t n) {
      int64_t b = order[n] / H, head = order[n] % H;
      TableGradient<T> tables(all[b].mask, bias.positions, dpos_w ? pos_sums + start[b] + head * reached[b] : nullptr, times,
                              dtime_w ? time_sums + order[n] * times : nullptr);
      run_head<T>(call, all[b], head, bias, gradients, tables);
    });
    // Over sequences in order, then over heads where they share a table.
    auto reduce = [&](Tensor& table, int64_t entries, auto sum_at) {
      T* target = table.as<T>();
      int64_t shared = table.shape[0] > 1 ? 1 : H;
      parallel_blocks(table.size(), 256, [&](int64_t begin, int64_t end) {
        for (int64_t x = begin; x < end; ++x) {
          int64_t row = x / entries, entry = x % entries;
          double sum = 0;
          for (int64_t b = 0; b < B; ++b)
            for (int64_t head = row; head < row + shared; ++head) sum += sum_at(b, head, entry);
          target[x] = T(sum);
        }
      });
    };
    if (dpos_w) reduce(*dpos_w, dpos_w->shape[1], [&](int64_t b, int64_t head, int64_t p) {
      return p < reached[b] ? pos_sums[start[b] + head * reached[b] + p] : 0.0;
    });
    if (dtime_w) reduce(*dtime_w, dtime_w->shape[1], [&](int64_t b, int64_t head, int64_t t) {
      return t < times ? time_sums[(b * H + head) * times + t] : 0.0;
    });
  });
}

}  // namespace hstu::cpu
