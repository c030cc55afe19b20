// Torch's threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace lion {

// Calls body(begin, end) in parallel for parts of [0, n) of at least `grain`, which must not raise.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  const auto call = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, call, const_cast<Body*>(&body)));
}

}  // namespace lion
