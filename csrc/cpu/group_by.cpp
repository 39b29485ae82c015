#include "group_by.h"

#include <algorithm>
#include <vector>

#include "../check.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kMaxBuckets = 1024;
constexpr int64_t kMaxBlocks = 512;

struct Occurrence {
  uint32_t position, row;  // row within its bucket
};

HSTU_CLONES bool all_within(const int64_t* ids, int64_t count, int64_t low, int64_t high) {
  uint64_t span = uint64_t(high) - uint64_t(low), outside = 0;
  for (int64_t t = 0; t < count; ++t) outside |= uint64_t(ids[t]) - uint64_t(low) > span;
  return outside == 0;
}

}  // namespace

// Two stable passes, so that tables of any size are sorted in cache and by all threads: blocks of positions scatter their
// occurrences to buckets of consecutive rows, then each bucket is sorted by row. The partition depends on the sizes alone.
Groups::Groups(const int64_t* ids, int64_t count, int64_t num_rows) : starts(num_rows + 1), order(count) {
  HSTU_CHECK(count < (int64_t(1) << 32), kInvalidArgument, "group_by_id: ", count, " ids, at most 2^32 - 1 are supported");
  int shift = 0;
  while ((num_rows >> shift) >= kMaxBuckets) ++shift;
  int64_t buckets = (num_rows >> shift) + 1, grain = std::max<int64_t>(1 << 15, (count + kMaxBlocks - 1) / kMaxBlocks);
  int64_t blocks = (count + grain - 1) / grain;
  Scratch<int64_t> cursor(blocks * buckets, true);  // [blocks, buckets]: first counts, then where the next one goes
  Scratch<Occurrence> sorted(count);
  std::vector<int64_t> bucket_starts(buckets + 1);
  parallel_blocks(count, grain, [&](int64_t begin, int64_t end) {
    int64_t* counts = cursor + begin / grain * buckets;
    for (int64_t t = begin; t < end; ++t) ++counts[ids[t] >> shift];
  });
  int64_t total = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    bucket_starts[bucket] = total;
    for (int64_t block = 0; block < blocks; ++block) {
      int64_t counted = cursor[block * buckets + bucket];
      cursor[block * buckets + bucket] = total;
      total += counted;
    }
  }
  bucket_starts[buckets] = starts[num_rows] = count;
  parallel_blocks(count, grain, [&](int64_t begin, int64_t end) {
    int64_t* next = cursor + begin / grain * buckets;
    for (int64_t t = begin; t < end; ++t) {
      int64_t bucket = ids[t] >> shift;
      sorted[next[bucket]++] = {uint32_t(t), uint32_t(ids[t] - (bucket << shift))};
    }
  });
  parallel_for(buckets, [&](int64_t bucket) {
    int64_t first = bucket << shift, rows = std::min((bucket + 1) << shift, num_rows) - first;
    if (rows <= 0) return;
    int64_t begin = bucket_starts[bucket], end = bucket_starts[bucket + 1], next_start = begin;
    Scratch<int64_t> next(rows, true);
    for (int64_t k = begin; k < end; ++k) ++next[sorted[k].row];
    for (int64_t row = 0; row < rows; ++row) {
      int64_t counted = next[row];
      starts[first + row] = next[row] = next_start;
      next_start += counted;
    }
    for (int64_t k = begin; k < end; ++k) order[next[sorted[k].row]++] = sorted[k].position;
  });
}

void check_ids(const char* op, const char* name, const int64_t* ids, int64_t count, int64_t low, int64_t high) {
  if (low <= high && all_within(ids, count, low, high)) return;
  for (int64_t t = 0; t < count; ++t)
    HSTU_CHECK(ids[t] >= low && ids[t] <= high, kInvalidArgument, op, ": ", name, "[", t, "] = ", ids[t], " is outside ", low,
               "..", high);
}

}  // namespace hstu::cpu
