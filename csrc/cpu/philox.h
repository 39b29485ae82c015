// Draws of many elements: the same words as philox_word of math.h, element by element, but made a vector of blocks at a time.
#pragma once
#include <cstdint>

namespace hstu::cpu {

// words[i] = philox_word(seed, offset, first + i) for i in 0 .. n - 1.
void philox_words(uint32_t* words, int64_t first, int64_t n, uint64_t seed, uint64_t offset);

// Inverted dropout of elements first .. first + n - 1 of a draw: y[i] = x[i] / (1 - p) where kept, else 0. y may be x.
template <typename T>
void dropout_elements(T* y, const T* x, int64_t first, int64_t n, double p, uint64_t seed, uint64_t offset);

}  // namespace hstu::cpu
