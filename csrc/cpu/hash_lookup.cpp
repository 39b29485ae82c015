#include "../check.h"
#include "../math.h"
#include "../ops.h"
#include "threads.h"

namespace hstu::cpu {
namespace {

constexpr int64_t kTask = 4096;  // keys that a task looks up
constexpr int64_t kAhead = 16;   // keys between the prefetch of a slot and its probe

struct Table {
  int32_t* slots;
  uint64_t mask;
  int64_t* row_keys;

  // The slot that holds the key's row, or the free one where its probes end.
  int32_t& probe(int64_t key) const {
    uint64_t at = hash_key(key) & mask;
    while (slots[at] >= 0 && row_keys[slots[at]] != key) at = (at + 1) & mask;
    return slots[at];
  }
};

}  // namespace

// What is there is found by all threads; what is not is given rows by one, in order. Keys that stand twice are then found.
void hash_lookup(Tensor& rows, Tensor& slots, Tensor& row_keys, Tensor* last_used, Tensor& count, const Tensor& keys, bool insert,
                 int tick, Stream) {
  Table table{slots.as<int32_t>(), uint64_t(slots.size() - 1), row_keys.as<int64_t>()};
  const int64_t *key = keys.as<int64_t>(), total = keys.size(), capacity = row_keys.size();
  int64_t &used = *count.as<int64_t>(), *row = rows.as<int64_t>();
  int32_t* ticks = data_or_null<int32_t>(last_used);
  HSTU_CHECK(!insert || used + total <= capacity, kInvalidArgument, "hash_lookup: ", total, " keys might be new, but ", capacity - used,
             " of ", capacity, " rows are free");
  parallel_blocks(total, kTask, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (t + kAhead < end) __builtin_prefetch(table.slots + (hash_key(key[t + kAhead]) & table.mask));
      int32_t found = table.probe(key[t]);
      row[t] = found < 0 ? 0 : found;
    }
  });
  for (int64_t t = 0; t < total; ++t) {
    if (row[t] == 0 && insert) {
      int32_t& slot = table.probe(key[t]);
      if (slot < 0) {
        table.row_keys[used] = key[t];
        slot = int32_t(used++);
      }
      row[t] = slot;
    }
    if (ticks && row[t] > 0) ticks[row[t]] = tick;
  }
}

}  // namespace hstu::cpu
