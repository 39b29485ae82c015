// A page manager beside the naive model of model.h, and what was written into the pages; what tests count and expect.
#pragma once
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

}  // namespace
