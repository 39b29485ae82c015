// The forward for Hopper: what a warp does with its 16 rows beside the products: softmax, targets' own groups, the way out. A thread has
// rows row0 and row0 + 8 of the item.
#pragma once
#include "hstu_attention_sm90.cuh"
#include "sm90/bulk.cuh"

namespace hstu::cuda::attention {
namespace forward_sm90 {

// The scores that are multiplied: of the next tile, or those that become weights in their place.
template <bool kAhead, int kNext, int kCount>
__device__ __forceinline__ auto& pick_scores(float (&next)[kNext], float (&w)[kCount]) {
  if constexpr (kAhead) return next;
  else return w;
}

// v = 0 of the hidden ones of 32 keys from j on, for a thread's two rows, eight apart.
__device__ __forceinline__ void hide_keys(float* v, const VisibleKeys* rows, int j, int column0) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t seen = rows[8 * half].bits32(j) >> column0;
#pragma unroll
    for (int x = 0; x < 4; ++x)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (!(seen >> (8 * x + e) & 1)) v[4 * x + 2 * half + e] = 0.f;
  }
}

constexpr float kLog2E = 1.4426950408889634f;
__device__ __forceinline__ float exponential2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Of a thread's two rows: the largest score, the sum of this thread's weights, and what the last tile makes of the sums before it.
struct Softmax {
  float steep;  // alpha log2(e)
  float most[2] = {-kInfinity, -kInfinity}, total[2] = {0.f, 0.f}, decay[2] = {1.f, 1.f};

  // Scores of a tile become weights. One of which a row sees nothing leaves the row as it is.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&w)[kCount]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float even = most[half], odd = -kInfinity;
#pragma unroll
      for (int x = 2 * half; x < kCount; x += 4) even = fmaxf(even, w[x]), odd = fmaxf(odd, w[x + 1]);
      float now = quad_max(fmaxf(even, odd)), reference = now == -kInfinity ? 0.f : now * steep;
      decay[half] = now == most[half] ? 1.f : exponential2(steep * (most[half] - now));
      most[half] = now, total[half] *= decay[half];
#pragma unroll
      for (int x = 0; x < kCount; ++x)
        if (x / 2 % 2 == half) w[x] = exponential2(fmaf(w[x], steep, -reference)), total[half] += w[x];
    }
  }
  template <int kCount>
  __device__ __forceinline__ void rescale(float (&sums)[kCount]) const {
#pragma unroll
    for (int x = 0; x < kCount; ++x) sums[x] *= decay[x / 2 % 2];
  }
  // The weight of one more score, known to the quad, as `total` is.
  __device__ __forceinline__ float add(int half, float score) {
    float now = fmaxf(most[half], score), weight = exponential2(steep * (score - now));
    decay[half] = exponential2(steep * (most[half] - now)), decay[1 - half] = 1.f;
    most[half] = now, total[half] = fmaf(total[half], decay[half], weight);
    return weight;
  }
};

// The bias of row i and a key of its own group.
template <typename T>
__device__ __forceinline__ float own_bias(const Call<T>& p, const Sequence& s, int head, int64_t query_row, int j) {
  float bias = p.positions ? p.unit * p.pos_w.at(p.pos_per_head ? int64_t(head) * p.positions : 0) : 0.f;
  return p.last_bucket < 0 ? bias : bias + time_term(p, head, bucket_of(p.query_time[query_row], p.key_time[s.time + j], p.last_bucket));
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000)};
  else return __half22float2(*reinterpret_cast<__half2*>(&bits));
}
// sum + <a, b> of 8 elements.
template <typename T>
__device__ __forceinline__ float dot8(float sum, const void* a, const void* b) {
  uint4 left = *static_cast<const uint4*>(a), right = *static_cast<const uint4*>(b);
  const uint32_t x[4] = {left.x, left.y, left.z, left.w}, y[4] = {right.x, right.y, right.z, right.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 u = unpack_pair<T>(x[i]), v = unpack_pair<T>(y[i]);
    sum = fmaf(u.y, v.y, fmaf(u.x, v.x, sum));
  }
  return sum;
}

// Targets' own groups, in float32, a quad a row: q from the item's tile, a key's pieces and value at once from memory, for both rows of a
// thread where registers allow.
template <typename T, int kDim, Mode kMode, typename Shared>
__device__ __forceinline__ void add_own(float (&sums)[kDim / 2], Softmax& softmax, const Shared& shared, int slot, int strip,
                                        const Call<T>& p, const T* tile) {
  constexpr int kRows = Shared::C::kRows, kPieces = (kDim + 31) / 32;
  constexpr int kAtOnce = kDim == 128 && (kMode != Mode::kSiluBias || Shared::C::kGroups == 2) ? 2 : 1;
  const Work& work = shared.work[slot];
  const Rows<T> &keys = shared.keys[slot], &values = shared.values[slot];
  const Sequence& s = work.s;
  int rows = others_of(shared, slot) < 0 ? 0 : work.rows;  // none where another block has the item's last keys
  int lane = threadIdx.x % 32, row0 = 16 * strip + lane / 4, column0 = lane % 4 * 2, piece0 = lane % 4 * 8;
  if constexpr (kMode == Mode::kSoftmax) softmax.total[0] = quad_sum(softmax.total[0]), softmax.total[1] = quad_sum(softmax.total[1]);
  if (s.shift + work.first + work.rows <= s.history) return;
#pragma unroll
  for (int half0 = 0; half0 < 2; half0 += kAtOnce) {
    int own[kAtOnce], count[kAtOnce], most = 0;
#pragma unroll
    for (int y = 0; y < kAtOnce; ++y) {
      int r = row0 + 8 * (half0 + y), i = s.shift + work.first + r;
      own[y] = shared.seen[slot][r].own, count[y] = r < rows ? i + 1 - own[y] : 0, most = max(most, count[y]);
    }
#pragma unroll 1
    for (int x = 0, longest = __reduce_max_sync(kFullWarp, most); x < longest; ++x) {
      uint4 pieces[kAtOnce][kAtOnce > 1 ? kPieces : 1];
      const T* key = nullptr;  // of the last row
      uint32_t pairs[kAtOnce][kDim / 8];
#pragma unroll
      for (int y = 0; y < kAtOnce; ++y) {
        bool active = x < count[y];
        int j = active ? own[y] + x : 0;
        const T* value = values.at(j) + column0;
        key = keys.at(j) + piece0;
#pragma unroll
        for (int d = 0; kAtOnce > 1 && d < kPieces; ++d)
          pieces[y][d] = active && 32 * d + piece0 < p.key_dim ? *reinterpret_cast<const uint4*>(key + 32 * d) : uint4{0, 0, 0, 0};
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d)
          pairs[y][d] = active && 8 * d < p.value_dim ? *reinterpret_cast<const uint32_t*>(value + 8 * d) : 0;
      }
#pragma unroll
      for (int y = 0; y < kAtOnce; ++y) {
        int half = half0 + y, r = row0 + 8 * half;
        float score = 0.f, weight;
#pragma unroll
        for (int d = 0; d < kPieces; ++d)
          if (x < count[y] && 32 * d + piece0 < p.key_dim)
            score = dot8<T>(score, reinterpret_cast<const unsigned char*>(tile) + swizzled<T, kDim>(kRows, r, 32 * d + piece0),
                            kAtOnce > 1 ? static_cast<const void*>(&pieces[y][d]) : key + 32 * d);
        score = quad_sum(score);
        if (x >= count[y]) continue;
        if constexpr (kMode == Mode::kSoftmax) {
          weight = softmax.add(half, score);
          softmax.rescale(sums);
        } else {
          score *= p.unit * p.alpha;
          if constexpr (kMode == Mode::kSiluBias) score += own_bias(p, s, work.head, s.query + work.first + r, own[y] + x);
          weight = weight_of<T>(score);
        }
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          float2 pair = unpack_pair<T>(pairs[y][d]);
          float* sum = sums + 4 * d + 2 * half;
          sum[0] = fmaf(weight, pair.x, sum[0]), sum[1] = fmaf(weight, pair.y, sum[1]);
        }
      }
    }
  }
}

// 16 bytes: the compiler writes an array's pieces word by word.
__device__ __forceinline__ void store_piece(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
// Rows leave through their part of the query tile, which nobody reads any more; leave() gives it back.
template <typename T, int kDim, Mode kMode, int kRows, typename Leave>
__device__ __forceinline__ void store_rows(const float (&sums)[kDim / 2], const Softmax& softmax, const Work& work, int strip,
                                           const Call<T>& p, T* tile, T* out, float* lse, Leave&& leave) {
  int lane = threadIdx.x % 32, first = 16 * strip, head = work.head, rows = work.rows;
  int64_t query = work.s.query + work.first;
  auto at = [&](int r, int d) { return reinterpret_cast<unsigned char*>(tile) + swizzled<T, kDim>(kRows, r, d); };
  float scales[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int r = first + lane / 4 + 8 * half;
    float& scale = scales[half];
    if constexpr (kMode == Mode::kSoftmax) {
      float total = softmax.total[half];
      scale = total == 0.f ? 0.f : 1.f / total;
      if (lse && lane % 4 == 0 && r < rows)
        lse[(query + r) * p.heads + head] = total == 0.f ? -kInfinity : fmaf(p.alpha, softmax.most[half], logf(total));
    } else {
      scale = p.scales ? (r < rows ? p.scales[query + r] : 0.f) : p.scale;
    }
  }
#pragma unroll
  for (int d = 0; d < kDim / 8; d += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float* sum = sums + 4 * (d + x / 2) + 2 * (x % 2);
      pairs[x] = pack_pair<T>(scales[x % 2] * sum[0], scales[x % 2] * sum[1]);
    }
    store_matrices(shared_address(at(first + lane % 16, 8 * d + lane / 16 * 8)), pairs);
  }
  __syncwarp();
  constexpr int kLanes = kDim / 8, kOnce = 32 / kLanes;  // lanes a row, rows at once
  int r = first + lane / kLanes, d = lane % kLanes * 8, left = d < p.value_dim ? rows - r : 0;
  int64_t row = int64_t(p.heads) * p.value_dim;
  T* to = out + (query + r) * row + head * p.value_dim + d;
  uint4 pieces[16 / kOnce];
#pragma unroll
  for (int x = 0; x < 16 / kOnce; ++x) pieces[x] = *reinterpret_cast<const uint4*>(at(r + x * kOnce, d));
  leave();
#pragma unroll
  for (int x = 0; x < 16 / kOnce; ++x, to += kOnce * row)
    if (x * kOnce < left) store_piece(to, pieces[x]);
}

}  // namespace forward_sm90
}  // namespace hstu::cuda::attention
