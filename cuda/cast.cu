#include "tensor_batch.cuh"

namespace hstu::cuda {
namespace {

// The nearest float32 towards zero, its last bit set where something was cut off: a second rounding to 16 bits is then exact.
__device__ __forceinline__ float mark(float cut, bool exact) { return exact ? cut : __uint_as_float(__float_as_uint(cut) | 1u); }
__device__ __forceinline__ float to_odd(double x) {
  float cut = __double2float_rz(x);
  return mark(cut, double(cut) == x);  // a NaN stays one
}
__device__ __forceinline__ float to_odd(int32_t x) {
  float cut = __int2float_rz(x);
  return mark(cut, __float2int_rz(cut) == x);
}
__device__ __forceinline__ float to_odd(int64_t x) {
  float cut = __ll2float_rz(x);
  return mark(cut, __float2ll_rz(cut) == x);
}
__device__ __forceinline__ float to_odd(float x) { return x; }
__device__ __forceinline__ float to_odd(__nv_bfloat16 x) { return to_float(x); }
__device__ __forceinline__ float to_odd(__half x) { return to_float(x); }

// Toward zero; the hardware saturates, but its answer for NaN depends on the width.
__device__ __forceinline__ void to_integer(int32_t& y, float x) { y = x == x ? __float2int_rz(x) : 0; }
__device__ __forceinline__ void to_integer(int64_t& y, float x) { y = x == x ? __float2ll_rz(x) : 0; }
__device__ __forceinline__ void to_integer(int32_t& y, double x) { y = x == x ? __double2int_rz(x) : 0; }
__device__ __forceinline__ void to_integer(int64_t& y, double x) { y = x == x ? __double2ll_rz(x) : 0; }
__device__ __forceinline__ void to_integer(int64_t& y, int32_t x) { y = x; }
__device__ __forceinline__ void to_integer(int32_t& y, int64_t x) { y = int32_t(max(int64_t(INT32_MIN), min(int64_t(INT32_MAX), x))); }

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>;

template <typename To, typename From>
struct Cast {
  To* y;
  const From* x;
  static __device__ __forceinline__ To convert(From x) {
    if constexpr (kIsHalf<To>) {
      return from_float<To>(to_odd(x));
    } else if constexpr (kIsHalf<From>) {
      return Cast<To, float>::convert(to_float(x));
    } else if constexpr (std::is_integral_v<To> && !std::is_same_v<To, From>) {
      To result;
      to_integer(result, x);
      return result;
    } else {
      return To(x);
    }
  }
  template <int kN>
  __device__ void at(int64_t i) const {
    Vector<From, kN> from = load<kN>(x + i);
    Vector<To, kN> to;
#pragma unroll
    for (int j = 0; j < kN; ++j) to.at[j] = convert(from.at[j]);
    store(y + i, to);
  }
};

template <typename Fn>
void pick_type(Dtype dtype, Fn&& fn) {
  switch (dtype) {
    case Dtype::kFloat32: return fn(float{});
    case Dtype::kFloat64: return fn(double{});
    case Dtype::kBFloat16: return fn(__nv_bfloat16{});
    case Dtype::kFloat16: return fn(__half{});
    case Dtype::kInt32: return fn(int32_t{});
    case Dtype::kInt64: return fn(int64_t{});
  }
}

// A block owns one chunk of one tensor.
template <typename To, typename From>
__global__ void __launch_bounds__(kBatchThreads) cast_chunks(const __grid_constant__ TensorBatch<2> batch) {
  int64_t begin, end;
  int i = batch.find(begin, end);
  Cast<To, From> fn{static_cast<To*>(batch.data[0][i]), static_cast<const From*>(batch.data[1][i])};
  bool whole_y = reinterpret_cast<uintptr_t>(fn.y) % alignof(Vector<To, 4>) == 0;
  bool whole_x = reinterpret_cast<uintptr_t>(fn.x) % alignof(Vector<From, 4>) == 0;
  for_chunk<4>(begin, end, whole_y && whole_x, fn);
}

}  // namespace

void cast(TensorList y, TensorList x, Stream stream) {
  if (x.items.empty()) return;
  pick_type(y.items[0].dtype, [&](auto to) {
    pick_type(x.items[0].dtype, [&](auto from) {
      using To = decltype(to);
      using From = decltype(from);
      if constexpr (std::is_same_v<To, From>) {
        for (size_t n = 0; n < x.items.size(); ++n)
          if (x.items[n].size() > 0)
            CUDA_CHECK(cudaMemcpyAsync(y.items[n].data, x.items[n].data, size_t(x.items[n].bytes()), cudaMemcpyDeviceToDevice,
                                       handle_of(stream)));
      } else {
        for_each_batch<2>({&y, &x}, [&](const TensorBatch<2>& batch, int blocks, int64_t) {
          launch(cast_chunks<To, From>, unsigned(blocks), kBatchThreads, 0, stream, batch);
        });
      }
    });
  });
}

}  // namespace hstu::cuda
