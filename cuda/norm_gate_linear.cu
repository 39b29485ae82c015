#include "norm.cuh"
#include "norm_gate_linear.cuh"

namespace hstu::cuda {
namespace {

// g, row by row. A team owns a row; a thread every threads-th vector of it.
template <typename T, int kCount>
__global__ void __launch_bounds__(kRowThreads) gate_kernel(T* g, const __grid_constant__ Gate<T> gate) {
  int64_t n = gate.width;
  RowTeam team = row_team(n);
  int64_t row = int64_t(blockIdx.x) * team.teams + team.index;
  if (row >= gate.rows) return;
  RowStatistics statistics = row_statistics<kCount>(gate.o + row * n, n, gate.eps, team);
  for (int64_t j = team.lane * kCount; j < n; j += team.threads * kCount) {
    float gates[kCount], attention[kCount], a[kCount];
    load(gates, gate.u + row * n + j);
    load(attention, gate.o + row * n + j);
#pragma unroll
    for (int e = 0; e < kCount; ++e) a[e] = (attention[e] - statistics.mean) * statistics.rstd;
    scale_and_shift(a, gate.norm_weight, gate.norm_bias, j);
    gate.write(g, row, j, gates, attention, a);
  }
}

// From dg = dy w^T, still to be dropped: the gradient at the norm's output is dg u, and with concat o has a part of its own. On its first
// visit an element also leaves du and g, which is made again for dw.
template <typename T>
struct GateGradient {
  Gate<T> gate;
  const T* dg;
  T *du, *g;

  __device__ __forceinline__ void prefetch(int64_t row, const RowTeam& team) const {
    prefetch_row(gate.u + row * gate.width, gate.width, team);
    prefetch_row(dg + row * gate.inner, gate.inner, team);
  }
  template <bool kFirst, int kCount>
  __device__ __forceinline__ void gradient(float (&dnorm)[kCount], float (&past)[kCount], int64_t row, int64_t j,
                                           const float (&attention)[kCount], const float (&xhat)[kCount]) const {
    int64_t n = gate.width;
    bool concat = gate.inner > n;
    const T* from = dg + row * gate.inner + j;
    float gates[kCount];
    load(gates, gate.u + row * n + j);
    load(dnorm, from + gate.inner - n);
    gate.drop(dnorm, row, gate.inner - n + j);
    if constexpr (kFirst) {
      float a[kCount], v[kCount];
#pragma unroll
      for (int e = 0; e < kCount; ++e) a[e] = xhat[e], v[e] = 0.f;
      scale_and_shift(a, gate.norm_weight, gate.norm_bias, j);
      if (concat) {
        load(v, from);
        gate.drop(v, row, j);
      }
#pragma unroll
      for (int e = 0; e < kCount; ++e) v[e] += dnorm[e] * a[e];
      store(du + row * n + j, v);
      gate.write(g, row, j, gates, attention, a);
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) dnorm[e] *= gates[e], past[e] = 0.f;
    if (concat && !kFirst) {
      load(past, from + n);
      gate.drop(past, row, n + j);
    }
  }
};

template <typename T>
Gate<T> make_gate(const Tensor& u, const Tensor& o, const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool concat, double p,
                  int64_t seed, int64_t offset, const Tensor* base) {
  int64_t width = u.shape[1] * u.shape[2];
  return {u.as<T>(),
          o.as<T>(),
          data_or_null<T>(norm_weight),
          data_or_null<T>(norm_bias),
          u.shape[0],
          width,
          (concat ? 3 : 1) * width,
          float(eps),
          float(1.0 / (1.0 - p)),
          dropout_threshold(p),
          uint64_t(seed),
          {uint64_t(offset), data_or_null<int64_t>(base)}};
}

}  // namespace

void norm_gate_linear(Tensor& y, const Tensor& x, const Tensor& u, const Tensor& o, const Tensor& w, const Tensor* bias,
                      const Tensor* norm_weight, const Tensor* norm_bias, double eps, bool concat, double dropout, int64_t seed,
                      int64_t offset, const Tensor* base, Stream stream) {
  pick_dtype("norm_gate_linear", x.dtype, [&](auto zero) {
    using T = decltype(zero);
    Gate<T> gate = make_gate<T>(u, o, norm_weight, norm_bias, eps, concat, dropout, seed, offset, base);
    int64_t rows = x.rows(), d = x.cols();
    GemmOutput<T> output;
    output.parts[0] = {y.as<T>(), 0, d};
    output.bias = data_or_null<T>(bias);
    output.residual = x.as<T>();
    output.n = d;
    if constexpr (sizeof(T) == 2)
      if (norm_gate_linear_on_hopper<T>(output, gate, w.as<T>(), stream)) return;
    Scratch<T> g(rows * gate.inner, stream);  // [T, inner]
    pick_vector<T>(gate.wide(), [&](auto kCount) {
      launch(gate_kernel<T, kCount>, row_blocks(rows, gate.width), dim3(kRowThreads), 0, stream, g.get(), gate);
    });
    gemm<T>(output, {g, gate.inner}, {w.as<T>(), d}, false, rows, d, gate.inner, stream);
  });
}

void norm_gate_linear_backward(Tensor& du, Tensor& dattn, Tensor& dw, Tensor* dbias, Tensor* dnorm_weight, Tensor* dnorm_bias,
                               const Tensor& dy, const Tensor& u, const Tensor& o, const Tensor& w, const Tensor* norm_weight,
                               const Tensor* norm_bias, double eps, bool concat, double dropout, int64_t seed, int64_t offset,
                               const Tensor* base, Stream stream) {
  pick_dtype("norm_gate_linear_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    Gate<T> gate = make_gate<T>(u, o, norm_weight, norm_bias, eps, concat, dropout, seed, offset, base);
    int64_t rows = dy.rows(), d = dy.cols(), inner = gate.inner;
    Scratch<T> dg(rows * inner, stream), g(rows * inner, stream);
    GemmOutput<T> output;
    output.parts[0] = {dg, 0, inner};
    output.n = inner;
    gemm<T>(output, {dy.as<T>(), d}, {w.as<T>(), d}, true, rows, inner, d, stream);
    GateGradient<T> source{gate, dg, du.as<T>(), g};
    norm_backward<T>(dattn.as<T>(), data_or_null<T>(dnorm_weight), data_or_null<T>(dnorm_bias), source,
                     gate.wide() && aligned(source.du, gate.width), gate.o, gate.norm_weight, rows, gate.width, eps, stream);
    weight_gradient<T>(dw.as<T>(), {g, inner}, {dy.as<T>(), d}, inner, d, rows, stream);
    if (dbias) column_sums<T>(dbias->as<T>(), dy.as<T>(), rows, d, stream);
  });
}

}  // namespace hstu::cuda
