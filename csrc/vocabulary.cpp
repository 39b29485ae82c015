// Vocabularies for JavaScript: an object is tagged and wrapped with a table from external ids, texts of UTF-16 code units that lie one
// after the other, to their numbers. Id k of the list is number k + 1; 0 is unknown.
#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <random>
#include <vector>

#include "boundary.h"

namespace hstu {
namespace {

constexpr napi_type_tag kVocabularyTag = {0x68737475766f6361ULL, 0x62756c6172790a01ULL};

struct Texts {
  const char16_t* units;
  size_t size;
  const int32_t* ends;
  size_t count;

  size_t begin(size_t i) const { return i == 0 ? 0 : size_t(ends[i - 1]); }
  std::u16string_view operator[](size_t i) const { return {units + begin(i), size_t(ends[i]) - begin(i)}; }
  void check() const {
    int64_t last = 0;
    for (size_t i = 0; i < count; last = ends[i++])
      HSTU_CHECK(ends[i] >= last && size_t(ends[i]) <= size, kInvalidArgument, "vocabulary: text ", i, " ends at ", ends[i], " of ", size);
  }
};

uint64_t mixed(uint64_t a, uint64_t b) {
  unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return uint64_t(product) ^ uint64_t(product >> 64);
}

uint64_t word_at(const char16_t* units) {
  uint64_t word;
  std::memcpy(&word, units, sizeof word);
  return word;
}

// Of this process: nobody can choose ids that share a hash.
const uint64_t kSeed = [] {
  std::random_device random;
  return uint64_t(random()) << 32 | random();
}();

// Of four units at a time, the last four of a longer text whatever was taken of them before.
constexpr size_t kWord = 4;

uint32_t hash_of(std::u16string_view text) {
  uint64_t h = kSeed + text.size(), last = 0;
  for (size_t i = 0; i + kWord < text.size(); i += kWord) h = mixed(h ^ word_at(&text[i]), 0xa0761d6478bd642fULL);
  if (text.size() >= kWord)
    last = word_at(&text[text.size() - kWord]);
  else
    for (char16_t unit : text) last = last << 16 | unit;
  return uint32_t(mixed(h ^ last, 0xe7037ed1a0b428dbULL));
}

bool same(std::u16string_view a, std::u16string_view b) {
  if (a.size() != b.size()) return false;
  if (a.size() < kWord) return std::equal(a.begin(), a.end(), b.begin());
  for (size_t i = 0; i + kWord < a.size(); i += kWord)
    if (word_at(&a[i]) != word_at(&b[i])) return false;
  return word_at(&a[a.size() - kWord]) == word_at(&b[a.size() - kWord]);
}

class Vocabulary {
 public:
  explicit Vocabulary(const Texts& ids)
      : units_(ids.units, ids.units + ids.size), ends_(ids.ends, ids.ends + ids.count), slots_(std::bit_ceil(2 * ids.count + 2)) {
    for (size_t k = 0; k < ids.count && twice_ < 0; ++k) {
      uint32_t hash = hash_of(ids[k]);
      Slot& slot = slots_[find(hash, ids[k])];
      if (slot.number > 0) twice_ = int64_t(k);
      slot = {hash, int32_t(k + 1)};
    }
  }

  int64_t twice() const { return twice_; }  // the first id that is there a second time; -1

  // Numbers of ids first .. What a lookup reads lies anywhere: it is asked for ahead, for a block of ids at once.
  void numbers(const Texts& ids, size_t first, int32_t* numbers) const {
    uint32_t hashes[kBlock];
    for (; first < ids.count; first += kBlock, numbers += kBlock) {
      size_t count = std::min(kBlock, ids.count - first);
      for (size_t i = 0; i < count; ++i) {
        hashes[i] = hash_of(ids[first + i]);
        __builtin_prefetch(&slots_[hashes[i] & mask()]);
      }
      for (size_t i = 0; i < count; ++i) {
        numbers[i] = slots_[hashes[i] & mask()].number;
        if (numbers[i] > 0) __builtin_prefetch(&ends_[numbers[i] - 1]);
      }
      for (size_t i = 0; i < count; ++i)
        if (numbers[i] > 0) __builtin_prefetch(&units_[texts().begin(numbers[i] - 1)]);
      for (size_t i = 0; i < count; ++i) numbers[i] = slots_[find(hashes[i], ids[first + i])].number;
    }
  }

  // The same of whole numbers, which stand for their digits.
  void numbers(const int64_t* ids, size_t count, int32_t* numbers) const {
    char16_t units[kBlock * kDigits];
    int32_t ends[kBlock];
    for (size_t first = 0; first < count; first += kBlock) {
      size_t block = std::min(kBlock, count - first), size = 0;
      for (size_t i = 0; i < block; ++i) {
        char digits[kDigits];
        char* end = std::to_chars(digits, digits + kDigits, ids[first + i]).ptr;
        size = size_t(std::copy(digits, end, units + size) - units);
        ends[i] = int32_t(size);
      }
      this->numbers({units, size, ends, block}, 0, numbers + first);
    }
  }

 private:
  struct Slot {
    uint32_t hash = 0;
    int32_t number = 0;
  };
  static constexpr size_t kBlock = 128, kDigits = 20;

  Texts texts() const { return {units_.data(), units_.size(), ends_.data(), ends_.size()}; }
  size_t mask() const { return slots_.size() - 1; }
  // Where the id is, or would be.
  size_t find(uint32_t hash, std::u16string_view id) const {
    size_t at = hash & mask();
    for (; slots_[at].number > 0; at = (at + 1) & mask())
      if (slots_[at].hash == hash && same(texts()[slots_[at].number - 1], id)) break;
    return at;
  }

  std::vector<char16_t> units_;
  std::vector<int32_t> ends_;
  std::vector<Slot> slots_;
  int64_t twice_ = -1;
};

// The elements of a typed array of this type, while the call lasts.
template <typename T>
std::pair<T*, size_t> elements(napi_env env, napi_value value, napi_typedarray_type wanted, const char* name) {
  bool typed = false, detached = false;
  napi_typedarray_type type;
  size_t length = 0;
  void* data = nullptr;
  napi_value buffer;
  HSTU_CHECK(napi_is_typedarray(env, value, &typed) == napi_ok && typed, kInvalidArgument, "vocabulary: ", name, " must be a typed array");
  napi_get_typedarray_info(env, value, &type, &length, &data, &buffer, nullptr);
  HSTU_CHECK(type == wanted, kInvalidArgument, "vocabulary: ", name, " is a typed array of another kind");
  napi_is_detached_arraybuffer(env, buffer, &detached);
  HSTU_CHECK(!detached, kInvalidArgument, "vocabulary: ", name, " is of a buffer that is detached");
  return {static_cast<T*>(data), length};
}

Texts texts_of(napi_env env, napi_value units, napi_value ends) {
  auto [unit, size] = elements<const char16_t>(env, units, napi_uint16_array, "units");
  auto [end, count] = elements<const int32_t>(env, ends, napi_int32_array, "ends");
  Texts texts{unit, size, end, count};
  texts.check();
  return texts;
}

const Vocabulary& vocabulary_of(napi_env env, napi_value object) {
  napi_valuetype type;
  bool tagged = false;
  void* data = nullptr;
  HSTU_CHECK(napi_typeof(env, object, &type) == napi_ok && type == napi_object &&
                 napi_check_object_type_tag(env, object, &kVocabularyTag, &tagged) == napi_ok && tagged &&
                 napi_unwrap(env, object, &data) == napi_ok,
             kInvalidArgument, "not a vocabulary");
  return *static_cast<Vocabulary*>(data);
}

// vocabulary_create(object, units, ends): the first id that is there a second time; -1
napi_value vocabulary_create(napi_env env, const napi_value* arguments) {
  auto vocabulary = std::make_unique<Vocabulary>(texts_of(env, arguments[1], arguments[2]));
  int64_t twice = vocabulary->twice();
  auto finalize = [](napi_env, void* data, void*) { delete static_cast<Vocabulary*>(data); };
  HSTU_CHECK(napi_type_tag_object(env, arguments[0], &kVocabularyTag) == napi_ok &&
                 napi_wrap(env, arguments[0], vocabulary.get(), finalize, nullptr, nullptr) == napi_ok,
             kInvalidArgument, "cannot wrap this object as a vocabulary");
  vocabulary.release();
  return Napi::Number::New(env, double(twice));
}

// vocabulary_texts(object, units, ends, first, numbers): fills `numbers` with those of texts first ..
napi_value vocabulary_texts(napi_env env, const napi_value* arguments) {
  const Vocabulary& vocabulary = vocabulary_of(env, arguments[0]);
  Texts ids = texts_of(env, arguments[1], arguments[2]);
  double first = -1;
  napi_get_value_double(env, arguments[3], &first);
  auto [numbers, count] = elements<int32_t>(env, arguments[4], napi_int32_array, "numbers");
  HSTU_CHECK(first >= 0 && first + double(count) == double(ids.count), kInvalidArgument, "vocabulary: ", ids.count, " texts from ", first,
             " on are not ", count, " numbers");
  vocabulary.numbers(ids, size_t(first), numbers);
  return nullptr;
}

// vocabulary_digits(object, ids, numbers): the same of whole numbers
napi_value vocabulary_digits(napi_env env, const napi_value* arguments) {
  const Vocabulary& vocabulary = vocabulary_of(env, arguments[0]);
  auto [ids, size] = elements<const int64_t>(env, arguments[1], napi_bigint64_array, "ids");
  auto [numbers, count] = elements<int32_t>(env, arguments[2], napi_int32_array, "numbers");
  HSTU_CHECK(size == count, kInvalidArgument, "vocabulary: ", size, " ids are not ", count, " numbers");
  vocabulary.numbers(ids, size, numbers);
  return nullptr;
}

}  // namespace

void register_vocabulary(Napi::Object exports) {
  add_function(exports, "vocabulary_create", vocabulary_create);
  add_function(exports, "vocabulary_texts", vocabulary_texts);
  add_function(exports, "vocabulary_digits", vocabulary_digits);
}

}  // namespace hstu
