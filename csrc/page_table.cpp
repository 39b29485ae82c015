#include "page_table.h"

#include <algorithm>

#include "check.h"

namespace hstu {
namespace {

void add(SipHash& hash, std::u16string_view text) {
  uint64_t length = text.size();  // before the text, so that no two lists of texts read the same
  hash.add(&length, sizeof length).add(text.data(), text.size() * sizeof(char16_t));
}

Hash128 once(std::span<Hash128> known, size_t i, const auto& make) {
  if (i >= known.size()) return make();
  return known[i] == Hash128{} ? known[i] = make() : known[i];
}

int64_t pages_of(int64_t tokens, int64_t size) { return tokens / size + (tokens % size != 0); }

}  // namespace

PageManager::PageManager(const PageOptions& options)
    : options_([&] {
        auto wants = [](bool condition, const char* name, int64_t value, const char* what) {
          HSTU_CHECK(condition, kInvalidArgument, "page manager: ", name, " must be ", what, ", got ", value);
        };
        wants(options.pages >= 1 && options.pages <= int64_t(1) << 30, "pages", options.pages, "1 to 2^30");
        wants(options.page_size >= 1 && options.page_size <= 1 << 20, "pageSize", options.page_size, "1 to 2^20");
        wants(options.page_bytes >= 1 && options.page_bytes <= int64_t(1) << 32, "pageBytes", options.page_bytes, "1 to 2^32");
        wants(options.token_bytes >= 1 && options.token_bytes <= 1 << 20, "tokenBytes", options.token_bytes, "1 to 2^20");
        wants(options.byte_limit >= 0, "byteLimit", options.byte_limit, "0 or more");
        wants(options.ttl >= 1, "ttl", options.ttl, "at least 1");
        return options;
      }()),
      whole_(size_t(options.page_size * options.token_bytes)),
      limit_(std::min(options.pages, options.byte_limit / options.page_bytes)),
      pages_(size_t(options.pages)),
      findable_(options.pages),
      owners_(options.pages) {
  free_.reserve(size_t(options.pages));
  for (int64_t page = options.pages; page-- > 0;) free_.push_back(int32_t(page));
}

// Inputs of different kinds never read the same.
SipHash PageManager::hash(Input kind) const {
  SipHash hash(options_.secret);
  hash.add(&kind, sizeof kind);
  return hash;
}

Hash128 PageManager::hash_of(const PageOwner& owner) const {
  SipHash owned = hash(Input::kOwner);
  add(owned, owner.tenant);
  add(owned, owner.user);
  return owned.finish();
}

Hash128 PageManager::hash_of(const ChainKey& key) const {
  SipHash chain = hash(Input::kChain);
  for (std::u16string_view text : {key.model, key.owner.tenant, key.owner.user}) add(chain, text);
  return chain.add(key.seed.data(), key.seed.size()).finish();
}

int64_t PageManager::count(Bytes tokens) const {
  HSTU_CHECK(tokens.size() % size_t(options_.token_bytes) == 0, kInvalidArgument, "page manager: ", tokens.size(),
             " bytes are no whole tokens of ", options_.token_bytes);
  return int64_t(tokens.size()) / options_.token_bytes;
}

Hash128 PageManager::next(Hash128 chain, Bytes page) const {
  return hash(Input::kPage).add(&chain, sizeof chain).add(page.data(), page.size()).finish();
}

void PageManager::add_hashes(std::vector<Hash128>& hashes, Hash128& chain, Bytes tokens, std::span<Hash128> known) const {
  hashes.reserve(hashes.size() + tokens.size() / whole_);
  for (size_t i = 0; tokens.size() >= whole_; ++i, tokens = tokens.subspan(whole_))
    hashes.push_back(chain = once(known, i, [&] { return next(chain, tokens.first(whole_)); }));
}

size_t PageManager::cached_prefix(const std::vector<Hash128>& hashes) const {
  size_t count = 0;
  while (count < hashes.size() && findable_.find(hashes[count]) >= 0) ++count;
  return count;
}

void PageManager::expire(int64_t now) {
  now_ = std::max(now_, now);
  for (; oldest_ >= 0 && uint64_t(now_) - uint64_t(pages_[oldest_].last_held) >= uint64_t(options_.ttl); ++counts_.expired) drop(oldest_);
}

int64_t PageManager::lookup(const ChainKey& key, Bytes tokens, int64_t now) {
  int64_t cached = 0;
  count(tokens);
  expire(now);
  for (Hash128 chain = hash_of(key); tokens.size() >= whole_; tokens = tokens.subspan(whole_), cached += options_.page_size)
    if (findable_.find(chain = next(chain, tokens.first(whole_))) < 0) break;
  return cached;
}

// Throws unless `wanted` pages more can be had for a lease of then `all` pages, beside `kept` cached ones that it is about to hold.
void PageManager::check_room(int64_t wanted, int64_t kept, int64_t all) {
  HSTU_CHECK(all <= limit_, kOutOfMemory, "page manager: the tokens take ", all, " pages of ", options_.page_size, " tokens, the pool has ",
             options_.pages, " and its byte limit allows ", limit_);
  int64_t held = in_use() - cached_, room = limit_ - held - kept;
  if (wanted <= room) return;
  ++counts_.exhausted;
  throw Error(kOverloaded, message("page manager: ", wanted, " pages more are wanted, ", std::max<int64_t>(0, room),
                                   " are free or cached; ", leases_.size(), " leases hold ", held, " of ", limit_, ": release some first"));
}

int64_t PageManager::acquire(const ChainKey& key, Bytes tokens, int64_t now, std::span<Hash128> known) {
  Lease made;
  made.tokens = count(tokens);
  expire(now);
  made.owner = once(known, 0, [&] { return hash_of(key.owner); });
  made.chain = once(known, 1, [&] { return hash_of(key); });
  add_hashes(made.hashes, made.chain, tokens, known.subspan(std::min<size_t>(2, known.size())));
  size_t prefix = cached_prefix(made.hashes);
  made.cached = int64_t(prefix) * options_.page_size;
  int64_t all = pages_of(made.tokens, options_.page_size), kept = 0;
  for (size_t i = 0; i < prefix; ++i) kept += pages_[findable_.find(made.hashes[i])].holders == 0;
  check_room(all - int64_t(prefix), kept, all);
  Bytes rest = tokens.last(tokens.size() % whole_);
  made.rest.assign(rest.begin(), rest.end());
  made.pages.reserve(size_t(all));
  made.found.reserve(made.hashes.size());
  Lease& lease = leases_.try_emplace(next_lease_, std::move(made)).first->second;  // the last that can throw
  for (size_t i = 0; i < prefix; ++i) {
    int32_t page = findable_.find(lease.hashes[i]);
    hold(page);
    lease.pages.push_back(page);
    lease.found.push_back(page);
  }
  while (int64_t(lease.pages.size()) < all) lease.pages.push_back(take());
  counts_.acquired_tokens += lease.tokens;
  counts_.cached_tokens += lease.cached;
  return next_lease_++;
}

void PageManager::append(int64_t number, Bytes tokens, int64_t now) {
  Lease& lease = held(number);
  int64_t total = lease.tokens + count(tokens), all = pages_of(total, options_.page_size);
  expire(now);
  check_room(all - int64_t(lease.pages.size()), 0, all);
  std::vector<std::byte> bytes = lease.rest;
  bytes.insert(bytes.end(), tokens.begin(), tokens.end());
  std::vector<Hash128> hashes;
  Hash128 chain = lease.chain;
  add_hashes(hashes, chain, bytes);
  bytes.erase(bytes.begin(), bytes.end() - std::ptrdiff_t(bytes.size() % whole_));
  lease.found.reserve(lease.hashes.size() + hashes.size());
  lease.pages.reserve(size_t(all));
  lease.hashes.insert(lease.hashes.end(), hashes.begin(), hashes.end());  // the last that can throw
  lease.rest = std::move(bytes);
  lease.chain = chain;
  lease.tokens = total;
  while (int64_t(lease.pages.size()) < all) lease.pages.push_back(take());
}

int64_t PageManager::commit(int64_t number) {
  Lease& lease = held(number);
  int64_t made = 0;
  for (size_t i = lease.found.size(); i < lease.hashes.size() && !lease.forgotten; ++i) {
    int32_t page = findable_.find(lease.hashes[i]);
    if (page >= 0) {  // of a lease that computed the same beside this one: held too, so that no chain loses its middle first
      hold(page);
      ++counts_.duplicates;
    } else {
      make_findable(page = lease.pages[i], lease.hashes[i], lease.owner);
      ++made;
    }
    lease.found.push_back(page);
  }
  counts_.committed += made;
  return made;
}

void PageManager::release(int64_t number, int64_t now) {
  Lease& lease = held(number);
  expire(now);
  for (size_t i = lease.pages.size(); i-- > 0;) {  // the last page first: it becomes the oldest
    bool found = i < lease.found.size();
    if (found) let_go(lease.found[i]);
    if (!found || lease.found[i] != lease.pages[i]) let_go(lease.pages[i]);
  }
  leases_.erase(number);
  trim();
}

Lease& PageManager::held(int64_t number) {
  auto found = leases_.find(number);
  HSTU_CHECK(found != leases_.end(), kInvalidArgument, "page manager: there is no lease ", number, ", it was released or never was");
  return found->second;
}
const Lease& PageManager::lease(int64_t number) const { return const_cast<PageManager*>(this)->held(number); }

ForgottenPages PageManager::forget(const PageOwner& owner, int64_t now) {
  expire(now);
  Hash128 hash = hash_of(owner);
  ForgottenPages result;
  for (int32_t page; (page = owners_.find(hash)) >= 0;) {
    bool cached = pages_[page].holders == 0;
    ++(cached ? result.freed : result.held);
    if (cached) drop(page);
    else hide(page);
  }
  for (auto& [number, lease] : leases_) {
    if (lease.owner != hash || lease.forgotten) continue;
    lease.forgotten = true;
    for (size_t i = 0; i < lease.pages.size(); ++i) result.held += i >= lease.found.size() || lease.found[i] != lease.pages[i];
  }
  counts_.forgotten += result.freed + result.held;
  return result;
}

void PageManager::set_byte_limit(int64_t bytes, int64_t now) {
  HSTU_CHECK(bytes >= 0, kInvalidArgument, "page manager: byteLimit must be 0 or more, got ", bytes);
  expire(now);
  limit_ = std::min(options_.pages, bytes / options_.page_bytes);
  trim();
}

PageStatistics PageManager::statistics() const {
  PageStatistics now = counts_;
  now.pages = options_.pages;
  now.limit = limit_;
  now.free = int64_t(free_.size());
  now.cached = cached_;
  now.held = in_use() - cached_;
  now.leases = int64_t(leases_.size());
  now.bytes = in_use() * options_.page_bytes;
  return now;
}

int32_t PageManager::take() {
  for (; in_use() >= limit_; ++counts_.evicted) drop(oldest_);
  int32_t page = free_.back();
  free_.pop_back();
  pages_[page].holders = 1;
  return page;
}

void PageManager::trim() {
  for (; in_use() > limit_ && oldest_ >= 0; ++counts_.evicted) drop(oldest_);
}

void PageManager::hold(int32_t page) {
  if (pages_[page].holders++ == 0) leave_cached(page);
}

void PageManager::let_go(int32_t page) {
  Page& p = pages_[page];
  if (--p.holders > 0) return;
  if (!p.findable) return free_.push_back(page);
  p.last_held = now_;
  p.older = newest_;
  p.newer = -1;
  (newest_ >= 0 ? pages_[newest_].newer : oldest_) = page;
  newest_ = page;
  ++cached_;
}

void PageManager::leave_cached(int32_t page) {
  const Page& p = pages_[page];
  (p.older >= 0 ? pages_[p.older].newer : oldest_) = p.newer;
  (p.newer >= 0 ? pages_[p.newer].older : newest_) = p.older;
  --cached_;
}

void PageManager::drop(int32_t page) {
  leave_cached(page);
  hide(page);
  free_.push_back(page);
}

void PageManager::make_findable(int32_t page, Hash128 hash, Hash128 owner) {
  Page& p = pages_[page];
  p.hash = hash;
  p.owner = owner;
  p.findable = true;
  p.before = -1;
  p.after = owners_.find(owner);
  if (p.after >= 0) pages_[p.after].before = page;
  owners_.set(owner, page);
  findable_.set(hash, page);
}

void PageManager::hide(int32_t page) {
  Page& p = pages_[page];
  p.findable = false;
  findable_.erase(p.hash);
  if (p.after >= 0) pages_[p.after].before = p.before;
  if (p.before >= 0) pages_[p.before].after = p.after;
  else if (p.after >= 0) owners_.set(p.owner, p.after);
  else owners_.erase(p.owner);
}

}  // namespace hstu
