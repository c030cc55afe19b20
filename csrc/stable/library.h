// Registers ops through torch's stable ABI, in a namespace that is known at run time only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/version.h>

#include <cstdint>
#include <initializer_list>
#include <set>
#include <stdexcept>
#include <string>

#include "stable/errors.h"

namespace lion {

struct Implementation {
  const char* op;
  void (*run)(StableIValue*, uint64_t, uint64_t);  // boxed.h
};

// Stands for as long as the process does: the library of torch is never deleted. Torch would only
// warn where an op has an implementation already.
inline void implement(const char* name_space, const char* device,
                      std::initializer_list<Implementation> implementations) {
  static std::set<std::string> taken;
  const std::string place = std::string("torch.ops.") + name_space + " for " + device + " tensors";
  if (!taken.insert(place).second)
    throw std::runtime_error("lion_kernels is registered in " + place + " already");
  TorchLibraryHandle library = nullptr;
  check(aoti_torch_library_init_impl(name_space, device, __FILE__, __LINE__, &library),
        "to register ops in ", name_space);
  // The version says how values lie on the stack. Torch's headers name their own, for they take the
  // values; here boxed.h does, as torch 2.11 lays them, whatever headers it is built with.
  for (const Implementation& each : implementations)
    check(torch_library_impl(library, each.op, each.run, TORCH_TARGET_VERSION), "to register ",
          each.op);
}

}  // namespace lion
