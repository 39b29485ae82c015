// SipHash-2-4 with a 128-bit result: Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012), with the 128-bit output of their
// reference implementation. Keyed: who does not know the key cannot make two inputs collide.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

namespace hstu {

struct Hash128 {
  uint64_t low = 0, high = 0;
  bool operator==(const Hash128&) const = default;
};

class SipHash {
 public:
  explicit SipHash(Hash128 key)
      : v0_(key.low ^ 0x736f6d6570736575), v1_(key.high ^ 0x646f72616e646f6d ^ 0xee), v2_(key.low ^ 0x6c7967656e657261),
        v3_(key.high ^ 0x7465646279746573) {}

  SipHash& add(const void* data, size_t bytes) {
    const auto* from = static_cast<const unsigned char*>(data);
    size_t filled = length_ % 8;
    length_ += bytes;
    if (filled > 0) {
      for (; filled < 8 && bytes > 0; ++filled, --bytes) tail_ |= uint64_t(*from++) << 8 * filled;
      if (filled < 8) return *this;
      compress(tail_);
    }
    for (; bytes >= 8; from += 8, bytes -= 8) {
      uint64_t word;
      std::memcpy(&word, from, 8);
      compress(word);
    }
    tail_ = 0;
    for (size_t i = 0; i < bytes; ++i) tail_ |= uint64_t(from[i]) << 8 * i;
    return *this;
  }

  Hash128 finish() {
    compress(tail_ | uint64_t(length_) << 56);
    Hash128 result;
    v2_ ^= 0xee;
    for (int i = 0; i < 4; ++i) round();
    result.low = v0_ ^ v1_ ^ v2_ ^ v3_;
    v1_ ^= 0xdd;
    for (int i = 0; i < 4; ++i) round();
    result.high = v0_ ^ v1_ ^ v2_ ^ v3_;
    return result;
  }

 private:
  void compress(uint64_t word) {
    v3_ ^= word;
    round();
    round();
    v0_ ^= word;
  }
  void round() {
    v0_ += v1_, v1_ = std::rotl(v1_, 13) ^ v0_, v0_ = std::rotl(v0_, 32);
    v2_ += v3_, v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ += v3_, v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ += v1_, v1_ = std::rotl(v1_, 17) ^ v2_, v2_ = std::rotl(v2_, 32);
  }

  uint64_t v0_, v1_, v2_, v3_, tail_ = 0;
  size_t length_ = 0;
};
static_assert(std::endian::native == std::endian::little, "SipHash reads its words as they stand in memory");

}  // namespace hstu
