// Weighted sums of rows named by index: the gathers and scatters of the losses. Rows are padded with zeros to whole
// vectors, so that no kernel has a tail; every sum adds in one fixed order, whatever the number of threads.
#pragma once
#include <cstdint>

#include "scratch.h"

namespace hstu::cpu {

template <typename T>
constexpr int kLanes = 32 / sizeof(T);

// rows[i] = x[pick[i]] (x[i] without pick), divided by max(|row|, eps) where `normalize`.  x [., d], rows [count,
// width]. Where nothing has to be changed the rows are x itself.
template <typename T>
class PaddedRows {
 public:
  PaddedRows(const T* x, int64_t count, int64_t d, const int32_t* pick, bool normalize, double eps);
  const T* data() const { return data_; }
  const T* row(int64_t i) const { return data_ + i * width; }
  const T* norms() const { return normalized_ ? norms_.get() : nullptr; }  // |x[i]| where normalised

  const int64_t d, width;

 private:
  bool copied_, normalized_;
  Scratch<T> rows_, norms_;
  const T* data_;
};

// out[j] = <query, rows[ids[j]]>; its bits depend on nothing but the two rows.
template <typename T>
void dots(T* out, const T* query, const T* rows, int64_t width, const int32_t* ids, int64_t count);

template <typename T>
struct Term {
  int32_t row;
  T weight;
};

// sum[j] += terms[i].weight * rows[terms[i].row][j] in order of i.  sum [width].
template <typename T>
void add_terms(T* sum, const T* rows, int64_t width, const Term<T>* terms, int64_t count);

// The transpose of a table of terms: terms [sources, each] name a group in `row`; the terms of one group stand together
// in order of source, `row` then being the source. At most 2^31 - 1 terms.
template <typename T>
class GroupedTerms {
 public:
  GroupedTerms(const Term<T>* terms, int64_t sources, int64_t each, int64_t groups);
  const Term<T>* group(int64_t g) const { return terms_ + begin_[g]; }
  int64_t count(int64_t g) const { return begin_[g + 1] - begin_[g]; }

 private:
  Scratch<Term<T>> terms_;
  Scratch<int32_t> begin_;
};

}  // namespace hstu::cpu
