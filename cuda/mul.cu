#include "map.cuh"

namespace hstu::cuda {
namespace {

template <typename T>
struct Multiply {
  T* y;
  const T *a, *b;
  template <int kN>
  __device__ void at(int64_t i) const {
    Vector<T, kN> va = load<kN>(a + i), vb = load<kN>(b + i), vy;
#pragma unroll
    for (int j = 0; j < kN; ++j) vy.at[j] = from_float<T>(to_float(va.at[j]) * to_float(vb.at[j]));
    store(y + i, vy);
  }
};

template <typename T>
struct MultiplyBackward {
  T *da, *db;
  const T *dy, *a, *b;
  template <int kN>
  __device__ void at(int64_t i) const {
    Vector<T, kN> vdy = load<kN>(dy + i), va = load<kN>(a + i), vb = load<kN>(b + i), vda, vdb;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      vda.at[j] = from_float<T>(to_float(vdy.at[j]) * to_float(vb.at[j]));
      vdb.at[j] = from_float<T>(to_float(vdy.at[j]) * to_float(va.at[j]));
    }
    store(da + i, vda);
    store(db + i, vdb);
  }
};

}  // namespace

void mul(Tensor& y, const Tensor& a, const Tensor& b, Stream stream) {
  pick_dtype("mul", y.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kN = 16 / sizeof(T);
    Multiply<T> fn{y.as<T>(), a.as<T>(), b.as<T>()};
    map<kN>(y.size(), aligned<kN>(fn.y) && aligned<kN>(fn.a) && aligned<kN>(fn.b), fn, stream);
  });
}

void mul_backward(Tensor& da, Tensor& db, const Tensor& dy, const Tensor& a, const Tensor& b, Stream stream) {
  pick_dtype("mul_backward", dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kN = 16 / sizeof(T);
    MultiplyBackward<T> fn{da.as<T>(), db.as<T>(), dy.as<T>(), a.as<T>(), b.as<T>()};
    bool whole = aligned<kN>(fn.da) && aligned<kN>(fn.db) && aligned<kN>(fn.dy) && aligned<kN>(fn.a) && aligned<kN>(fn.b);
    map<kN>(dy.size(), whole, fn, stream);
  });
}

}  // namespace hstu::cuda
