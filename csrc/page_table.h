// Which pages of a fixed pool hold which tokens: the cache of keys and values across requests, without the memory itself.
//
// A page holds the keys and values of page_size tokens, of all layers. A full page is known by a keyed 128-bit hash over its tokens and
// the page before it; the first page's hash is over the model's version, the tenant, the user and the seed (whatever else the rows depend
// on: contextual values, where the history is cut). So the pages of two chains are equal only if everything that entered them is.
//
// A lease holds the pages of one request: acquire() pins the longest cached prefix and takes pages for the rest, commit() makes the full
// ones findable once their rows are written, release() lets go. A page that no lease holds stays cached, or is free if it cannot be found.
// Cached pages are dropped when they have not been held for `ttl`, or, oldest first, when room is needed; a chain so loses its end first.
//
// Work grows with the tokens of the call alone. All memory but the leases' own is allocated by the constructor. An operation that throws
// has changed nothing but what expired. Not for several threads at once: a manager belongs to one engine's thread (managers share nothing).
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "hash_table.h"

namespace hstu {

using Bytes = std::span<const std::byte>;

struct PageOptions {
  int64_t pages = 0;        // of the pool, at most 2^30
  int64_t page_size = 64;   // tokens a page
  int64_t page_bytes = 0;   // of a page in the pool, for byte_limit and the statistics
  int64_t token_bytes = 8;  // what the caller gives of a token: ids, actions, times
  int64_t byte_limit = INT64_MAX;  // of pages that are held or cached
  int64_t ttl = INT64_MAX;         // in the unit of the clock that the calls are given
  Hash128 secret;                  // of this process
};

struct PageOwner {
  std::u16string_view tenant, user;
};
struct ChainKey {
  std::u16string_view model;
  PageOwner owner;
  Bytes seed;
};

struct Lease {
  std::vector<int32_t> pages;  // of all tokens, in order
  int64_t tokens = 0;
  int64_t cached = 0;  // tokens whose rows were there at acquire(): whole pages

 private:
  friend class PageManager;
  std::vector<Hash128> hashes;    // of the full pages
  std::vector<int32_t> found;     // the findable page of each hash that is committed; mostly pages[i], else one that another lease made
  std::vector<std::byte> rest;    // tokens of the page that is not full
  Hash128 chain, owner;           // the hash that the next page's goes on from
  bool forgotten = false;
};

struct ForgottenPages {
  int64_t freed = 0;
  int64_t held = 0;  // by leases, first told of by this call: never found, free when they are released
};

struct PageStatistics {
  int64_t pages = 0, limit = 0;                    // of the pool; how many byte_limit allows
  int64_t free = 0, cached = 0, held = 0;          // their sum is `pages`
  int64_t leases = 0, bytes = 0;                   // bytes of cached and held pages
  int64_t acquired_tokens = 0, cached_tokens = 0;  // asked for by acquire(), and found
  int64_t committed = 0, duplicates = 0;           // pages made findable; found to be there already
  int64_t evicted = 0, expired = 0, forgotten = 0;
  int64_t exhausted = 0;  // calls that threw ERR_HSTU_OVERLOADED
};

class PageManager {
 public:
  explicit PageManager(const PageOptions& options);  // throws ERR_HSTU_INVALID_ARGUMENT

  // `now` never goes back: a smaller one counts as the last.
  // How many of the tokens acquire() would find now.
  int64_t lookup(const ChainKey& key, Bytes tokens, int64_t now);
  // The number of a new lease. Throws ERR_HSTU_OVERLOADED where too many pages are held by leases: after a release it may fit;
  // ERR_HSTU_OUT_OF_MEMORY where the tokens take more pages than there are or byte_limit allows. `known`: the hashes of the owner, of the
  // key and of the full pages, as many as there is room for; those that are 0 are made and put there, the others are taken as they are.
  int64_t acquire(const ChainKey& key, Bytes tokens, int64_t now, std::span<Hash128> known = {});
  // Tokens after those that the lease has. Throws as acquire does.
  void append(int64_t lease, Bytes tokens, int64_t now);
  // The rows of all tokens of the lease are written, or will be before anything else that is put on the stream. Returns how many pages
  // became findable.
  int64_t commit(int64_t lease);
  // As soon as what uses the pages is on the stream, where all that uses the pool is put on one stream.
  void release(int64_t lease, int64_t now);
  const Lease& lease(int64_t lease) const;  // throws ERR_HSTU_INVALID_ARGUMENT where it was released or never was
  // Drops all of a user, of every model, seed and lease: nothing of it is found again.
  ForgottenPages forget(const PageOwner& owner, int64_t now);
  // Drops cached pages, oldest first, until no more bytes are in use or leases hold the rest.
  void set_byte_limit(int64_t bytes, int64_t now);
  void expire(int64_t now);  // what the others do first
  PageStatistics statistics() const;

 private:
  struct Page {
    Hash128 hash, owner;
    int64_t last_held = 0;
    int32_t holders = 0;              // leases
    bool findable = false;
    int32_t older = -1, newer = -1;   // among the cached ones
    int32_t before = -1, after = -1;  // among its owner's findable ones
  };

  enum class Input : uint64_t { kOwner, kChain, kPage };

  SipHash hash(Input kind) const;
  Hash128 hash_of(const PageOwner& owner) const;
  Hash128 hash_of(const ChainKey& key) const;
  int64_t count(Bytes tokens) const;
  Hash128 next(Hash128 chain, Bytes page) const;
  void add_hashes(std::vector<Hash128>& hashes, Hash128& chain, Bytes tokens, std::span<Hash128> known = {}) const;
  size_t cached_prefix(const std::vector<Hash128>& hashes) const;
  void check_room(int64_t wanted, int64_t kept, int64_t all);
  int32_t take();
  void trim();
  void hold(int32_t page);
  void let_go(int32_t page);
  void leave_cached(int32_t page);
  void drop(int32_t page);  // a cached one
  void make_findable(int32_t page, Hash128 hash, Hash128 owner);
  void hide(int32_t page);
  int64_t in_use() const { return options_.pages - int64_t(free_.size()); }
  Lease& held(int64_t lease);

  PageOptions options_;
  const size_t whole_;  // bytes of the tokens of a full page
  int64_t limit_, now_ = INT64_MIN, next_lease_ = 1;
  std::vector<Page> pages_;
  std::vector<int32_t> free_;
  HashTable findable_, owners_;  // by a page's hash; by an owner's: the first of its findable pages
  int32_t oldest_ = -1, newest_ = -1;
  int64_t cached_ = 0;
  std::unordered_map<int64_t, Lease> leases_;
  PageStatistics counts_;
};

}  // namespace hstu
