// THE CONTRACT. One HSTU_OP(name, parameters) an op: the signature is the metadata from which the binder and the generated
// TypeScript types are made. Tensor& is an output (in place where the line above says so), Tensor* an optional output,
// const Tensor& an input, const Tensor* an optional input, everything else a value; Stream comes last. Ops write all of every
// output, never allocate outputs, never synchronise and keep no state.
//
// Letters: B sequences, T total tokens (Tq, Tk where queries and keys differ), N maximum length, H heads, D query/key head dim,
// V value head dim, d model width, I items, R negatives, M candidates, P pages, S page size, L length of one sequence.
// F = float32 | float64 (CPU), float32 | bfloat16 | float16 (CUDA). All F tensors of a call share one dtype unless said otherwise.
// seq_offsets: int64 [B + 1], non-decreasing, first 0, last T; empty sequences are legal, and so is B = 0.
// seed, offset: the key and the first counter of a Philox draw; base int64 [1] or null is added to offset, so that a captured step draws
// anew at each replay.
#pragma once
#include <array>
#include <cstdint>

#include "tensor.h"

#define HSTU_HIDDEN __attribute__((visibility("hidden")))
#define HSTU_OP(name, ...)                                       \
  namespace hstu {                                               \
  namespace cpu HSTU_HIDDEN { void name(__VA_ARGS__); }          \
  namespace cuda HSTU_HIDDEN { void name(__VA_ARGS__); }         \
  namespace parameters { constexpr char name[] = #__VA_ARGS__; } \
  }

namespace hstu {
enum class Activation : int { kNone, kSilu, kRelu, kGelu };
enum class AttentionActivation : int { kSilu, kSoftmax };

// The strings that an enum crosses the binder as, in the enum's order.
template <typename E>
struct EnumNames;
template <>
struct EnumNames<Activation> {
  static constexpr std::array<const char*, 4> values = {"none", "silu", "relu", "gelu"};
};
template <>
struct EnumNames<AttentionActivation> {
  static constexpr std::array<const char*, 2> values = {"silu", "softmax"};
};
}  // namespace hstu

// ---- Attention -------------------------------------------------------------------------------------------------------------

// s_ij = alpha <q_i, k_j> + R_ij;  silu: out_i = scale_i sum_j M_ij silu(s_ij) v_j;  softmax: P = softmax of s over visible j,
// inverted dropout on P, no scale.  R_ij = pos_w[min(|pos(i) - pos(j)|, P - 1)] + time_w[min(bucket(|tq_i - tk_j|), NB)],
// the time term only where i >= C and j >= C: contextual tokens have no time.
// out, v: [Tq, H, V] and [Tk, H, V]; q [Tq, H, D], k [Tk, H, D], F.  lse [Tq, H] float32 or 64: log-sum-exp, softmax only (else null).
// seq_offsets: keys.  q_offsets int64 [B + 1]: rows where queries are fewer than keys (delta: the last Lq rows), else null.
// num_targets int32 [B] (K).  contextual_lengths int32 [B] overrides the number `contextual` (C).
// pos_w [Hr, P], time_w [Hr, NB + 1], F or float32, Hr = 1 or H, either may be null; query_time int64 [Tq] and key_time int64 [Tk] go with
// time_w.  scales float32 [Tq] overrides the number `scale`.
// Paged history: kv_pages [pages, 2, S, H, max(D, V)] F, page_table int32 in CSR form by page_offsets int64 [B + 1], kv_lengths
// int32 [B]. Sequence b then has kv_lengths[b] history keys in its pages, followed by the rows of k, v that seq_offsets gives; key
// positions count through both. key_time stays jagged over all keys, by time_offsets int64 [B + 1].
// max_attn_len W (0 = off), min_full_attn_seq_len F, target_group_size g >= 1. D, V <= 256. A row that sees nothing gives 0.
// dropout in [0, 1): softmax only; element ((b H + h) N + i) N + j of the Philox draw, N = max_seq_len (the longest key length).
// deterministic: a row's bits do not depend on the batch; else CUDA may sum up its keys in parts, the same ones from run to run.
HSTU_OP(hstu_attention, Tensor& out, Tensor* lse, const Tensor& q, const Tensor& k, const Tensor& v,
        const Tensor& seq_offsets, const Tensor* q_offsets, const Tensor* num_targets, const Tensor* contextual_lengths,
        const Tensor* pos_w, const Tensor* time_w, const Tensor* query_time, const Tensor* key_time, const Tensor* scales,
        const Tensor* kv_pages, const Tensor* page_table, const Tensor* page_offsets, const Tensor* kv_lengths,
        const Tensor* time_offsets, int64_t max_seq_len, int contextual, int max_attn_len, int min_full_attn_seq_len,
        int target_group_size, bool causal, bool contextual_full, AttentionActivation activation, double alpha, double scale,
        double dropout, int64_t seed, int64_t offset, bool deterministic, Stream stream)

// dq, dk, dv like q, k, v; dpos_w, dtime_w float32 (float64 with float64 inputs) like the tables, present exactly where the table is.
// out and lse as the forward wrote them (softmax only, else null). No paged history: a cache takes no gradient. deterministic: the
// same bits run to run (the CPU always is).
HSTU_OP(hstu_attention_backward, Tensor& dq, Tensor& dk, Tensor& dv, Tensor* dpos_w, Tensor* dtime_w, const Tensor& dout,
        const Tensor& q, const Tensor& k, const Tensor& v, const Tensor* out, const Tensor* lse, const Tensor& seq_offsets,
        const Tensor* q_offsets, const Tensor* num_targets, const Tensor* contextual_lengths, const Tensor* pos_w,
        const Tensor* time_w, const Tensor* query_time, const Tensor* key_time, const Tensor* scales, int64_t max_seq_len,
        int contextual, int max_attn_len, int min_full_attn_seq_len, int target_group_size, bool causal, bool contextual_full,
        AttentionActivation activation, double alpha, double scale, double dropout, int64_t seed, int64_t offset,
        bool deterministic, Stream stream)

// ---- KV cache (no gradient) --------------------------------------------------------------------------------------------------
// As hstu_attention reads it: kv_pages [pages, 2, S, H, max(D, V)] F, K then V; page_table int32 [n]; page_offsets int64 [B + 1], where a
// sequence's pages begin in page_table; kv_lengths int32 [B], the tokens that its pages hold. The token at position x stands in slot
// x % S of the sequence's page x / S; the last page is partly full. A page may belong to several sequences.

// Puts the rows of new tokens after those that the pages hold: row r of sequence b goes to position kv_lengths[b] + r.  kv_pages in place,
// k [T, H, D], v [T, H, V] of each layer, jagged by seq_offsets: no other slot is written, nor a column of a slot beyond D of K and V of V.
// counts int32 [B] or null: only the first counts[b] rows of a sequence are new, at most those that it has.
// A page outside the tensor, a sequence with too few pages or one page written twice throws (CPU; CUDA under HSTU_DEBUG, else rows
// without a page are left out, and which of two writers a slot keeps is not said).
HSTU_OP(kv_append, TensorList kv_pages, TensorList k, TensorList v, const Tensor& seq_offsets, const Tensor& page_table,
        const Tensor& page_offsets, const Tensor& kv_lengths, const Tensor* counts, Stream stream)

// Reads tokens back: row r of sequence b is position r.  k [T, H, D], v [T, H, V], jagged by seq_offsets, of at most kv_lengths[b] rows a
// sequence. More rows, or a page outside the tensor, throw (CPU; CUDA under HSTU_DEBUG, else such rows are 0).
HSTU_OP(kv_gather, Tensor& k, Tensor& v, const Tensor& kv_pages, const Tensor& seq_offsets, const Tensor& page_table,
        const Tensor& page_offsets, const Tensor& kv_lengths, Stream stream)

// ---- Dense -----------------------------------------------------------------------------------------------------------------

// y = activation(x w + bias) + residual.  x [T, in], w [in, out], bias [out], residual, y [T, out], F.
// z [T, out]: the value before the activation, wanted by the backward of every activation but none.
HSTU_OP(linear, Tensor& y, Tensor* z, const Tensor& x, const Tensor& w, const Tensor* bias, const Tensor* residual,
        Activation activation, Stream stream)

// dz = dy activation'(z);  dx = dz w^T, dw = x^T dz, dbias = sum over rows of dz. The residual's gradient is dy itself.
HSTU_OP(linear_backward, Tensor* dx, Tensor* dw, Tensor* dbias, const Tensor& dy, const Tensor& x, const Tensor& w,
        const Tensor* z, Activation activation, Stream stream)

// z = LN(x) w + bias, split by columns as u [T, H, V], v [T, H, V], q [T, H, D], k [T, H, D];  silu on all four, or on u alone
// where silu_all is false.  x [T, d], w [d, 2 H V + 2 H D], bias [2 H V + 2 H D], norm_weight and norm_bias [d] (both or neither).
// z [T, 2 H V + 2 H D]: before SiLU, wanted by the backward.
HSTU_OP(norm_linear_silu, Tensor& u, Tensor& v, Tensor& q, Tensor& k, Tensor* z, const Tensor& x, const Tensor& w,
        const Tensor* bias, const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool silu_all, Stream stream)

HSTU_OP(norm_linear_silu_backward, Tensor& dx, Tensor& dw, Tensor* dbias, Tensor* dnorm_weight, Tensor* dnorm_bias,
        const Tensor& du, const Tensor& dv, const Tensor& dq, const Tensor& dk, const Tensor& x, const Tensor& w,
        const Tensor* norm_weight, const Tensor* norm_bias, const Tensor& z, double eps, bool silu_all, Stream stream)

// a = LN(o) over H V jointly;  g = u a, or [u, o, u a] with concat;  y = x + dropout(g) w + bias.
// x, y [T, d]; u, o [T, H, V]; w [H V or 3 H V, d]; bias [d]; norm_weight and norm_bias [H V] (both or neither).
// Dropout: inverted, element index into g row-major, Philox(seed, offset + base).
HSTU_OP(norm_gate_linear, Tensor& y, const Tensor& x, const Tensor& u, const Tensor& o, const Tensor& w, const Tensor* bias,
        const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool concat, double dropout, int64_t seed,
        int64_t offset, const Tensor* base, Stream stream)

// The gradient of x is dy itself and has no output here; dattn is the gradient of o.
HSTU_OP(norm_gate_linear_backward, Tensor& du, Tensor& dattn, Tensor& dw, Tensor* dbias, Tensor* dnorm_weight, Tensor* dnorm_bias,
        const Tensor& dy, const Tensor& u, const Tensor& o, const Tensor& w, const Tensor* norm_weight, const Tensor* norm_bias, double eps,
        bool concat, double dropout, int64_t seed, int64_t offset, const Tensor* base, Stream stream)

// y_m = (z sigmoid(LN(z))) w_out + bias_out, z = x[rows_m] w + bias + states_b, of candidates groups[b] <= m < groups[b + 1] of request b.
// states = x[last] state_weight where `last` is given, else `known`.  x [R, d] F, all else float32 (F float64: float64); rows int64 [M],
// last int64 [G]; states, known [G, hidden]; w, state_weight [d, hidden]; w_out [hidden, K]; y [M, K]. Inference: no gradient.
HSTU_OP(ranker_head, Tensor& y, Tensor* states, const Tensor* known, const Tensor& x, const Tensor& rows, const Tensor* last,
        const Tensor& groups, const Tensor& state_weight, const Tensor& w, const Tensor& bias, const Tensor& norm_weight,
        const Tensor& norm_bias, const Tensor& w_out, const Tensor& bias_out, double eps, Stream stream)

// ---- Row-wise and element-wise ------------------------------------------------------------------------------------------------

// y = (x - mean) / sqrt(var + eps) * weight + bias over the last dim; weight and bias [cols], both or neither.
HSTU_OP(layer_norm, Tensor& y, const Tensor& x, const Tensor* weight, const Tensor* bias, double eps, Stream stream)
HSTU_OP(layer_norm_backward, Tensor& dx, Tensor* dweight, Tensor* dbias, const Tensor& dy, const Tensor& x,
        const Tensor* weight, double eps, Stream stream)

// y = x * sigmoid(LN(x)), LN as above.
HSTU_OP(swish_layer_norm, Tensor& y, const Tensor& x, const Tensor* weight, const Tensor* bias, double eps, Stream stream)
HSTU_OP(swish_layer_norm_backward, Tensor& dx, Tensor* dweight, Tensor* dbias, const Tensor& dy, const Tensor& x,
        const Tensor* weight, const Tensor* bias, double eps, Stream stream)

// y = x / max(|x|_2, eps) over the last dim. Below eps the divisor is a constant, also for the gradient.
HSTU_OP(l2_normalize, Tensor& y, const Tensor& x, double eps, Stream stream)
HSTU_OP(l2_normalize_backward, Tensor& dx, const Tensor& dy, const Tensor& x, double eps, Stream stream)

// y = a + b, same shapes. The gradient of both is dy.
HSTU_OP(add, Tensor& y, const Tensor& a, const Tensor& b, Stream stream)

// y = a b element by element, same shapes.
HSTU_OP(mul, Tensor& y, const Tensor& a, const Tensor& b, Stream stream)
HSTU_OP(mul_backward, Tensor& da, Tensor& db, const Tensor& dy, const Tensor& a, const Tensor& b, Stream stream)

// y[n] = x[n] in y's dtype, for each n: the parameters of a layer are one call. To float: round to nearest even, once; NaN stays NaN.
// Float to integer: toward zero, saturating, NaN gives 0; int64 to int32 saturates. Any dtypes, on both backends; all of y share one, all
// of x one.
HSTU_OP(cast, TensorList y, TensorList x, Stream stream)

// y = x / (1 - p) where Philox(seed, offset + base) keeps the element, else 0; 0 <= p < 1. Its gradient is itself on dy.
HSTU_OP(dropout, Tensor& y, const Tensor& x, double p, int64_t seed, int64_t offset, const Tensor* base, Stream stream)

// y[n][t] = tables[n][ids[t]].  tables [I, d_n] F, ids int64 [T], y [T, d_n]. An id outside 0..I-1 throws (CPU; CUDA under HSTU_DEBUG).
HSTU_OP(embedding, TensorList y, TensorList tables, const Tensor& ids, Stream stream)
// dtable[i] = sum of dy[t] over t with ids[t] = i, in order of t (in chunks of 1024, added in order); rows that no id names are 0.
HSTU_OP(embedding_backward, Tensor& dtable, const Tensor& dy, const Tensor& ids, Stream stream)

// y[t] = tables[0][ids[0][t]] + tables[1][ids[1][t]] + .., in this order, rounded to F after each addition; an id of -1 adds nothing, a row
// without any is 0.  tables 1 to 4 of [I_n, d] F, ids as many of int64 [T], y [T, d]. Other ids outside a table throw (CPU; CUDA under
// HSTU_DEBUG, else the row becomes NaN). No gradient: inference, whose encoders have become tables.
HSTU_OP(embedding_sum, Tensor& y, TensorList tables, TensorList ids, Stream stream)

// y[t] = scale x[t] + table[t - start of t's sequence], 0 where ids[t] = 0.  x, y [T, d], table [N, d], ids int64 [T] or null.
// A sequence longer than N throws (CPU; CUDA under HSTU_DEBUG).
HSTU_OP(position_embedding, Tensor& y, const Tensor& x, const Tensor& table, const Tensor& seq_offsets, const Tensor* ids,
        double scale, Stream stream)
HSTU_OP(position_embedding_backward, Tensor& dx, Tensor& dtable, const Tensor& dy, const Tensor& seq_offsets,
        const Tensor* ids, double scale, Stream stream)

// y[t, k] = table[k] where bit k of actions[t] is set, else 0: an action of several bits is one row of K features side by side. A negative
// action is not known: y[t] = pending. table [K, d] F, K <= 63; actions int64 [T]; pending [K, d] F or null; y [T, K d].
// A bit at or above K, or a negative action without `pending`, throws (CPU; CUDA under HSTU_DEBUG, else it counts as 0).
HSTU_OP(multi_hot_embedding, Tensor& y, const Tensor& table, const Tensor& actions, const Tensor* pending, Stream stream)
// dtable[k] = sum of dy[t, k] over t with bit k set; dpending = sum of dy[t] over t with actions[t] < 0; both in a fixed order.
HSTU_OP(multi_hot_embedding_backward, Tensor& dtable, Tensor* dpending, const Tensor& dy, const Tensor& actions, Stream stream)

// ---- Jagged ----------------------------------------------------------------------------------------------------------------

// Sequence by sequence, rows of a then rows of b.  a [Ta, ...], b [Tb, ...], y [Ta + Tb, ...], one dtype of any kind.
// y_offsets int64 [B + 1] = a_offsets + b_offsets. The gradient is split.
HSTU_OP(concat, Tensor& y, Tensor& y_offsets, const Tensor& a, const Tensor& b, const Tensor& a_offsets,
        const Tensor& b_offsets, Stream stream)
// The inverse: a takes the first La rows of each sequence of y, b the rest. The gradient is concat.
HSTU_OP(split, Tensor& a, Tensor& b, const Tensor& y, const Tensor& a_offsets, const Tensor& b_offsets, Stream stream)

// y[2t] = a[t], y[2t + 1] = b[t].  a, b [T, ...], y [2 T, ...]. The gradient is deinterleave, and the other way.
HSTU_OP(interleave, Tensor& y, const Tensor& a, const Tensor& b, Stream stream)
HSTU_OP(deinterleave, Tensor& a, Tensor& b, const Tensor& y, Stream stream)

// y[b, n] = row n of sequence b, `padding` beyond its length; rows beyond N are dropped.  x [T, ...], y [B, N, ...].
HSTU_OP(jagged_to_dense, Tensor& y, const Tensor& x, const Tensor& seq_offsets, double padding, Stream stream)
// x[t] = y[b, t - start]; rows beyond N are 0.  Each is the other's gradient (padding 0).
HSTU_OP(dense_to_jagged, Tensor& x, const Tensor& y, const Tensor& seq_offsets, Stream stream)

// y[m] = x[b] for m in offsets[b] .. offsets[b + 1]: one row a request to its candidates.  x [B, d], y [M, d].
HSTU_OP(expand, Tensor& y, const Tensor& x, const Tensor& offsets, Stream stream)
// dx[b] = sum of dy[m] over b's candidates, in order of m (0 where there are none).
HSTU_OP(expand_backward, Tensor& dx, const Tensor& dy, const Tensor& offsets, Stream stream)

// offsets[0] = 0, offsets[b + 1] = offsets[b] + lengths[b].  lengths int32 | int64 [B], offsets int64 [B + 1].
HSTU_OP(cumsum, Tensor& offsets, const Tensor& lengths, Stream stream)

// ---- Losses ----------------------------------------------------------------------------------------------------------------
// Items: rows first_id .. I - 1 of table [I, d] (row 0 is padding); with normalize_items each row counts as row / max(|row|, eps).
// weights float32 [T] (F float64: float64) or null = 1. Every loss divides by the sum of the weights; 0 where the sum is 0.
// loss [1], lse [T] and dloss [1] are float32 (F float64: float64): summed, and kept, wider than 16 bits.

// loss = sum_t w_t (lse_t - s_t,pos) / sum w;  s = <query_t, item> / temperature; lse over {positive, R negatives}; a negative equal to the
// positive counts as logit -5e4.  query [T, d], positive_ids int64 [T].
// negative_ids int64 [T, R], [R] for all rows (in-batch), or null: element t R + r of random_ids(first_id .. I - 1, seed, offset + base).
HSTU_OP(sampled_softmax_loss, Tensor& loss, Tensor& lse, const Tensor& query, const Tensor& table, const Tensor& positive_ids,
        const Tensor* weights, const Tensor* negative_ids, int num_negatives, int first_id, bool normalize_items,
        double temperature, double eps, int64_t seed, int64_t offset, const Tensor* base, Stream stream)
// dtable [I, d] is written whole.
HSTU_OP(sampled_softmax_loss_backward, Tensor& dquery, Tensor& dtable, const Tensor& dloss, const Tensor& lse, const Tensor& query,
        const Tensor& table, const Tensor& positive_ids, const Tensor* weights, const Tensor* negative_ids, int num_negatives, int first_id,
        bool normalize_items, double temperature, double eps, int64_t seed, int64_t offset, const Tensor* base, Stream stream)

// The same over every item: lse over rows first_id .. I - 1, in chunks; no [T, I] tensor.
HSTU_OP(softmax_loss, Tensor& loss, Tensor& lse, const Tensor& query, const Tensor& table, const Tensor& positive_ids,
        const Tensor* weights, int first_id, bool normalize_items, double temperature, double eps, Stream stream)
HSTU_OP(softmax_loss_backward, Tensor& dquery, Tensor& dtable, const Tensor& dloss, const Tensor& lse, const Tensor& query,
        const Tensor& table, const Tensor& positive_ids, const Tensor* weights, int first_id, bool normalize_items,
        double temperature, double eps, Stream stream)

// Losses of elements, K tasks side by side: loss_k = sum_m w_mk l(logits_mk, labels_mk) / sum_m w_mk, 0 where the sum is 0.
// logits [M, K] F, K <= 256; labels, weights [M, K] float32 (F float64: float64), weights null = 1; an element of weight 0 counts nothing,
// whatever it holds. loss, weight_sum [K] float32 (float64), also with 16-bit logits; weight_sum_k = sum_m w_mk, wanted by the backward.
// l = max(z, 0) - z y + log(1 + exp(-|z|)): the cross entropy of label y in 0 .. 1 and sigmoid(z), without overflow.
HSTU_OP(bce_with_logits_loss, Tensor& loss, Tensor& weight_sum, const Tensor& logits, const Tensor& labels, const Tensor* weights,
        Stream stream)
// dlogits_mk = dloss_k w_mk / weight_sum_k l'(logits_mk, labels_mk).
HSTU_OP(bce_with_logits_loss_backward, Tensor& dlogits, const Tensor& dloss, const Tensor& weight_sum, const Tensor& logits,
        const Tensor& labels, const Tensor* weights, Stream stream)
// The same with l = (z - y)^2.
HSTU_OP(mse_loss, Tensor& loss, Tensor& weight_sum, const Tensor& logits, const Tensor& labels, const Tensor* weights, Stream stream)
HSTU_OP(mse_loss_backward, Tensor& dlogits, const Tensor& dloss, const Tensor& weight_sum, const Tensor& logits,
        const Tensor& labels, const Tensor* weights, Stream stream)

// ---- Optimisers (in place, no gradient) ----------------------------------------------------------------------------------------

// Decoupled weight decay (Loshchilov and Hutter 2019): m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
// p -= lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps) + lr weight_decay p.  step counts from 1. params, m, v in place, F.
HSTU_OP(adamw, TensorList params, TensorList grads, TensorList m, TensorList v, double lr, double beta1, double beta2,
        double eps, double weight_decay, int64_t step, Stream stream)

// norm [1] F = sqrt(sum of squares over all grads); grads *= min(1, max_norm / (norm + 1e-6)) in place;
// a norm that is not finite leaves the gradients as they are.
HSTU_OP(global_norm_clip, Tensor& norm, TensorList grads, double max_norm, Stream stream)

// Adagrad with one accumulator a row, of the rows that ids name: g = sum of grads[t] over t with ids[t] = i, in a fixed order;
// accumulator[i] += mean over columns of g^2;  table[i] -= lr g / (sqrt(accumulator[i]) + eps). No other row is read or written.
// table [I, d] F and accumulator [I] float32 (F float64: float64) in place; grads [T, d] F, ids int64 [T].
// An id outside 0..I-1 throws (CPU; CUDA under HSTU_DEBUG, else it is left out).
HSTU_OP(rowwise_adagrad, Tensor& table, Tensor& accumulator, const Tensor& grads, const Tensor& ids, double lr, double eps, Stream stream)

// ---- Hash tables (in place, no gradient) ----------------------------------------------------------------------------------------

// rows[t] = the row of keys[t] in a table of C rows, of which row 0 belongs to no key and rows 1 .. count - 1 are given. With insert, keys
// that have none get the rows count, count + 1, ... in order of their first t, and count moves on; without, rows[t] = 0.
// rows int64 [T]; keys int64 [T], any values. In place: row_keys int64 [C], the key of each row; count int64 [1], at least 1; last_used
// int32 [C] or null: `tick` for each row that was found or given; slots int32 [S], S a power of two, S >= 2 C, all -1 at first: open
// addressing over row_keys, made by inserting row_keys 1 .. count - 1 in order. Its layout is no result, everything else is the same
// bits on both backends. insert needs count + T <= C: otherwise it throws (CPU), or nothing is inserted (CUDA).
HSTU_OP(hash_lookup, Tensor& rows, Tensor& slots, Tensor& row_keys, Tensor* last_used, Tensor& count, const Tensor& keys, bool insert,
        int tick, Stream stream)

// ---- Ranking and sampling (no gradient) ----------------------------------------------------------------------------------------

// The k best items of each query by <query_b, table_i> over rows first_id .. I - 1 less the query's exclude_ids; ties by smaller id.
// scores [B, k] F, ids int64 [B, k]; where fewer than k are left: id -1, score -infinity.  query [B, d], table [I, d];
// exclude_ids int64 jagged by exclude_offsets int64 [B + 1], both or neither. A NaN score counts as -infinity.
HSTU_OP(top_k, Tensor& scores, Tensor& ids, const Tensor& query, const Tensor& table, const Tensor* exclude_ids,
        const Tensor* exclude_offsets, int first_id, Stream stream)

// rank[b] = 1 + number of other items, not excluded, that score at or above target_ids[b]; 0 where any score is NaN.
// rank int64 [B]. The target itself is never excluded.
HSTU_OP(target_rank, Tensor& rank, const Tensor& query, const Tensor& table, const Tensor& target_ids,
        const Tensor* exclude_ids, const Tensor* exclude_offsets, int first_id, Stream stream)

// ids int64 [...]: element n = random_id(philox_word(seed, offset, n), low, high - low): uniform in low .. high - 1, range < 2^32.
HSTU_OP(random_ids, Tensor& ids, int64_t low, int64_t high, int64_t seed, int64_t offset, Stream stream)

// x [...] F: element n = bound 2^-23 s, s = philox_word(seed, offset, n) as a signed number >> 8: uniform in [-bound, bound). Made in
// float32 (F float64: float64) by one multiplication, so the same bits on both backends.
HSTU_OP(random_uniform, Tensor& x, double bound, int64_t seed, int64_t offset, Stream stream)
