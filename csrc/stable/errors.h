// How the ops refuse: std::invalid_argument, which arrives in Python as ValueError, up to
// torch 2.14. Torch 2.15 makes a RuntimeError of all that an op throws: lion_kernels/declare.py
// asks what it was. And how they pass on what torch refuses: as RuntimeError.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace lion {

// What this thread refused last, until it is asked for.
inline thread_local std::string last_refusal;
inline std::string take_refusal() { return std::exchange(last_refusal, {}); }

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void raise_value_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  last_refusal = message.str();
  throw std::invalid_argument(last_refusal);
}

// Torch's C functions return a code. Why they failed is said by a function that came with torch
// 2.13, and is looked up, since this library also serves those before, which only print it.
[[noreturn]] inline __attribute__((noinline, cold)) void raise_torch_error(const char* asked,
                                                                           const char* of) {
  using What = const char* (*)();
  constexpr const char* kWhat = "torch_exception_get_what_without_backtrace";
  const auto what = reinterpret_cast<What>(dlsym(RTLD_DEFAULT, kWhat));
  const char* said = what == nullptr ? nullptr : what();
  std::string message = std::string("torch refused ") + asked + of;
  if (said != nullptr) message.append(": ").append(said);
  throw std::runtime_error(message);
}

// Raises RuntimeError unless torch did what it was asked for, as in ("sizes", " of a tensor").
inline void check(int32_t code, const char* asked, const char* of = "") {
  if (__builtin_expect(code != 0, false)) raise_torch_error(asked, of);
}

}  // namespace lion

// Raises ValueError unless the rule holds; the message is built only then.
#define LION_CHECK(holds, ...)                                                     \
  do {                                                                             \
    if (__builtin_expect(!(holds), false)) ::lion::raise_value_error(__VA_ARGS__); \
  } while (false)
