// What this host can do at most, measured in the same run as a bench: a loop of FMAs that never leaves the registers, and a copy.
#include <chrono>
#include <cstring>

#include "gemm.h"

namespace hstu::cpu {
namespace {

constexpr int kChains = 12;  // independent accumulators: latency times throughput of two FMA units, with some to spare
constexpr int64_t kSteps = 1 << 20;

template <int kBytes>
struct Floats {
  typedef float type __attribute__((vector_size(kBytes)));
};

template <int kBytes>
inline __attribute__((always_inline)) float fma_chains(int64_t steps) {
  using Vector = typename Floats<kBytes>::type;
  Vector sum[kChains], factor = Vector{} + 0.999f, addend = Vector{} + 1e-3f;
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum[i] = Vector{} + float(i);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + addend;
  }
  float total = 0;
  for (int i = 0; i < kChains; ++i) total += sum[i][0];
  return total;
}

__attribute__((target("arch=x86-64-v4"))) float fma_avx512(int64_t steps) { return fma_chains<64>(steps); }
__attribute__((target("arch=x86-64-v3"))) float fma_avx2(int64_t steps) { return fma_chains<32>(steps); }
float fma_sse2(int64_t steps) { return fma_chains<16>(steps); }

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double fma_peak_gflops() {
  bool wide = __builtin_cpu_supports("x86-64-v4"), middle = __builtin_cpu_supports("x86-64-v3");
  auto kernel = wide ? fma_avx512 : middle ? fma_avx2 : fma_sse2;
  double lanes = wide ? 16 : middle ? 8 : 4, best = 0;
  volatile float sink = 0;
  for (int trial = 0; trial < 5; ++trial) {
    auto start = std::chrono::steady_clock::now();
    parallel_for(num_threads(), [&](int64_t) { sink = kernel(kSteps); });
    best = std::max(best, 2.0 * lanes * kChains * double(kSteps) * num_threads() / seconds_since(start) / 1e9);
  }
  return best;
}

double copy_gbps() {
  constexpr int64_t kBytes = int64_t(256) << 20, kBlock = 1 << 20;
  Scratch<char> from(kBytes, true), to(kBytes, true);
  double best = 0;
  for (int trial = 0; trial < 3; ++trial) {
    auto start = std::chrono::steady_clock::now();
    parallel_blocks(kBytes, kBlock, [&](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
    best = std::max(best, 2.0 * kBytes / seconds_since(start) / 1e9);
  }
  return best;
}

}  // namespace hstu::cpu
