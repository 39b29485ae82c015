// Errors that reach JavaScript as HstuError with a stable code. Thrown, never exit or abort.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace hstu {

struct Error : std::runtime_error {
  const char* code;
  Error(const char* code, const std::string& message) : std::runtime_error(message), code(code) {}
};

constexpr char kShape[] = "ERR_HSTU_SHAPE";
constexpr char kDtype[] = "ERR_HSTU_DTYPE";
constexpr char kDisposed[] = "ERR_HSTU_DISPOSED";
constexpr char kDevice[] = "ERR_HSTU_DEVICE";
constexpr char kCudaUnavailable[] = "ERR_HSTU_CUDA_UNAVAILABLE";
constexpr char kDriverTooOld[] = "ERR_HSTU_DRIVER_TOO_OLD";
constexpr char kDeviceLost[] = "ERR_HSTU_DEVICE_LOST";
constexpr char kOutOfMemory[] = "ERR_HSTU_OUT_OF_MEMORY";
constexpr char kOverloaded[] = "ERR_HSTU_OVERLOADED";
constexpr char kInvalidArgument[] = "ERR_HSTU_INVALID_ARGUMENT";

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace hstu

// HSTU_CHECK(condition, code, parts...): throws Error{code, parts joined} unless the condition holds.
#define HSTU_CHECK(condition, code, ...)                                         \
  do {                                                                           \
    if (!(condition)) throw ::hstu::Error(code, ::hstu::message(__VA_ARGS__));   \
  } while (0)
