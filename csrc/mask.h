// The visibility rule and the relative-bias indices of HSTU attention: one definition for every backend.
#pragma once
#include <cstdint>

#include "math.h"

namespace hstu {

// ceil(exp(0.301 k)) for k = 1, 2, ...: the time bucket of d is the number of thresholds at or below d. The list ends where the next
// one passes 2^63, so every int64 difference has an exact bucket; a table with fewer rows clamps it.
constexpr int kTimeThresholds = 145;
constexpr int64_t kTimeThreshold[kTimeThresholds] = {
    2, 2, 3, 4, 5, 7, 9, 12, 16, 21, 28, 38, 51, 68, 92, 124, 167, 226, 305, 412, 557, 752, 1016, 1372, 1854, 2505,
    3385, 4574, 6180, 8350, 11283, 15245, 20600, 27834, 37610, 50818, 68666, 92782, 125367, 169397, 228891, 309280,
    417902, 564672, 762990, 1030960, 1393042, 1882291, 2543369, 3436624, 4643598, 6274473, 8478127, 11455724,
    15479081, 20915478, 28261189, 38186783, 51598337, 69720155, 94206525, 127292737, 171999135, 232406837, 314030289,
    424320660, 573346040, 774710524, 1046796097, 1414440665, 1911205440, 2582438644, 3489415219, 4714930440,
    6370858056, 8608362918, 11631700390, 15716862225, 21236771058, 28695323438, 38773389087, 52390965538,
    70791162047, 95653679456, 129248145233, 174641301215, 235976957620, 318854269524, 430838867570, 582153502558,
    786611250865, 1062876470327, 1436168615607, 1940564449431, 2622108811928, 3543017921206, 4787358912370,
    6468724083690, 8740600409714, 11810380924256, 15958297031977, 21563000024645, 29136127064885, 39369007066311,
    53195770115076, 71878621509799, 97123064840915, 131233592491847, 177324056098577, 239601921079808,
    323752354013490, 437457205087951, 591096262037950, 798694791013881, 1079203862655709, 1458230340644303,
    1970374458392745, 2662388374508185, 3597444042437672, 4860899995802064, 6568093482609850, 8874869269797386,
    11991806262278896, 16203440643505319, 21894240362561142, 29583702103771285, 39973774639893605, 54012937709959665,
    72982785997608452, 98615022211438422, 133249539228074495, 180048022160610520, 243282569468860584,
    328725680499695652, 444177210294629863, 600176395848399509, 810963952640975311, 1095782068459078732,
    1480630967191756526, 2000642394239968542, 2703286692174026944, 3652706231320947265, 4935570781654983716,
    6668989345994299602, 9011200702924998982};
// Bucket of 2^e: where the search for a d of e + 1 bits begins; at most three steps are left from there.
constexpr uint8_t kTimeBucketOfPower[63] = {
    0, 2, 4, 6, 9, 11, 13, 16, 18, 20, 23, 25, 27, 29, 32, 34, 36, 39, 41, 43, 46, 48, 50, 52, 55, 57, 59, 62, 64,
    66, 69, 71, 73, 75, 78, 80, 82, 85, 87, 89, 92, 94, 96, 99, 101, 103, 105, 108, 110, 112, 115, 117, 119, 122,
    124, 126, 128, 131, 133, 135, 138, 140, 142};

// Bucket of |query_time - key_time|, at most `last` = NB.
HSTU_INLINE int time_bucket(int64_t query_time, int64_t key_time, int last) {
  uint64_t d = query_time > key_time ? uint64_t(query_time) - uint64_t(key_time) : uint64_t(key_time) - uint64_t(query_time);
  if (d < 2) return 0;
  if (d >> 63) return last < kTimeThresholds ? last : kTimeThresholds;
  int bucket = kTimeBucketOfPower[63 - __builtin_clzll(d)];
  while (bucket < kTimeThresholds && d >= uint64_t(kTimeThreshold[bucket])) ++bucket;
  return bucket < last ? bucket : last;
}

// One sequence's geometry, all in key coordinates: L keys, C contextual, h where targets begin.
struct MaskShape {
  int64_t length;       // L
  int64_t contextual;   // C, already limited to h
  int64_t history;      // h = L - K
  int64_t max_attn_len; // W, 0 = no window
  int64_t min_full;     // F
  int64_t group;        // g >= 1
  bool causal;
  bool contextual_full;
};

HSTU_INLINE int64_t mask_position(const MaskShape& m, int64_t x) { return x < m.history ? x : m.history; }

HSTU_INLINE bool visible(const MaskShape& m, int64_t i, int64_t j) {
  if (i >= m.history && j >= m.history) return (j - m.history) / m.group == (i - m.history) / m.group && j <= i;
  if (j >= m.history) return false;
  if (m.contextual_full && i < m.contextual) return true;
  if (i < m.history && m.causal && j > i) return false;
  if (m.max_attn_len == 0 || j < m.contextual) return true;
  int64_t pi = mask_position(m, i), distance = pi > j ? pi - j : j - pi;
  if (distance <= m.max_attn_len) return true;
  return i >= m.history ? m.min_full > 0 : i >= m.history - m.min_full;
}

}  // namespace hstu
