// 128-bit hashes to numbers: open addressing with linear probing in a table of fixed size, made whole by every erase.
#pragma once
#include <bit>
#include <vector>

#include "siphash.h"

namespace hstu {

class HashTable {
 public:
  explicit HashTable(size_t most) : slots_(std::bit_ceil(2 * most)), mask_(slots_.size() - 1) {}

  int32_t find(Hash128 key) const { return slots_[slot_of(key)].value; }  // -1 where it is not
  void set(Hash128 key, int32_t value) { slots_[slot_of(key)] = {key, value}; }  // value >= 0

  // Moves back those that stand behind the hole on the way from their home.
  void erase(Hash128 key) {
    size_t hole = slot_of(key);
    if (slots_[hole].value < 0) return;
    for (size_t i = (hole + 1) & mask_; slots_[i].value >= 0; i = (i + 1) & mask_) {
      if (((i - slots_[i].key.low) & mask_) < ((i - hole) & mask_)) continue;
      slots_[hole] = slots_[i];
      hole = i;
    }
    slots_[hole].value = -1;
  }

 private:
  struct Slot {
    Hash128 key;
    int32_t value = -1;
  };
  size_t slot_of(Hash128 key) const {
    size_t i = key.low & mask_;
    while (slots_[i].value >= 0 && slots_[i].key != key) i = (i + 1) & mask_;
    return i;
  }

  std::vector<Slot> slots_;
  size_t mask_;
};

}  // namespace hstu
