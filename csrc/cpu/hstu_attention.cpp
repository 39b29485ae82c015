#include "hstu_attention.h"

#include "philox.h"

#include <numeric>
#include <vector>

namespace hstu::cpu {
namespace attention {

std::vector<Sequence> sequences(const Call& call) {
  int64_t count = call.sequences();
  const auto *keys = call.seq_offsets.as<int64_t>(), *queries = data_or_null<int64_t>(call.q_offsets);
  const auto *targets = data_or_null<int32_t>(call.num_targets), *contextual = data_or_null<int32_t>(call.contextual_lengths);
  const auto *cached = data_or_null<int32_t>(call.kv_lengths), *table = data_or_null<int32_t>(call.page_table);
  const auto *tables = data_or_null<int64_t>(call.page_offsets), *times = data_or_null<int64_t>(call.time_offsets);
  const int64_t* rows = queries ? queries : keys;
  HSTU_CHECK(keys[0] == 0 && keys[count] == call.k.shape[0] && rows[0] == 0 && rows[count] == call.q.shape[0], kInvalidArgument, call.op,
             ": seq_offsets and q_offsets must run from 0 to the rows of k (", call.k.shape[0], ") and q (", call.q.shape[0], ")");
  std::vector<Sequence> all(count);
  for (int64_t b = 0; b < count; ++b) {
    auto wants = [&](bool condition, auto... parts) {
      HSTU_CHECK(condition, kInvalidArgument, call.op, ": sequence ", b, " has ", parts...);
    };
    int64_t paged = cached ? cached[b] : 0, jagged = keys[b + 1] - keys[b], asked = rows[b + 1] - rows[b];
    int64_t length = paged + jagged, k = targets ? targets[b] : 0, c = contextual ? contextual[b] : call.contextual;
    wants(paged >= 0 && jagged >= 0 && asked >= 0, "offsets that decrease or a negative kv_length");
    wants(length <= call.max_seq_len, length, " keys, max_seq_len is ", call.max_seq_len);
    wants(asked <= length, asked, " queries but only ", length, " keys");
    wants(k >= 0 && k <= length, k, " targets but ", length, " keys");
    wants(c >= 0, c, " contextual tokens");
    if (times) {  // bounds first: a difference of values out of range may wrap
      int64_t end = call.key_time ? call.key_time->shape[0] : INT64_MAX;
      wants(times[b] >= 0 && times[b] <= times[b + 1] && times[b + 1] <= end, "time_offsets outside key_time");
      wants(times[b + 1] - times[b] == length, times[b + 1] - times[b], " key times but ", length, " keys");
    }
    if (paged > 0) {
      int64_t size = call.kv_pages->shape[2], pages = (paged + size - 1) / size;
      wants(tables[b] >= 0 && tables[b] <= tables[b + 1] && tables[b + 1] <= call.page_table->size(), "page_offsets outside page_table");
      wants(tables[b + 1] - tables[b] >= pages, tables[b + 1] - tables[b], " pages, but ", paged, " cached keys take ", pages);
      for (int64_t p = tables[b]; p < tables[b] + pages; ++p)
        wants(table[p] >= 0 && table[p] < call.kv_pages->shape[0], "page ", table[p], " of ", call.kv_pages->shape[0]);
    }
    MaskShape mask{length, std::min(c, length - k), length - k, call.max_attn_len, call.min_full_attn_seq_len,
                   call.target_group_size, call.causal, call.contextual_full};
    all[b] = {b, mask, rows[b], asked, length - asked, keys[b], paged, times ? times[b] : keys[b]};
  }
  return all;
}

template <typename T>
Bias<T>::Bias(const Call& call, const std::vector<Sequence>& all)
    : reach([&] {
        int64_t most = 0;
        for (const Sequence& s : all) most = std::max(most, s.mask.history);
        return most;
      }()),
      width(call.pos_w ? 2 * (reach + kPanel<T>) : 0),
      positions(call.pos_w ? call.pos_w->shape[1] : 0),
      last_bucket(call.time_w ? std::min<int64_t>(call.time_w->shape[1] - 1, kTimeThresholds) : -1),
      pos(call.pos_w ? call.pos_w->shape[0] * width : 0),
      time(call.time_w ? call.time_w->shape[0] * kBuckets : 0, true),
      per_head_pos(call.pos_w && call.pos_w->shape[0] > 1),
      per_head_time(call.time_w && call.time_w->shape[0] > 1) {
  for (int64_t r = 0; width && r < call.pos_w->shape[0]; ++r)
    for (int64_t x = 0; x < width; ++x)
      pos[r * width + x] = call.pos_w->as<T>()[r * positions + std::min(std::abs(x - reach), positions - 1)];
  for (int64_t r = 0; last_bucket >= 0 && r < call.time_w->shape[0]; ++r)
    std::copy_n(call.time_w->as<T>() + r * call.time_w->shape[1], last_bucket + 1, time + r * kBuckets);
}
template struct Bias<float>;
template struct Bias<double>;

// bucket(d) = floor(ln d / 0.301) for whole d, so a guess from below that is less than 1 off leaves one comparison: log2 d by the
// exponent and the mantissa's top bits (at most 0.09 too small) times 9432 / 4096, a little less than ln 2 / 0.301.
HSTU_CLONES static void time_buckets(uint8_t* __restrict out, int64_t query_time, const int64_t* __restrict key_time, int64_t n, int64_t last) {
  for (int64_t j = 0; j < n; ++j) {
    uint64_t a = uint64_t(query_time), b = uint64_t(key_time[j]), d = query_time > key_time[j] ? a - b : b - a;
    d = d > 1 ? d : 1;
    int64_t log = (std::bit_cast<int64_t>(double(d)) >> 32) - (int64_t(1023) << 20), guess = (log * 9432) >> 32;
    guess = guess < kTimeThresholds ? guess : kTimeThresholds - 1;
    int64_t bucket = guess + (d >= uint64_t(kTimeThreshold[guess]));
    out[j] = uint8_t(bucket < last ? bucket : last);
  }
}

void bucket_row(uint8_t* out, const Call& call, const Sequence& s, int64_t i, int64_t first, int64_t last, int64_t last_bucket) {
  const MaskShape& m = s.mask;
  int64_t begin = i < m.contextual ? last : std::clamp(m.contextual, first, last), end = std::max(begin, std::min(last, m.history));
  std::fill(out, out + begin - first, uint8_t(kZeroBucket));
  if (begin < end)
    time_buckets(out + begin - first, call.query_time->as<int64_t>()[s.query + i - s.shift],
                 call.key_time->as<int64_t>() + s.time + begin, end - begin, last_bucket);
  std::fill(out + end - first, out + last - first, uint8_t(kZeroBucket));
}

template <typename T>
void own_scores(T* out, const Call& call, const Sequence& s, const Bias<T>& bias, int64_t head, int64_t i, int64_t own, const T* q,
                const Rows<T>& keys) {
  const T *pos = bias.pos_row(s.mask, head, i), *time = bias.time_row(head);
  const int64_t* key_time = time ? call.key_time->as<int64_t>() + s.time : nullptr;
  for (int64_t j = own; j <= i; ++j) {
    T score = T(call.alpha) * dot<T>(q, keys.at(j), call.key_dim());
    if (pos) score += pos[s.mask.history];
    if (time) score += time[time_bucket(call.query_time->as<int64_t>()[s.query + i - s.shift], key_time[j], int(bias.last_bucket))];
    out[j - own] = score;
  }
}

template <typename T>
HSTU_CLONES T dot(const T* a, const T* b, int64_t n) {
  constexpr int kLanes = 64 / sizeof(T);
  T lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += a[i + l] * b[i + l];
  for (int l = 0; i + l < n; ++l) lane[l] += a[i + l] * b[i + l];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <typename T>
HSTU_CLONES void add_scaled(T* sum, T factor, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * x[i];
}

template <typename T>
HSTU_CLONES void score_row(T* __restrict s, T alpha, const T* __restrict pos, const T* __restrict time, const uint8_t* __restrict bucket, int64_t n) {
  if (pos && time)
    for (int64_t j = 0; j < n; ++j) s[j] = alpha * s[j] + pos[j] + time[bucket[j]];
  else if (pos)
    for (int64_t j = 0; j < n; ++j) s[j] = alpha * s[j] + pos[j];
  else if (time)
    for (int64_t j = 0; j < n; ++j) s[j] = alpha * s[j] + time[bucket[j]];
  else
    for (int64_t j = 0; j < n; ++j) s[j] = alpha * s[j];
}

template <typename T>
HSTU_CLONES static void keep_row(T* x, const uint32_t* words, uint32_t threshold, T keep_scale, int64_t n) {
  for (int64_t j = 0; j < n; ++j) x[j] = words[j] >= threshold ? x[j] * keep_scale : T(0);
}

template <typename T>
void drop(T* x, const Call& call, int64_t first, int64_t n, T keep_scale) {
  constexpr int64_t kWords = 256;
  uint32_t words[kWords], threshold = dropout_threshold(call.dropout);
  for (int64_t j = 0; j < n; j += kWords) {
    int64_t count = std::min(n - j, kWords);
    philox_words(words, first + j, count, uint64_t(call.seed), uint64_t(call.offset));
    keep_row<T>(x + j, words, threshold, keep_scale, count);
  }
}

#define HSTU_INSTANTIATE(T)                                                                                                   \
  template void own_scores<T>(T*, const Call&, const Sequence&, const Bias<T>&, int64_t, int64_t, int64_t, const T*, const Rows<T>&); \
  template T dot<T>(const T*, const T*, int64_t);                                                                            \
  template void add_scaled<T>(T*, T, const T*, int64_t);                                                                      \
  template void score_row<T>(T*, T, const T*, const T*, const uint8_t*, int64_t);                                             \
  template void drop<T>(T*, const Call&, int64_t, int64_t, T);
HSTU_INSTANTIATE(float)
HSTU_INSTANTIATE(double)
#undef HSTU_INSTANTIATE

namespace {

template <typename T>
HSTU_CLONES void silu_row(T* s, T alpha, const T* pos, const T* time, const uint8_t* bucket, int64_t n) {
  score_row<T>(s, alpha, pos, time, bucket, n);
  for (int64_t j = 0; j < n; ++j) s[j] = s[j] * vsigmoid(s[j]);
}
template void silu_row<float>(float*, float, const float*, const float*, const uint8_t*, int64_t);
template void silu_row<double>(double*, double, const double*, const double*, const uint8_t*, int64_t);

template <typename T>
HSTU_CLONES T row_max(const T* s, int64_t n) {
  T lane[kPanel<T>], most = -std::numeric_limits<T>::infinity();
  for (int l = 0; l < kPanel<T>; ++l) lane[l] = most;
  for (int64_t j = 0; j < n; j += kPanel<T>)
    for (int l = 0; l < kPanel<T>; ++l) lane[l] = s[j + l] > lane[l] ? s[j + l] : lane[l];
  for (int l = 0; l < kPanel<T>; ++l) most = lane[l] > most ? lane[l] : most;
  return most;
}
template float row_max<float>(const float*, int64_t);
template double row_max<double>(const double*, int64_t);

// s = exp(s - most), 0 where s is -infinity; returns the sum, by lanes of a panel so that skipped panels do not change its bits.
template <typename T>
HSTU_CLONES T exp_row(T* s, T most, int64_t n) {
  T lane[kPanel<T>] = {};
  for (int64_t j = 0; j < n; j += kPanel<T>)
    for (int l = 0; l < kPanel<T>; ++l) {
      T e = vexp(s[j + l] - most);
      s[j + l] = s[j + l] == -std::numeric_limits<T>::infinity() ? T(0) : e;
      lane[l] += s[j + l];
    }
  T sum = 0;
  for (int l = 0; l < kPanel<T>; ++l) sum += lane[l];
  return sum;
}
template float exp_row<float>(float*, float, int64_t);
template double exp_row<double>(double*, double, int64_t);

constexpr int64_t kTileRows = 24;    // query rows whose scores are in scratch at once: two micro-tiles; more rows waste more above the diagonal
constexpr int64_t kChunkRows = 240;  // query rows of a task, for which keys and values are packed once
constexpr int64_t kManyTasks = 64;   // from here on a task takes all heads, which then share the time buckets

struct Task {
  int64_t sequence, row, rows, head, heads, cost;
};

std::vector<Task> tasks_of(const Call& call, const std::vector<Sequence>& all, int64_t panel) {
  std::vector<Task> tasks;
  int64_t heads = call.heads();
  for (const Sequence& s : all) {
    int64_t chunks = (s.queries + kChunkRows - 1) / kChunkRows;
    int64_t rows = chunks ? ((s.queries + chunks - 1) / chunks + kTileRows - 1) / kTileRows * kTileRows : 0;
    for (int64_t row = 0; row < s.queries; row += rows) {
      int64_t count = std::min(rows, s.queries - row), i = s.shift + row;
      tasks.push_back({s.index, row, count, 0, heads, count * columns_of(s.mask, i, i + count, panel).count()});
    }
  }
  if (int64_t whole = int64_t(tasks.size()); heads > 1 && whole < kManyTasks) {
    for (Task& task : tasks) task.heads = 1;
    for (int64_t h = 1; h < heads; ++h)
      for (int64_t t = 0; t < whole; ++t) tasks.push_back(tasks[t]), tasks.back().head = h;
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

// One task: a chunk of query rows of one sequence, for some heads. Packs the keys and values that the chunk sees, [D, columns] and
// [columns, V]; then tile by tile: scores [rows, columns] by the micro-kernel, weights row by row in place, weights times values, and
// the targets' own groups last.
template <typename T>
void run_task(const Call& call, const Sequence& s, const Task& task, const Bias<T>& bias, T* out, T* lse) {
  constexpr int64_t kWidth = kPanel<T>;
  constexpr T kHidden = -std::numeric_limits<T>::infinity();
  const MaskShape& m = s.mask;
  bool softmax = call.softmax();
  int64_t H = call.heads(), D = call.key_dim(), V = call.value_dim(), padded = (V + kWidth - 1) / kWidth * kWidth;
  int64_t begin = s.shift + task.row, end = begin + task.rows;
  Columns chunk = columns_of(m, begin, end, kWidth);
  int64_t total = chunk.count(), ld = total + kWidth / 2, group = end > m.history ? std::min(m.group, end - m.history) : 0;
  Scratch<T> packed_keys(total * D), packed_values(total * padded), scores(kTileRows * ld), sums(kTileRows * padded), own(kTileRows * group);
  Scratch<uint8_t> buckets(bias.last_bucket >= 0 ? task.rows * total : 0);
  Rows<T> keys{nullptr, H * D}, values{nullptr, H * V};
  if (call.kv_pages) {
    const int64_t* shape = call.kv_pages->shape;
    keys.paged = values.paged = s.paged, keys.page_size = values.page_size = shape[2];
    keys.slot_stride = values.slot_stride = H * shape[4], keys.page_stride = values.page_stride = 2 * shape[2] * H * shape[4];
    keys.table = values.table = call.page_table->as<int32_t>() + call.page_offsets->as<int64_t>()[s.index];
  }
  for (int64_t head = task.head; head < task.head + task.heads; ++head) {
    keys.jagged = call.k.as<T>() + (s.key * H + head) * D, values.jagged = call.v.as<T>() + (s.key * H + head) * V;
    if (call.kv_pages) {
      int64_t size = call.kv_pages->shape[4];
      keys.pages = call.kv_pages->as<T>() + head * size, values.pages = keys.pages + keys.page_stride / 2;
    }
    pack_rows<T>(keys, chunk, m.history, D, packed_keys, nullptr);
    pack_rows<T>(values, chunk, m.history, V, nullptr, packed_values);
    for (int64_t i0 = begin; i0 < end; i0 += kTileRows) {
      int64_t rows = std::min(kTileRows, end - i0), row0 = s.query + i0 - s.shift;
      Columns c = columns_of(m, i0, i0 + rows, kWidth);
      const T* q = call.q.as<T>() + (row0 * H + head) * D;
      each_run(c, [&](int64_t first, int64_t last, int64_t column) {
        multiply<T>(scores + column, ld, {q, H * D, 1}, packed_keys + chunk.of(first) * D, rows, last - first, D, false);
      });
      T factors[kTileRows];
      for (int64_t r = 0; r < rows; ++r) {
        int64_t i = i0 + r;
        VisibleKeys seen = visible_keys(m, i);
        const T *pos = bias.pos_row(m, head, i), *time = bias.time_row(head);
        each_run(c, [&](int64_t first, int64_t last, int64_t column) {
          uint8_t* bucket = time ? buckets + (i - begin) * total + chunk.of(first) : nullptr;
          if (time && head == task.head) bucket_row(bucket, call, s, i, first, last, bias.last_bucket);
          auto* score = softmax ? score_row<T> : silu_row<T>;
          score(scores + r * ld + column, T(call.alpha), pos ? pos + first : nullptr, time, bucket, last - first);
          fill_hidden(scores + r * ld + column, seen, first, last, softmax ? kHidden : T(0));
        });
        T *row = scores + r * ld, *weights = own + r * group;
        int64_t count = i + 1 - seen.own;
        own_scores<T>(weights, call, s, bias, head, i, seen.own, q + r * H * D, keys);
        if (!softmax) {
          for (int64_t j = 0; j < count; ++j) weights[j] = weights[j] * vsigmoid(weights[j]);
          factors[r] = call.scales ? T(call.scales->as<float>()[row0 + r]) : T(call.scale);
          continue;
        }
        T most = row_max<T>(row, c.count());
        for (int64_t j = 0; j < count; ++j) most = std::max(most, weights[j]);
        T sum = exp_row<T>(row, most, c.count());
        for (int64_t j = 0; j < count; ++j) sum += weights[j] = vexp(weights[j] - most);
        factors[r] = sum > T(0) ? T(1) / (sum * T(1 - call.dropout)) : T(0);
        if (sum != sum) factors[r] = sum;
        if (lse) lse[(row0 + r) * H + head] = sum > T(0) || sum != sum ? most + std::log(sum) : kHidden;
        if (call.dropout > 0) {
          each_run(c, [&](int64_t first, int64_t last, int64_t column) {
            drop<T>(row + column, call, dropout_element(call, s, head, i, first), last - first, T(1));
          });
          drop<T>(weights, call, dropout_element(call, s, head, i, seen.own), count, T(1));
        }
      }
      if (c.count() == 0) std::fill(sums.get(), sums.get() + rows * padded, T(0));
      for (int64_t p = 0; p < padded; p += kWidth)
        each_run(c, [&](int64_t first, int64_t last, int64_t column) {
          multiply<T>(sums + p, padded, {scores + column, ld, 1}, packed_values + p * total + chunk.of(first) * kWidth, rows, kWidth,
                      last - first, column > 0);
        });
      for (int64_t r = 0; r < rows; ++r) {
        T *sum = sums + r * padded, *target = out + ((row0 + r) * H + head) * V;
        int64_t first = visible_keys(m, i0 + r).own;
        for (int64_t j = first; j <= i0 + r; ++j) add_scaled<T>(sum, own[r * group + j - first], values.at(j), V);
        for (int64_t x = 0; x < V; ++x) target[x] = factors[r] * sum[x];
      }
    }
  }
}

}  // namespace
}  // namespace attention

void hstu_attention(Tensor& out, Tensor* lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& seq_offsets,
                    const Tensor* q_offsets, const Tensor* num_targets, const Tensor* contextual_lengths, const Tensor* pos_w,
                    const Tensor* time_w, const Tensor* query_time, const Tensor* key_time, const Tensor* scales,
                    const Tensor* kv_pages, const Tensor* page_table, const Tensor* page_offsets, const Tensor* kv_lengths,
                    const Tensor* time_offsets, int64_t max_seq_len, int contextual, int max_attn_len, int min_full_attn_seq_len,
                    int target_group_size, bool causal, bool contextual_full, AttentionActivation activation, double alpha,
                    double scale, double dropout, int64_t seed, int64_t offset, bool, Stream) {
  using namespace attention;
  Call call{"hstu_attention", q, k, v, seq_offsets, q_offsets, num_targets, contextual_lengths, pos_w, time_w, query_time, key_time,
            scales, kv_pages, page_table, page_offsets, kv_lengths, time_offsets, max_seq_len, contextual, max_attn_len,
            min_full_attn_seq_len, target_group_size, causal, contextual_full, activation, alpha, scale, dropout, seed, offset};
  std::vector<Sequence> all = sequences(call);
  pick_float(call.op, q.dtype, [&](auto zero) {
    using T = decltype(zero);
    Bias<T> bias(call, all);
    std::vector<Task> tasks = tasks_of(call, all, kPanel<T>);
    parallel_for(int64_t(tasks.size()), [&](int64_t t) {
      run_task<T>(call, all[tasks[t].sequence], tasks[t], bias, out.as<T>(), data_or_null<T>(lse));
    });
  });
}

}  // namespace hstu::cpu
