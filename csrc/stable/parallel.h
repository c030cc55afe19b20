// Torch's threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

#include "stable/errors.h"

namespace lion {

// Calls body(begin, end) in parallel for parts of [0, n) of at least `grain`, which must not raise.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  check(torch_parallel_for(0, n, grain, call, const_cast<Body*>(&body)), "to work in parallel");
}

}  // namespace lion
