// Closed lists: a run-time value picks one compile-time instantiation; a value outside the list throws and names the list.
#pragma once
#include <type_traits>

#include "check.h"
#include "tensor.h"

namespace hstu {

// pick<32, 64, 128>("head_dim", d, [&](auto kD) { kernel<kD>(...); })
template <int... kValues, typename Fn>
void pick(const char* what, int64_t value, Fn&& fn) {
  bool found = ((value == kValues ? (fn(std::integral_constant<int, kValues>{}), true) : false) || ...);
  if (!found) {
    std::string list;
    ((list += (list.empty() ? "" : ", ") + std::to_string(kValues)), ...);
    throw Error(kInvalidArgument, message(what, " must be one of ", list, ", got ", value));
  }
}

// pick_float(tensor dtype, [&](auto zero) { using T = decltype(zero); ... }): the CPU backend's two types.
template <typename Fn>
void pick_float(const char* op, Dtype dtype, Fn&& fn) {
  if (dtype == Dtype::kFloat32) return fn(float{});
  if (dtype == Dtype::kFloat64) return fn(double{});
  throw Error(kDtype, message(op, ": dtype must be float32 or float64 on the CPU, got ", name_of(dtype)));
}

}  // namespace hstu
