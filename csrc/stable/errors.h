// How the ops refuse: std::invalid_argument, which arrives in Python as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace lion {

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void raise_value_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace lion

// Raises ValueError unless the rule holds; the message is built only then.
#define LION_CHECK(holds, ...)                                                     \
  do {                                                                             \
    if (__builtin_expect(!(holds), false)) ::lion::raise_value_error(__VA_ARGS__); \
  } while (false)
