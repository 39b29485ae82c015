// What a PageManager must do, said in the plainest way: lists of tokens instead of hashes, searches instead of tables and lists. A naive
// model, compared with the manager after every operation.
#pragma once
#include <algorithm>
#include <compare>
#include <cstdint>
#include <map>
#include <set>
#include <vector>

namespace model {

using Tokens = std::vector<uint64_t>;
struct Key {
  int model = 0, tenant = 0, user = 0, seed = 0;
  auto operator<=>(const Key&) const = default;
};

// A page that was committed: it stands for all tokens from the first to its last.
struct Entry {
  Key key;
  Tokens prefix;
  int32_t page = 0;
  std::multiset<int64_t> leases;
  bool findable = true;
  int64_t released = 0, order = 0;
  bool cached() const { return findable && leases.empty(); }
};

struct Lease {
  Key key;
  Tokens tokens;
  std::vector<int32_t> pages;
  std::vector<int> entries;  // of the committed positions
  bool forgotten = false;
};

enum class Outcome { kDone, kTooLarge, kExhausted };

struct Pages {
  int64_t pool = 0, size = 1, limit = 0, ttl = 0;
  int64_t now = INT64_MIN, order = 0, next_entry = 0;
  int64_t acquired = 0, found = 0, committed = 0, duplicates = 0, evicted = 0, expired = 0, forgotten = 0, exhausted = 0;
  std::map<int, Entry> entries;
  std::map<int64_t, Lease> leases;

  std::set<int32_t> used() const {
    std::set<int32_t> pages;
    for (const auto& [id, entry] : entries) pages.insert(entry.page);
    for (const auto& [number, lease] : leases) pages.insert(lease.pages.begin(), lease.pages.end());
    return pages;
  }
  int64_t cached() const {
    return std::count_if(entries.begin(), entries.end(), [](const auto& entry) { return entry.second.cached(); });
  }
  int64_t held() const { return int64_t(used().size()) - cached(); }
  int64_t pages_of(int64_t tokens) const { return (tokens + size - 1) / size; }

  void expire(int64_t clock) {
    now = std::max(now, clock);
    expired += std::erase_if(entries, [&](const auto& e) { return e.second.cached() && now - e.second.released >= ttl; });
  }

  Entry* find(const Key& key, const Tokens& tokens, int64_t count) {
    for (auto& [id, entry] : entries)
      if (entry.findable && entry.key == key && entry.prefix == Tokens(tokens.begin(), tokens.begin() + count)) return &entry;
    return nullptr;
  }
  int id_of(const Entry* wanted) const {
    for (const auto& [id, entry] : entries)
      if (&entry == wanted) return id;
    return -1;
  }
  int64_t lookup(const Key& key, const Tokens& tokens) {
    int64_t count = 0;
    while (count + size <= int64_t(tokens.size()) && find(key, tokens, count + size)) count += size;
    return count;
  }

  // Of `wanted` pages for a lease of then `all`, of which `kept` cached ones are about to be held.
  Outcome room(int64_t wanted, int64_t kept, int64_t all) {
    if (all > limit) return Outcome::kTooLarge;
    if (held() + kept + wanted <= limit) return Outcome::kDone;
    ++exhausted;
    return Outcome::kExhausted;
  }
  void evict_for(int64_t wanted) {
    while (int64_t(used().size()) + wanted > limit && cached() > 0) {
      auto oldest = entries.end();
      for (auto i = entries.begin(); i != entries.end(); ++i)
        if (i->second.cached() && (oldest == entries.end() || i->second.order < oldest->second.order)) oldest = i;
      entries.erase(oldest);
      ++evicted;
    }
  }

  Outcome acquire(int64_t number, const Key& key, const Tokens& tokens, int64_t clock) {
    expire(clock);
    int64_t cached = lookup(key, tokens), all = pages_of(int64_t(tokens.size())), kept = 0;
    Lease lease{key, tokens, {}, {}};
    for (int64_t count = size; count <= cached; count += size) {
      Entry* entry = find(key, tokens, count);
      kept += entry->leases.empty();
      lease.entries.push_back(id_of(entry));
      lease.pages.push_back(entry->page);
    }
    if (Outcome outcome = room(all - cached / size, kept, all); outcome != Outcome::kDone) return outcome;
    for (int id : lease.entries) entries.at(id).leases.insert(number);
    evict_for(all - cached / size);
    leases[number] = lease;
    acquired += int64_t(tokens.size());
    found += cached;
    return Outcome::kDone;
  }
  Outcome append(int64_t number, const Tokens& tokens, int64_t clock) {
    expire(clock);
    Lease& lease = leases.at(number);
    int64_t all = pages_of(int64_t(lease.tokens.size() + tokens.size())), wanted = all - int64_t(lease.pages.size());
    if (Outcome outcome = room(wanted, 0, all); outcome != Outcome::kDone) return outcome;
    if (wanted > 0) evict_for(wanted);
    lease.tokens.insert(lease.tokens.end(), tokens.begin(), tokens.end());
    return Outcome::kDone;
  }
  int64_t commit(int64_t number) {
    Lease& lease = leases.at(number);
    int64_t made = 0;
    for (int64_t i = int64_t(lease.entries.size()); !lease.forgotten && (i + 1) * size <= int64_t(lease.tokens.size()); ++i) {
      Entry* there = find(lease.key, lease.tokens, (i + 1) * size);
      if (there) {
        ++duplicates;
        there->leases.insert(number);
        lease.entries.push_back(id_of(there));
        continue;
      }
      Entry entry{lease.key, Tokens(lease.tokens.begin(), lease.tokens.begin() + (i + 1) * size), lease.pages[i], {number}};
      lease.entries.push_back(int(next_entry));
      entries[int(next_entry++)] = entry;
      ++made;
    }
    committed += made;
    return made;
  }
  void release(int64_t number, int64_t clock) {
    expire(clock);
    Lease& lease = leases.at(number);
    for (size_t i = lease.entries.size(); i-- > 0;) {
      Entry& entry = entries.at(lease.entries[i]);
      entry.leases.erase(entry.leases.find(number));
      entry.released = now;
      entry.order = order++;
      if (entry.leases.empty() && !entry.findable) entries.erase(lease.entries[i]);
    }
    leases.erase(number);
    evict_for(0);
  }
  std::pair<int64_t, int64_t> forget(int tenant, int user, int64_t clock) {
    expire(clock);
    auto owned = [&](const Key& key) { return key.tenant == tenant && key.user == user; };
    std::set<int32_t> held_pages;
    for (auto& [number, lease] : leases)
      if (owned(lease.key) && !lease.forgotten) {
        lease.forgotten = true;
        held_pages.insert(lease.pages.begin(), lease.pages.end());
      }
    int64_t freed = std::erase_if(entries, [&](const auto& e) { return owned(e.second.key) && e.second.cached(); });
    for (auto& [id, entry] : entries)
      if (owned(entry.key) && entry.findable) {
        entry.findable = false;
        held_pages.insert(entry.page);
      }
    forgotten += freed + int64_t(held_pages.size());
    return {freed, int64_t(held_pages.size())};
  }
  void set_limit(int64_t pages, int64_t clock) {
    expire(clock);
    limit = std::min(pool, pages);
    evict_for(0);
  }
};

}  // namespace model
