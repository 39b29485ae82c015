// The page manager for JavaScript: an object is tagged and wrapped with one, as a Tensor is with its handle.
#include <algorithm>
#include <cmath>

#include "boundary.h"
#include "page_table.h"

namespace hstu {
namespace {

constexpr napi_type_tag kPagesTag = {0x68737475a1b70c3dULL, 0x8e5f26d4093bc71aULL};

PageManager& manager_of(napi_env env, napi_value object) {
  napi_valuetype type;
  bool tagged = false;
  void* data = nullptr;
  HSTU_CHECK(napi_typeof(env, object, &type) == napi_ok && type == napi_object, kInvalidArgument, "not a page manager");
  HSTU_CHECK(napi_check_object_type_tag(env, object, &kPagesTag, &tagged) == napi_ok && tagged, kInvalidArgument, "not a page manager");
  HSTU_CHECK(napi_unwrap(env, object, &data) == napi_ok, kInvalidArgument, "not a page manager");
  return *static_cast<PageManager*>(data);
}

// A whole number; infinity is the largest. NaN is none.
int64_t whole(napi_env env, napi_value value, const char* name) {
  double number = 0;
  HSTU_CHECK(napi_get_value_double(env, value, &number) == napi_ok, kInvalidArgument, "page manager: ", name, " must be a number");
  HSTU_CHECK(std::trunc(number) == number, kInvalidArgument, "page manager: ", name, " must be a whole number, got ", number);
  return std::abs(number) < 0x1p63 ? int64_t(number) : number > 0 ? INT64_MAX : INT64_MIN;
}

// The bytes of a typed array, while the call lasts.
Bytes bytes_of(napi_env env, napi_value value, const char* name) {
  bool typed = false, detached = false;
  void* data = nullptr;
  napi_value buffer;
  HSTU_CHECK(napi_is_typedarray(env, value, &typed) == napi_ok && typed, kInvalidArgument, "page manager: ", name, " must be a typed array");
  napi_get_typedarray_info(env, value, nullptr, nullptr, &data, &buffer, nullptr);
  napi_is_detached_arraybuffer(env, buffer, &detached);
  HSTU_CHECK(!detached, kInvalidArgument, "page manager: ", name, " is of a buffer that is detached");
  return {static_cast<const std::byte*>(data), Napi::TypedArray(env, value).ByteLength()};
}

// In UTF-16, which tells every two strings of JavaScript apart.
std::u16string text_of(napi_env env, napi_value value, const char* name) {
  size_t length = 0;
  HSTU_CHECK(napi_get_value_string_utf16(env, value, nullptr, 0, &length) == napi_ok, kInvalidArgument, "page manager: ", name, " must be a string");
  std::u16string text(length, u'\0');
  napi_get_value_string_utf16(env, value, text.data(), length + 1, nullptr);
  return text;
}

// {model, tenant, user, seed}
struct Key {
  std::u16string model, tenant, user;
  Bytes seed;
  Key(napi_env env, napi_value value) {
    Napi::Object object = Napi::Value(env, value).ToObject();
    model = text_of(env, object.Get("model"), "model");
    tenant = text_of(env, object.Get("tenant"), "tenant");
    user = text_of(env, object.Get("user"), "user");
    seed = bytes_of(env, object.Get("seed"), "seed");
  }
  operator ChainKey() const { return {model, {tenant, user}, seed}; }
};

napi_value pages_of(napi_env env, const Lease& lease) {
  Napi::Int32Array pages = Napi::Int32Array::New(env, lease.pages.size());
  std::copy(lease.pages.begin(), lease.pages.end(), pages.Data());
  return pages;
}

// pages_create(object, {pages, pageSize, pageBytes, tokenBytes, byteLimit, ttl, secret})
napi_value pages_create(napi_env env, const napi_value* arguments) {
  Napi::Object given = Napi::Value(env, arguments[1]).ToObject();
  auto number = [&](const char* name) { return whole(env, given.Get(name), name); };
  PageOptions options{number("pages"), number("pageSize"), number("pageBytes"), number("tokenBytes"), number("byteLimit"), number("ttl"), {}};
  Bytes secret = bytes_of(env, given.Get("secret"), "secret");
  HSTU_CHECK(secret.size() == sizeof options.secret, kInvalidArgument, "page manager: secret must have 16 bytes, got ", secret.size());
  std::memcpy(&options.secret, secret.data(), sizeof options.secret);
  auto manager = std::make_unique<PageManager>(options);
  auto finalize = [](napi_env, void* data, void*) { delete static_cast<PageManager*>(data); };
  HSTU_CHECK(napi_type_tag_object(env, arguments[0], &kPagesTag) == napi_ok &&
                 napi_wrap(env, arguments[0], manager.get(), finalize, nullptr, nullptr) == napi_ok,
             kInvalidArgument, "cannot wrap this object as a page manager");
  manager.release();
  return nullptr;
}

// pages_lookup(object, key, tokens, now): how many tokens are cached
napi_value pages_lookup(napi_env env, const napi_value* arguments) {
  PageManager& manager = manager_of(env, arguments[0]);
  Key key(env, arguments[1]);
  return Napi::Number::New(env, double(manager.lookup(key, bytes_of(env, arguments[2], "tokens"), whole(env, arguments[3], "now"))));
}

// pages_acquire(object, key, tokens, now, hashes): {lease, cached, pages}; `hashes` has two words for each that is known or has room
napi_value pages_acquire(napi_env env, const napi_value* arguments) {
  PageManager& manager = manager_of(env, arguments[0]);
  Key key(env, arguments[1]);
  napi_valuetype type;
  napi_typeof(env, arguments[4], &type);
  Bytes hashes = type == napi_undefined ? Bytes() : bytes_of(env, arguments[4], "hashes");
  auto* known = reinterpret_cast<Hash128*>(const_cast<std::byte*>(hashes.data()));
  HSTU_CHECK(reinterpret_cast<uintptr_t>(known) % alignof(Hash128) == 0, kInvalidArgument, "page manager: hashes must be of 64 bits each");
  int64_t now = whole(env, arguments[3], "now");
  int64_t lease = manager.acquire(key, bytes_of(env, arguments[2], "tokens"), now, {known, hashes.size() / sizeof(Hash128)});
  try {
    Napi::Object result = Napi::Object::New(env);
    result.Set("lease", double(lease));
    result.Set("cached", double(manager.lease(lease).cached));
    result.Set("pages", pages_of(env, manager.lease(lease)));
    return result;
  } catch (...) {
    manager.release(lease, now);  // nobody has got it
    throw;
  }
}

// pages_append(object, lease, tokens, now): the pages of all its tokens
napi_value pages_append(napi_env env, const napi_value* arguments) {
  PageManager& manager = manager_of(env, arguments[0]);
  int64_t lease = whole(env, arguments[1], "lease");
  manager.append(lease, bytes_of(env, arguments[2], "tokens"), whole(env, arguments[3], "now"));
  return pages_of(env, manager.lease(lease));
}

// pages_commit(object, lease): how many pages became findable
napi_value pages_commit(napi_env env, const napi_value* arguments) {
  return Napi::Number::New(env, double(manager_of(env, arguments[0]).commit(whole(env, arguments[1], "lease"))));
}

// pages_release(object, lease, now)
napi_value pages_release(napi_env env, const napi_value* arguments) {
  manager_of(env, arguments[0]).release(whole(env, arguments[1], "lease"), whole(env, arguments[2], "now"));
  return nullptr;
}

// pages_forget(object, tenant, user, now): {freed, held}
napi_value pages_forget(napi_env env, const napi_value* arguments) {
  PageManager& manager = manager_of(env, arguments[0]);
  std::u16string tenant = text_of(env, arguments[1], "tenant"), user = text_of(env, arguments[2], "user");
  ForgottenPages forgotten = manager.forget({tenant, user}, whole(env, arguments[3], "now"));
  Napi::Object result = Napi::Object::New(env);
  result.Set("freed", double(forgotten.freed));
  result.Set("held", double(forgotten.held));
  return result;
}

// pages_set_byte_limit(object, bytes, now)
napi_value pages_set_byte_limit(napi_env env, const napi_value* arguments) {
  manager_of(env, arguments[0]).set_byte_limit(whole(env, arguments[1], "byteLimit"), whole(env, arguments[2], "now"));
  return nullptr;
}

// pages_statistics(object, now)
napi_value pages_statistics(napi_env env, const napi_value* arguments) {
  PageManager& manager = manager_of(env, arguments[0]);
  manager.expire(whole(env, arguments[1], "now"));
  PageStatistics s = manager.statistics();
  Napi::Object result = Napi::Object::New(env);
  const std::pair<const char*, int64_t> values[] = {
      {"pages", s.pages}, {"limit", s.limit}, {"free", s.free}, {"cached", s.cached}, {"held", s.held}, {"leases", s.leases}, {"bytes", s.bytes},
      {"acquiredTokens", s.acquired_tokens}, {"cachedTokens", s.cached_tokens}, {"committed", s.committed}, {"duplicates", s.duplicates},
      {"evicted", s.evicted}, {"expired", s.expired}, {"forgotten", s.forgotten}, {"exhausted", s.exhausted}};
  for (auto [name, value] : values) result.Set(name, double(value));
  return result;
}

}  // namespace

void register_pages(Napi::Object exports) {
  add_function(exports, "pages_create", pages_create);
  add_function(exports, "pages_lookup", pages_lookup);
  add_function(exports, "pages_acquire", pages_acquire);
  add_function(exports, "pages_append", pages_append);
  add_function(exports, "pages_commit", pages_commit);
  add_function(exports, "pages_release", pages_release);
  add_function(exports, "pages_forget", pages_forget);
  add_function(exports, "pages_set_byte_limit", pages_set_byte_limit);
  add_function(exports, "pages_statistics", pages_statistics);
}

}  // namespace hstu
