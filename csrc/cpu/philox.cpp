#include "philox.h"

#include <algorithm>
#include <cstring>

#include "../math.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int kBlocks = 8;            // Philox blocks side by side
constexpr int kWords = 4 * kBlocks;   // words of one group of blocks
constexpr int64_t kGroups = 16;       // groups of one vector step
constexpr int64_t kBuffer = 16 * kWords;

// Words of `groups` groups of blocks from `counter`. Arrays of lanes, products split in high and low halves: the form that becomes
// 32 x 32 -> 64 bit vector multiplies in every clone (one 64-bit lane a block needs twice the time under AVX2). The vectors run across
// groups, and fewer than kGroups of them would be left to a scalar loop ten times slower than single_blocks.
HSTU_CLONES void groups_of_blocks(uint32_t* words, int64_t groups, uint64_t key, uint64_t counter) {
  for (int64_t group = 0; group < groups; ++group, counter += kBlocks, words += kWords) {
    uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks] = {}, c3[kBlocks] = {};
    uint32_t low = uint32_t(counter), high = uint32_t(counter >> 32), k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int l = 0; l < kBlocks; ++l) {
      c0[l] = low + uint32_t(l);
      c1[l] = high + (c0[l] < low);
    }
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      uint32_t high0[kBlocks], high2[kBlocks];
      for (int l = 0; l < kBlocks; ++l) high0[l] = uint32_t((uint64_t(0xD2511F53u) * c0[l]) >> 32);
      for (int l = 0; l < kBlocks; ++l) high2[l] = uint32_t((uint64_t(0xCD9E8D57u) * c2[l]) >> 32);
      for (int l = 0; l < kBlocks; ++l) {
        uint32_t n0 = high2[l] ^ c1[l] ^ k0, n2 = high0[l] ^ c3[l] ^ k1;
        c1[l] = 0xCD9E8D57u * c2[l];
        c3[l] = 0xD2511F53u * c0[l];
        c0[l] = n0;
        c2[l] = n2;
      }
    }
    for (int l = 0; l < kBlocks; ++l) {
      words[4 * l] = c0[l];
      words[4 * l + 1] = c1[l];
      words[4 * l + 2] = c2[l];
      words[4 * l + 3] = c3[l];
    }
  }
}

HSTU_CLONES void single_blocks(uint32_t* words, int64_t blocks, uint64_t key, uint64_t counter) {
  for (int64_t block = 0; block < blocks; ++block) {
    Philox4 random = philox4x32(key, counter + uint64_t(block));
    for (int k = 0; k < 4; ++k) words[4 * block + k] = random.word[k];
  }
}

template <typename T>
HSTU_CLONES void keep_or_zero(T* y, const T* x, const uint32_t* words, uint32_t threshold, T scale, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T scaled = x[i] * scale;
    y[i] = words[i] >= threshold ? scaled : T(0);
  }
}
template void keep_or_zero<float>(float*, const float*, const uint32_t*, uint32_t, float, int64_t);
template void keep_or_zero<double>(double*, const double*, const uint32_t*, uint32_t, double, int64_t);

}  // namespace

void philox_words(uint32_t* words, int64_t first, int64_t n, uint64_t seed, uint64_t offset) {
  uint32_t block[4];
  uint64_t counter = offset + uint64_t(first) / 4;
  int64_t skip = first % 4;
  auto part = [&](int64_t begin, int64_t count) {  // of the block at the counter
    single_blocks(block, 1, seed, counter++);
    std::memcpy(words, block + begin, size_t(count) * sizeof(uint32_t));
    words += count, n -= count;
  };
  if (skip > 0 && n > 0) part(skip, std::min(n, 4 - skip));
  int64_t groups = n / (kGroups * kWords) * kGroups, blocks = n / 4 - groups * kBlocks;
  groups_of_blocks(words, groups, seed, counter);
  single_blocks(words + groups * kWords, blocks, seed, counter + uint64_t(groups) * kBlocks);
  int64_t done = groups * kWords + blocks * 4;
  words += done, n -= done, counter += uint64_t(done) / 4;
  if (n > 0) part(0, n);
}

template <typename T>
void dropout_elements(T* y, const T* x, int64_t first, int64_t n, double p, uint64_t seed, uint64_t offset) {
  uint32_t words[kBuffer];
  uint32_t threshold = dropout_threshold(p);
  T scale = T(1.0 / (1.0 - p));
  for (int64_t i = 0; i < n;) {
    int64_t count = std::min(n - i, kBuffer - (first + i) % 4);
    philox_words(words, first + i, count, seed, offset);
    keep_or_zero<T>(y + i, x + i, words, threshold, scale, count);
    i += count;
  }
}
template void dropout_elements<float>(float*, const float*, int64_t, int64_t, double, uint64_t, uint64_t);
template void dropout_elements<double>(double*, const double*, int64_t, int64_t, double, uint64_t, uint64_t);

}  // namespace hstu::cpu
