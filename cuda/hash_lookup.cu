#include "debug.cuh"
#include "scan.cuh"

namespace hstu::cuda {
namespace {

// A slot holds a row, kFree, or while keys are inserted the claim of the key at position t, as kFirstClaim - t. Slots are only ever taken,
// so all threads with one key walk the same slots and meet in one.
constexpr int32_t kFree = -1, kFirstClaim = -2;
constexpr int kThreads = 256;

struct Table {
  int32_t* slots;
  uint64_t mask;
  int64_t* row_keys;
  int32_t* last_used;  // or null
  int64_t* count;
  int64_t capacity;
  const int64_t* keys;
  int64_t total;
  int tick;
  __device__ bool has_room() const { return *count + total <= capacity; }
  __device__ void use(int64_t row) const {
    if (last_used) last_used[row] = tick;
  }
};

// A thread looks one key up. rows[t] = 0 where it is not there.
__global__ void __launch_bounds__(kThreads) find(int64_t* rows, Table table) {
  int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= table.total) return;
  int64_t key = table.keys[t];
  int32_t row;
  for (uint64_t at = hash_key(key);; ++at) {
    row = table.slots[at & table.mask];
    if (row < 0 || table.row_keys[row] == key) break;
  }
  rows[t] = row < 0 ? 0 : row;
  if (row > 0) table.use(row);
}

// A thread claims a slot for its key if that has no row; of several positions of a key the first prevails. taken[t]: the slot.
__global__ void __launch_bounds__(kThreads) claim(uint32_t* taken, const int64_t* rows, Table table) {
  int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= table.total || rows[t] != 0 || !table.has_room()) return;
  int64_t key = table.keys[t];
  int32_t own = kFirstClaim - int32_t(t);
  uint64_t at = hash_key(key) & table.mask;
  for (;; at = (at + 1) & table.mask) {
    int32_t* slot = table.slots + at;
    int32_t seen = *static_cast<volatile int32_t*>(slot);
    if (seen == kFree) seen = atomicCAS(slot, kFree, own);
    if (seen == kFree) break;
    if (seen <= kFirstClaim && table.keys[kFirstClaim - seen] == key) {
      atomicMax(slot, own);
      break;
    }
  }
  taken[t] = uint32_t(at);
}

// is_new[t]: 1 where t is the first position of a key without a row.
__global__ void __launch_bounds__(kThreads) mark(int32_t* is_new, const uint32_t* taken, const int64_t* rows, Table table) {
  int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= table.total) return;
  is_new[t] = rows[t] == 0 && table.has_room() && table.slots[taken[t]] == kFirstClaim - int32_t(t);
}

// rank[t]: new keys before t.
__global__ void __launch_bounds__(kThreads) give(const int32_t* is_new, const int32_t* rank, const uint32_t* taken, Table table) {
  int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= table.total || !is_new[t]) return;
  int64_t row = *table.count + rank[t];
  table.row_keys[row] = table.keys[t];
  table.slots[taken[t]] = int32_t(row);
  table.use(row);
}

__global__ void __launch_bounds__(kThreads) resolve(int64_t* rows, const uint32_t* taken, Table table) {
  int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t < table.total && rows[t] == 0 && table.has_room()) rows[t] = table.slots[taken[t]];
}

__global__ void advance(const int32_t* rank, Table table) {
  if (table.has_room()) *table.count += rank[table.total];
}

}  // namespace

void hash_lookup(Tensor& rows, Tensor& slots, Tensor& row_keys, Tensor* last_used, Tensor& count, const Tensor& keys, bool insert,
                 int tick, Stream stream) {
  Table table{slots.as<int32_t>(), uint64_t(slots.size() - 1), row_keys.as<int64_t>(), data_or_null<int32_t>(last_used),
              count.as<int64_t>(), row_keys.size(),            keys.as<int64_t>(),     keys.size(),
              tick};
  constexpr int64_t kMost = INT32_MAX - 1;
  HSTU_CHECK(table.total <= kMost && slots.size() <= int64_t(1) << 32, kInvalidArgument, "hash_lookup: at most ", kMost,
             " keys and 2^32 slots, got ", table.total, " and ", slots.size());
  if (insert && debugging()) {
    int64_t used = values_of<int64_t>(count, stream)[0];
    HSTU_CHECK(used + table.total <= table.capacity, kInvalidArgument, "hash_lookup: ", table.total, " keys might be new, but ",
               table.capacity - used, " of ", table.capacity, " rows are free");
  }
  dim3 grid(unsigned(ceil_div(table.total, kThreads)));
  int64_t* row = rows.as<int64_t>();
  launch(find, grid, kThreads, 0, stream, row, table);
  if (!insert || table.total == 0) return;
  Scratch<uint32_t> taken(table.total, stream);
  Scratch<int32_t> is_new(table.total, stream), rank(table.total + 1, stream);
  launch(claim, grid, kThreads, 0, stream, taken.get(), row, table);
  launch(mark, grid, kThreads, 0, stream, is_new.get(), taken.get(), row, table);
  exclusive_scan<int32_t, int32_t>(rank, is_new, table.total, stream);
  launch(give, grid, kThreads, 0, stream, is_new.get(), rank.get(), taken.get(), table);
  launch(resolve, grid, kThreads, 0, stream, row, taken.get(), table);
  launch(advance, 1, 1, 0, stream, rank.get(), table);
}

}  // namespace hstu::cuda
