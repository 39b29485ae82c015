#include "../dispatch.h"
#include "../math.h"
#include "../ops.h"
#include "norm.h"
#include "philox.h"

namespace hstu::cpu {
namespace {

template <typename T>
HSTU_CLONES void multiply_row(T* g, const T* u, const T* a, int64_t n) {
  for (int64_t j = 0; j < n; ++j) g[j] = u[j] * a[j];
}
template void multiply_row<float>(float*, const float*, const float*, int64_t);
template void multiply_row<double>(double*, const double*, const double*, int64_t);

// y += x + bias
template <typename T>
HSTU_CLONES void add_row(T* y, const T* x, const T* bias, int64_t n) {
  for (int64_t j = 0; j < n; ++j) y[j] += x[j];
  if (bias)
    for (int64_t j = 0; j < n; ++j) y[j] += bias[j];
}
template void add_row<float>(float*, const float*, const float*, int64_t);
template void add_row<double>(double*, const double*, const double*, int64_t);

// What forward and backward share: the input of w, g = dropout(u LN(o)) or dropout([u, o, u LN(o)]), row by row.
template <typename T>
struct Gate {
  const Tensor &u, &o;
  const Tensor *norm_weight, *norm_bias;
  double eps;
  bool concat;
  double p;
  int64_t seed;
  DrawOffset offset;
  int64_t width = u.cols() * u.shape[1];
  int64_t inner = (concat ? 3 : 1) * width;

  void dropout_row(T* g, int64_t t) const {
    if (p > 0) dropout_elements<T>(g, g, t * inner, inner, p, uint64_t(seed), offset);
  }

  // norm [width] gets LN(o_t), g [inner] the dropped input of w.
  void row(T* norm, T* g, int64_t t) const {
    const T *gate = u.as<T>() + t * width, *attention = o.as<T>() + t * width;
    normalize_row<T>(norm, attention, row_statistics<T>(attention, width, eps), data_or_null<T>(norm_weight),
                     data_or_null<T>(norm_bias), width);
    if (concat) {
      std::memcpy(g, gate, width * sizeof(T));
      std::memcpy(g + width, attention, width * sizeof(T));
    }
    multiply_row<T>(g + inner - width, gate, norm, width);
    dropout_row(g, t);
  }
};

}  // namespace

// A task takes a block of rows through norm, gate, dropout and product while it is in cache.
void norm_gate_linear(Tensor& y, const Tensor& x, const Tensor& u, const Tensor& o, const Tensor& w, const Tensor* bias,
                      const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool concat, double dropout,
                      int64_t seed, int64_t offset, const Tensor* base, Stream) {
  pick_float("norm_gate_linear", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    Gate<T> gate{u, o, norm_weight, norm_bias, eps, concat, dropout, seed, {uint64_t(offset), data_or_null<int64_t>(base)}};
    int64_t rows = x.rows(), d = x.cols(), inner = gate.inner;
    Scratch<T> packed(packed_size<T>(inner, d));
    pack<T>(packed, {w.as<T>(), d, 1}, inner, d);
    parallel_blocks(rows, kRowBlock, [&](int64_t begin, int64_t end) {
      Scratch<T> norm(gate.width), g((end - begin) * inner);
      for (int64_t i = begin; i < end; ++i) gate.row(norm, g + (i - begin) * inner, i);
      T* out = y.as<T>() + begin * d;
      multiply<T>(out, d, {g, inner, 1}, packed, end - begin, d, inner, false);
      for (int64_t i = 0; i < end - begin; ++i)
        add_row<T>(out + i * d, x.as<T>() + (begin + i) * d, data_or_null<T>(bias), d);
    });
  });
}

void norm_gate_linear_backward(Tensor& du, Tensor& dattn, Tensor& dw, Tensor* dbias, Tensor* dnorm_weight,
                               Tensor* dnorm_bias, const Tensor& dy, const Tensor& u, const Tensor& o, const Tensor& w,
                               const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool concat, double dropout,
                               int64_t seed, int64_t offset, const Tensor* base, Stream) {
  pick_float("norm_gate_linear_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    Gate<T> gate{u, o, norm_weight, norm_bias, eps, concat, dropout, seed, {uint64_t(offset), data_or_null<int64_t>(base)}};
    int64_t rows = dy.rows(), d = dy.cols(), width = gate.width, inner = gate.inner;
    Scratch<T> g(rows * inner), packed(packed_size<T>(d, inner));
    pack<T>(packed, {w.as<T>(), 1, d}, d, inner);
    norm_backward_blocks<T>(
        data_or_null<T>(dnorm_weight), data_or_null<T>(dnorm_bias), rows, width, kRowBlock,
        [&](int64_t begin, int64_t end, T* dweight, T* dshift) {
          Scratch<T> norm(width), dg((end - begin) * inner), dnorm(width);
          multiply<T>(dg, inner, {dy.as<T>() + begin * d, d, 1}, packed, end - begin, inner, d, false);
          for (int64_t i = begin; i < end; ++i) {
            const T *gates = u.as<T>() + i * width, *attention = o.as<T>() + i * width;
            T *row = dg + (i - begin) * inner, *dgated = row + inner - width;
            gate.row(norm, g + i * inner, i);
            gate.dropout_row(row, i);
            T *du_row = du.as<T>() + i * width, *do_row = dattn.as<T>() + i * width;
            multiply_row<T>(du_row, dgated, norm, width);
            multiply_row<T>(dnorm, dgated, gates, width);
            if (concat) {
              add_row<T>(du_row, row, nullptr, width);
              std::memcpy(do_row, row + width, width * sizeof(T));
            }
            norm_row_backward<T>(do_row, dweight, dshift, dnorm, attention, row_statistics<T>(attention, width, gate.eps),
                                 data_or_null<T>(norm_weight), width, concat);
          }
        });
    weight_gradient<T>(dw.as<T>(), g, inner, dy.as<T>(), d, inner, d, rows);
    if (dbias) column_sums<T>(dbias->as<T>(), dy.as<T>(), d, rows, d);
  });
}

}  // namespace hstu::cpu
