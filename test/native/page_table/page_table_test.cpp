// page_table_test OPERATIONS THREADS: random operations on page managers, each compared with the naive model of model.h and with what
// was written into the pages; the hash's published vectors; what bad input throws. Ends with 1 and a line on stderr at the first difference.
#include "../../../csrc/page_table.h"

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "../../../csrc/check.h"
#include "model.h"

namespace {

using hstu::Bytes;
using model::Key;
using model::Tokens;

std::atomic<int64_t> operations{0}, hits{0}, evictions{0}, exhaustions{0}, duplicates{0}, forgotten{0};

#define EXPECT(condition)                                                              \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);   \
      std::_Exit(1);                                                                   \
    }                                                                                  \
  } while (0)

struct Random {
  uint64_t state;
  uint64_t word() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(word() % uint64_t(n)); }
  bool chance(int percent) { return below(100) < percent; }
};

Bytes bytes_of(const Tokens& tokens) { return std::as_bytes(std::span(tokens)); }

template <typename Fn>
void expect_code(const char* code, Fn&& fn) {
  try {
    fn();
  } catch (const hstu::Error& error) {
    EXPECT(std::strcmp(error.code, code) == 0);
    return;
  }
  EXPECT(!"an error is thrown");
}

// The names of a key, alive while its ChainKey is used.
struct Names {
  std::u16string model, tenant, user;
  uint64_t seed;
  explicit Names(const Key& key)
      : model(size_t(key.model), u'm'), tenant(size_t(1 + key.tenant), u't'), user(size_t(key.user), u't'), seed(uint64_t(key.seed)) {}
  hstu::ChainKey key() const { return {model, {tenant, user}, std::as_bytes(std::span(&seed, seed == 0 ? 0 : 1))}; }
};

struct Fixture {
  Random random;
  hstu::PageOptions options;
  hstu::PageManager manager;
  model::Pages naive;
  std::vector<std::pair<Key, Tokens>> written;  // what the rows of each page were computed from
  std::map<std::pair<Key, Tokens>, std::vector<hstu::Hash128>> known;
  std::map<int64_t, int> leases;
  std::array<Tokens, 6> histories;
  int64_t now;

  Fixture(uint64_t seed, const hstu::PageOptions& options)
      : random{seed}, options(options), manager(options), written(size_t(options.pages)), now(random.below(1000)) {
    naive.pool = options.pages, naive.size = options.page_size, naive.ttl = options.ttl;
    naive.limit = std::min(options.pages, options.byte_limit / options.page_bytes);
  }

  Key some_key(int user) { return {int(random.below(8)) == 0, user % 2, user / 2, int(random.below(8)) == 0}; }

  void change_history(Tokens& history) {
    size_t size = history.size();
    switch (random.below(8)) {
      case 0:  // edited
        if (size > 0) history[size_t(random.below(int64_t(size)))] = random.word() % 3;
        break;
      case 1:  // cut short
        history.resize(size_t(random.below(int64_t(size) + 1)));
        break;
      case 2:  // reordered
        if (size > 1) std::swap(history[size_t(random.below(int64_t(size)))], history[size - 1]);
        break;
      case 3:
        if (size > 0 && random.chance(20)) history.erase(history.begin());
        break;
      default:
        for (int64_t i = random.below(4); i >= 0 && history.size() < 40; --i) history.push_back(random.word() % 3);
    }
  }

  // The lease has the pages that the model knows of, new ones are in nobody's hands, and the found ones hold the rows of these tokens.
  void check_pages(int64_t number, const std::set<int32_t>& before) {
    const hstu::Lease& lease = manager.lease(number);
    model::Lease& expected = naive.leases.at(number);
    int64_t tokens = int64_t(expected.tokens.size());
    EXPECT(lease.tokens == tokens && int64_t(lease.pages.size()) == naive.pages_of(tokens));
    std::set<int32_t> distinct(lease.pages.begin(), lease.pages.end());
    EXPECT(distinct.size() == lease.pages.size());
    for (size_t i = 0; i < lease.pages.size(); ++i) {
      int32_t page = lease.pages[i];
      EXPECT(page >= 0 && page < options.pages);
      int64_t end = std::min(tokens, int64_t(i + 1) * options.page_size);
      std::pair content(expected.key, Tokens(expected.tokens.begin(), expected.tokens.begin() + end));
      if (i < expected.pages.size()) {
        EXPECT(page == expected.pages[i]);
        if (i < expected.entries.size()) EXPECT(written[page] == content);
      } else {
        EXPECT(!before.contains(page));
      }
      written[page] = content;
    }
    expected.pages = lease.pages;
  }

  template <typename Fn>
  bool same(model::Outcome outcome, Fn&& call) {
    if (outcome == model::Outcome::kDone) return call(), true;
    expect_code(outcome == model::Outcome::kTooLarge ? "ERR_HSTU_OUT_OF_MEMORY" : "ERR_HSTU_OVERLOADED", call);
    return false;
  }

  int64_t some_lease() {
    auto at = naive.leases.begin();
    std::advance(at, random.below(int64_t(naive.leases.size())));
    return at->first;
  }

  void acquire() {
    int user = int(random.below(6));
    if (random.chance(40)) change_history(histories[size_t(user)]);
    Key key = some_key(user);
    const Tokens& tokens = histories[size_t(user)];
    int64_t number = next_lease;
    if (known.size() > 500) known.clear();
    std::vector<hstu::Hash128>& hashes = known.try_emplace({key, tokens}, size_t(random.below(9))).first->second;
    std::span<hstu::Hash128> given = random.chance(50) ? std::span(hashes) : std::span<hstu::Hash128>();
    bool done = same(naive.acquire(number, key, tokens, now),
                     [&] { EXPECT(manager.acquire(Names(key).key(), bytes_of(tokens), now, given) == number); });
    if (!done) return;
    ++next_lease;
    EXPECT(manager.lease(number).cached == int64_t(naive.leases.at(number).entries.size()) * options.page_size);
    check_pages(number, naive.used());
  }

  void append() {
    int64_t number = some_lease();
    Tokens more(size_t(random.below(5)));
    for (uint64_t& token : more) token = random.word() % 3;
    if (same(naive.append(number, more, now), [&] { manager.append(number, bytes_of(more), now); })) check_pages(number, naive.used());
  }

  void step() {
    int64_t kind = random.below(100);
    if (kind < 12) now += random.below(8);
    else if (kind < 14) now -= random.below(8);  // a clock that goes back does no harm
    else if (kind < 40 || naive.leases.empty()) acquire();
    else if (kind < 50) append();
    else if (kind < 70) {
      int64_t number = some_lease();
      EXPECT(manager.commit(number) == naive.commit(number));
    } else if (kind < 95) {
      int64_t number = some_lease();
      manager.release(number, now);
      naive.release(number, now);
      expect_code("ERR_HSTU_INVALID_ARGUMENT", [&] { manager.release(number, now); });
    } else if (kind < 98) {
      int user = int(random.below(6));
      Names names({0, user % 2, user / 2, 0});
      hstu::ForgottenPages result = manager.forget({names.tenant, names.user}, now);
      EXPECT(std::pair(result.freed, result.held) == naive.forget(user % 2, user / 2, now));
    } else {
      int64_t pages = random.chance(50) ? options.pages : random.below(options.pages + 1);
      manager.set_byte_limit(pages * options.page_bytes + random.below(options.page_bytes), now);
      naive.set_limit(pages, now);
    }
    compare();
  }

  void compare() {
    hstu::PageStatistics s = manager.statistics();
    int64_t cached = naive.cached(), used = int64_t(naive.used().size());
    EXPECT(s.cached == cached && s.held == used - cached && s.free == options.pages - used && s.bytes == used * options.page_bytes);
    EXPECT(s.pages == options.pages && s.limit == naive.limit && s.leases == int64_t(naive.leases.size()));
    EXPECT(s.acquired_tokens == naive.acquired && s.cached_tokens == naive.found && s.committed == naive.committed);
    EXPECT(s.duplicates == naive.duplicates && s.evicted == naive.evicted && s.expired == naive.expired);
    EXPECT(s.forgotten == naive.forgotten && s.exhausted == naive.exhausted);
  }

  // Every history of every user is found as far as the model finds it; no page is cached without the one before it.
  void compare_all() {
    naive.expire(now);
    for (int user = 0; user < 6; ++user)
      for (int variant = 0; variant < 4; ++variant) {
        Key key{variant / 2, user % 2, user / 2, variant % 2};
        for (const Tokens& tokens : histories)
          EXPECT(manager.lookup(Names(key).key(), bytes_of(tokens), now) == naive.lookup(key, tokens));
      }
    for (const auto& [id, entry] : naive.entries)
      if (int64_t before = int64_t(entry.prefix.size()) - options.page_size; entry.findable && before > 0)
        EXPECT(naive.find(entry.key, entry.prefix, before));
    compare();
  }

  int64_t next_lease = 1;
};

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
