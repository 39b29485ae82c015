// page_table_test OPERATIONS THREADS: random operations on page managers, each compared with the naive model of model.h and with what
// was written into the pages; the hash's published vectors; what bad input throws. Ends with 1 and a line on stderr at the first difference.
#include "fixture.h"

namespace {

void random_operations(uint64_t seed, int64_t count) {
  Random random{seed};
  while (count > 0) {
    hstu::PageOptions options;
    options.pages = 1 + random.below(24);
    options.page_size = 1 + random.below(5);
    options.page_bytes = 1 + random.below(100);
    options.ttl = random.chance(50) ? INT64_MAX : 1 + random.below(200);
    options.byte_limit = random.chance(70) ? INT64_MAX : random.below(options.page_bytes * options.pages);
    options.secret = {random.word(), random.word()};
    Fixture fixture(random.word(), options);
    int64_t steps = std::min<int64_t>(count, 1 + random.below(4000));
    for (int64_t i = 0; i < steps; ++i) {
      fixture.step();
      if (i % 61 == 0) fixture.compare_all();
    }
    while (!fixture.naive.leases.empty()) {
      int64_t number = fixture.some_lease();
      fixture.manager.release(number, fixture.now);
      fixture.naive.release(number, fixture.now);
    }
    fixture.compare_all();
    hstu::PageStatistics s = fixture.manager.statistics();
    EXPECT(s.held == 0 && s.free + s.cached == options.pages);
    operations += steps, hits += s.cached_tokens, evictions += s.evicted, exhaustions += s.exhausted;
    duplicates += s.duplicates, forgotten += s.forgotten;
    count -= steps;
  }
}

// vectors.h of the reference implementation: key 00 01 .. 0f, message 00 01 .. of each length.
void hash_vectors() {
  struct Vector {
    size_t length;
    std::array<uint8_t, 16> hash;
  };
  const Vector vectors[] = {
      {0, {0xa3, 0x81, 0x7f, 0x04, 0xba, 0x25, 0xa8, 0xe6, 0x6d, 0xf6, 0x72, 0x14, 0xc7, 0x55, 0x02, 0x93}},
      {1, {0xda, 0x87, 0xc1, 0xd8, 0x6b, 0x99, 0xaf, 0x44, 0x34, 0x76, 0x59, 0x11, 0x9b, 0x22, 0xfc, 0x45}},
      {2, {0x81, 0x77, 0x22, 0x8d, 0xa4, 0xa4, 0x5d, 0xc7, 0xfc, 0xa3, 0x8b, 0xde, 0xf6, 0x0a, 0xff, 0xe4}},
      {7, {0xa1, 0xf1, 0xeb, 0xbe, 0xd8, 0xdb, 0xc1, 0x53, 0xc0, 0xb8, 0x4a, 0xa6, 0x1f, 0xf0, 0x82, 0x39}},
      {8, {0x3b, 0x62, 0xa9, 0xba, 0x62, 0x58, 0xf5, 0x61, 0x0f, 0x83, 0xe2, 0x64, 0xf3, 0x14, 0x97, 0xb4}},
      {15, {0x54, 0x93, 0xe9, 0x99, 0x33, 0xb0, 0xa8, 0x11, 0x7e, 0x08, 0xec, 0x0f, 0x97, 0xcf, 0xc3, 0xd9}},
      {63, {0x51, 0x50, 0xd1, 0x77, 0x2f, 0x50, 0x83, 0x4a, 0x50, 0x3e, 0x06, 0x9a, 0x97, 0x3f, 0xbd, 0x7c}},
  };
  uint8_t text[64];
  for (int i = 0; i < 64; ++i) text[i] = uint8_t(i);
  hstu::Hash128 key;
  std::memcpy(&key, text, sizeof key);
  for (const Vector& vector : vectors)
    for (size_t cut = 0; cut <= vector.length; ++cut)  // in two parts, cut anywhere
      for (size_t more = cut; more <= vector.length; more += 3) {
        hstu::Hash128 hash = hstu::SipHash(key).add(text, cut).add(text + cut, more - cut).add(text + more, vector.length - more).finish();
        EXPECT(std::memcmp(&hash, vector.hash.data(), sizeof hash) == 0);
      }
}

// Few homes and a full table: runs that go around the end, erased in any order.
void hash_table(uint64_t seed) {
  Random random{seed};
  hstu::HashTable table(16);
  std::map<uint64_t, int32_t> expected;
  for (int i = 0; i < 20000; ++i) {
    uint64_t n = random.word() % 40;
    hstu::Hash128 key{28 + n % 6, n};
    if (random.chance(50) && (expected.size() < 16 || expected.contains(n))) table.set(key, expected[n] = i);
    else expected.erase(n), table.erase(key);
    for (uint64_t m = 0; m < 40; ++m) EXPECT(table.find({28 + m % 6, m}) == (expected.contains(m) ? expected[m] : -1));
  }
}

void named_apart() {
  hstu::PageOptions options;
  options.pages = 8, options.page_size = 2, options.page_bytes = 1, options.secret = {1, 2};
  hstu::PageManager manager(options);
  Tokens tokens{1, 2, 3, 4, 5};
  uint64_t cut = 7;
  hstu::ChainKey key{u"m1", {u"ab", u"c"}, std::as_bytes(std::span(&cut, 1))};
  int64_t lease = manager.acquire(key, bytes_of(tokens), 0);
  EXPECT(manager.commit(lease) == 2);
  EXPECT(manager.lookup(key, bytes_of(tokens), 0) == 4);
  cut = 8;
  EXPECT(manager.lookup(key, bytes_of(tokens), 0) == 0);
  cut = 7;
  const hstu::ChainKey others[] = {
      {u"m1", {u"a", u"bc"}, key.seed}, {u"m1a", {u"b", u"c"}, key.seed}, {u"m1", {u"ab", u"c"}, {}}, {u"", {u"m1ab", u"c"}, key.seed}};
  for (const hstu::ChainKey& other : others)
    EXPECT(manager.lookup(other, bytes_of(tokens), 0) == 0);
  EXPECT(manager.forget({u"a", u"bc"}, 0).held == 0);
  EXPECT(manager.forget({u"ab", u"c"}, 0).held == 3);
  EXPECT(manager.lookup(key, bytes_of(tokens), 0) == 0);
  manager.release(lease, 0);
  EXPECT(manager.statistics().free == 8);
}

void bad_input() {
  hstu::PageOptions good;
  good.pages = 2, good.page_size = 2, good.page_bytes = 10;
  auto refused = [&](auto change) {
    hstu::PageOptions options = good;
    change(options);
    expect_code("ERR_HSTU_INVALID_ARGUMENT", [&] { hstu::PageManager{options}; });
  };
  refused([](auto& o) { o.pages = 0; });
  refused([](auto& o) { o.pages = int64_t(1) << 31; });
  refused([](auto& o) { o.page_size = 0; });
  refused([](auto& o) { o.page_bytes = 0; });
  refused([](auto& o) { o.token_bytes = 0; });
  refused([](auto& o) { o.byte_limit = -1; });
  refused([](auto& o) { o.ttl = 0; });
  hstu::PageManager manager(good);
  Tokens tokens{1, 2, 3, 4, 5};
  hstu::ChainKey key{u"m", {u"t", u"u"}, {}};
  Bytes five = bytes_of(tokens), four = five.first(32), two = five.first(16);
  expect_code("ERR_HSTU_INVALID_ARGUMENT", [&] { manager.acquire(key, five.first(9), 0); });
  expect_code("ERR_HSTU_INVALID_ARGUMENT", [&] { manager.commit(1); });
  expect_code("ERR_HSTU_OUT_OF_MEMORY", [&] { manager.acquire(key, five, 0); });
  int64_t first = manager.acquire(key, two, 0), second = manager.acquire(key, two, 0);
  expect_code("ERR_HSTU_OVERLOADED", [&] { manager.acquire(key, two, 0); });
  expect_code("ERR_HSTU_OVERLOADED", [&] { manager.append(first, two, 0); });
  expect_code("ERR_HSTU_INVALID_ARGUMENT", [&] { manager.set_byte_limit(-1, 0); });
  EXPECT(manager.statistics().exhausted == 2);
  manager.release(second, 0);  // what the caller waits for
  manager.append(first, four.last(16), 0);
  EXPECT(manager.commit(first) == 2);
  EXPECT(manager.lookup(key, four, 0) == 4);
}

}  // namespace

int main(int argc, char** argv) {
  int64_t count = argc > 1 ? std::atoll(argv[1]) : 1000000, threads = argc > 2 ? std::atoll(argv[2]) : 1;
  hash_vectors();
  hash_table(1);
  named_apart();
  bad_input();
  std::vector<std::thread> running;  // a manager each: they share nothing
  for (int64_t t = 0; t < threads; ++t) running.emplace_back(random_operations, uint64_t(1000 + t), count / threads);
  for (std::thread& thread : running) thread.join();
  std::printf("{\"operations\": %lld, \"cachedTokens\": %lld, \"evicted\": %lld, \"exhausted\": %lld, \"duplicates\": %lld, \"forgotten\": %lld}\n",
              (long long)operations, (long long)hits, (long long)evictions, (long long)exhaustions, (long long)duplicates, (long long)forgotten);
}
