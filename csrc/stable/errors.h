// How the ops refuse: std::invalid_argument, which arrives in Python as ValueError, up to
// torch 2.14. Torch 2.15 makes a RuntimeError of all that an op throws: lion_kernels/declare.py
// asks what it was.
#pragma once

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

}  // namespace lion

// Raises ValueError unless the rule holds; the message is built only then.
#define LION_CHECK(holds, ...)                                                     \
  do {                                                                             \
    if (__builtin_expect(!(holds), false)) ::lion::raise_value_error(__VA_ARGS__); \
  } while (false)
