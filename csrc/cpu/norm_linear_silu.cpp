#include "../dispatch.h"
#include "../ops.h"
#include "norm.h"
#include "vector_math.h"

namespace hstu::cpu {
namespace {

template <typename T>
HSTU_CLONES void add_bias(T* z, const T* bias, int64_t n) {
  for (int64_t j = 0; j < n; ++j) z[j] += bias[j];
}
template void add_bias<float>(float*, const float*, int64_t);
template void add_bias<double>(double*, const double*, int64_t);

template <typename T>
HSTU_CLONES void silu_row(T* y, const T* z, int64_t n) {
  for (int64_t j = 0; j < n; ++j) y[j] = z[j] * vsigmoid(z[j]);
}
template void silu_row<float>(float*, const float*, int64_t);
template void silu_row<double>(double*, const double*, int64_t);

template <typename T>
HSTU_CLONES void silu_backward_row(T* dz, const T* dy, const T* z, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    T s = vsigmoid(z[j]);
    dz[j] = dy[j] * (s * (T(1) + z[j] * (T(1) - s)));
  }
}
template void silu_backward_row<float>(float*, const float*, const float*, int64_t);
template void silu_backward_row<double>(double*, const double*, const double*, int64_t);

// Columns of z by destination: u, v, q, k.
struct Part {
  void* data;
  int64_t column, width;
  bool silu;
};

template <typename T>
void normalize_rows(T* y, const T* x, const Tensor* weight, const Tensor* bias, int64_t rows, int64_t n, double eps) {
  for (int64_t i = 0; i < rows; ++i)
    normalize_row<T>(y + i * n, x + i * n, row_statistics<T>(x + i * n, n, eps), data_or_null<T>(weight),
                     data_or_null<T>(bias), n);
}

}  // namespace

// A task takes a block of rows through norm, product and SiLU while it is in cache.
void norm_linear_silu(Tensor& u, Tensor& v, Tensor& q, Tensor& k, Tensor* z, const Tensor& x, const Tensor& w,
                      const Tensor* bias, const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool silu_all,
                      Stream) {
  pick_float("norm_linear_silu", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), d = x.cols(), columns = w.cols();
    int64_t hv = u.shape[1] * u.shape[2], hd = q.shape[1] * q.shape[2];
    Part parts[] = {{u.data, 0, hv, true}, {v.data, hv, hv, silu_all}, {q.data, 2 * hv, hd, silu_all}, {k.data, 2 * hv + hd, hd, silu_all}};
    Scratch<T> packed(packed_size<T>(d, columns));
    pack<T>(packed, {w.as<T>(), columns, 1}, d, columns);
    parallel_blocks(rows, kRowBlock, [&](int64_t begin, int64_t end) {
      Scratch<T> norm((end - begin) * d), own(z ? 0 : (end - begin) * columns);
      normalize_rows<T>(norm, x.as<T>() + begin * d, norm_weight, norm_bias, end - begin, d, eps);
      T* before = z ? z->as<T>() + begin * columns : own.get();  // [rows, columns]
      multiply<T>(before, columns, {norm, d, 1}, packed, end - begin, columns, d, false);
      for (int64_t i = 0; i < end - begin; ++i) {
        T* row = before + i * columns;
        if (bias) add_bias<T>(row, bias->as<T>(), columns);
        for (const Part& part : parts) {
          T* out = static_cast<T*>(part.data) + (begin + i) * part.width;
          if (part.silu)
            silu_row<T>(out, row + part.column, part.width);
          else
            std::memcpy(out, row + part.column, part.width * sizeof(T));
        }
      }
    });
  });
}

void norm_linear_silu_backward(Tensor& dx, Tensor& dw, Tensor* dbias, Tensor* dnorm_weight, Tensor* dnorm_bias,
                               const Tensor& du, const Tensor& dv, const Tensor& dq, const Tensor& dk, const Tensor& x,
                               const Tensor& w, const Tensor* norm_weight, const Tensor* norm_bias, const Tensor& z,
                               double eps, bool silu_all, Stream) {
  pick_float("norm_linear_silu_backward", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    int64_t rows = x.rows(), d = x.cols(), columns = w.cols();
    int64_t hv = du.shape[1] * du.shape[2], hd = dq.shape[1] * dq.shape[2];
    Part parts[] = {{du.data, 0, hv, true}, {dv.data, hv, hv, silu_all}, {dq.data, 2 * hv, hd, silu_all}, {dk.data, 2 * hv + hd, hd, silu_all}};
    Scratch<T> dz(rows * columns), norm(rows * d);
    parallel_blocks(rows, kRowBlock, [&](int64_t begin, int64_t end) {
      normalize_rows<T>(norm + begin * d, x.as<T>() + begin * d, norm_weight, norm_bias, end - begin, d, eps);
      for (int64_t i = begin; i < end; ++i)
        for (const Part& part : parts) {
          const T* dy = static_cast<const T*>(part.data) + i * part.width;
          T* out = dz + i * columns + part.column;
          if (part.silu)
            silu_backward_row<T>(out, dy, z.as<T>() + i * columns + part.column, part.width);
          else
            std::memcpy(out, dy, part.width * sizeof(T));
        }
    });
    weight_gradient<T>(dw.as<T>(), norm, d, dz, columns, d, columns, rows);
    if (dbias) column_sums<T>(dbias->as<T>(), dz, columns, rows, columns);
    Scratch<T> packed(packed_size<T>(columns, d));
    pack<T>(packed, {w.as<T>(), 1, columns}, columns, d);
    T* out = dx.as<T>();
    norm_backward_blocks<T>(
        data_or_null<T>(dnorm_weight), data_or_null<T>(dnorm_bias), rows, d, kRowBlock,
        [&](int64_t begin, int64_t end, T* dweight, T* dshift) {
          multiply<T>(out + begin * d, d, {dz + begin * columns, columns, 1}, packed, end - begin, d, columns, false);
          for (int64_t i = begin; i < end; ++i)
            norm_row_backward<T>(out + i * d, dweight, dshift, out + i * d, x.as<T>() + i * d,
                                 row_statistics<T>(x.as<T>() + i * d, d, eps), data_or_null<T>(norm_weight), d);
        });
  });
}

}  // namespace hstu::cpu
