// What the softmax losses share: the rows that count, the online log-sum-exp of a row, the product with candidates that
// all rows share, and the table's gradient.
#pragma once
#include "../ops.h"
#include "pairs.h"

namespace hstu::cpu {

// The rows of a call whose weight is not 0, packed: row i stands for position `position[i]`. Positive ids of the others
// are not read.
template <typename T>
struct LossRows {
  LossRows(const char* op, const Tensor& query, const Tensor& positive_ids, const Tensor* weights, int first_id, int64_t items);

  // loss = sum of weight * losses / sum of weights, added in order of position; lse of rows that do not count is 0.
  void finish(Tensor& loss, Tensor& lse, const double* losses, const T* row_lse) const;
  // dquery rows of positions that do not count.
  void clear_others(T* dquery) const;
  // dloss / (sum of weights * temperature); 0 where the sum is 0.
  double gradient_scale(const Tensor& dloss, double temperature) const;

  const int64_t total;
  Scratch<int32_t> position, positive;
  Scratch<T> weight;
  double weight_sum = 0;
  const int64_t count;
  const PaddedRows<T> query;

 private:
  int64_t collect(const char* op, const Tensor& positive_ids, const Tensor* weights, int first_id, int64_t items);
};

// Log-sum-exp of one row, block by block: {positive} first, then the negatives that absorb() is shown.
template <typename T>
struct RowSum {
  // s[n]: products <query, item>; they are overwritten. One whose id is `id` has logit `collision` instead of s *
  // scale.
  void absorb(T* s, int64_t n, const int32_t* ids, int32_t id, T scale, T collision);
  // lse and lse - positive; the latter keeps its precision where the positive outweighs everything.
  void finish(T& lse, double& loss) const;

  T positive, maximum, negatives;  // begins as {positive, positive, 0}; negatives: sum of exp(logit - maximum)
};

// s[j] = gain * exp(logit_j - lse), 0 at collisions, logits as in absorb. Returns the sum of the probabilities,
// collisions included.
template <typename T>
T softmax_gradient(T* s, int64_t n, const int32_t* ids, int32_t id, T scale, T collision, T lse, T gain);

// Candidates shared by all rows: candidate c is ids[c], rows[c] its (normalised) item. No [T, count] tensor is made.
template <typename T>
struct Candidates {
  Candidates(const int32_t* ids, const T* rows, int64_t count, const PaddedRows<T>& items, T scale, T collision);

  void forward(const LossRows<T>& batch, double* losses, T* lse) const;
  // Writes the gradients of the batch's rows to dquery [T, d], of the candidates' rows to drows [count, width], and for
  // each row of the batch the term that its positive's item gets.
  void backward(T* dquery, T* drows, Term<T>* positives, const LossRows<T>& batch, const T* lse, double gain) const;

  const int32_t* ids;
  const T* rows;
  const int64_t count;
  const PaddedRows<T>& items;  // the positives' table
  const T scale, collision;
  Scratch<T> by_column;  // the rows transposed, packed for query * rows^T
};

// dtable = the normalisation's backward of the sum over the groups' terms; rows of `table` that no term names get 0.
// a: terms that name rows of a_rows; b: likewise, may be absent.
template <typename T>
void table_gradient(T* dtable, const PaddedRows<T>& items, int64_t count, double eps, const GroupedTerms<T>& a,
                    const T* a_rows, const GroupedTerms<T>* b, const T* b_rows);

}  // namespace hstu::cpu
