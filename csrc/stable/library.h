// Registers ops through torch's stable ABI, in a namespace that is known at run time only.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/version.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <initializer_list>
#include <set>
#include <stdexcept>
#include <string>

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
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_library_init_impl(name_space, device, __FILE__, __LINE__, &library));
  for (const Implementation& each : implementations)
    TORCH_ERROR_CODE_CHECK(torch_library_impl(library, each.op, each.run, TORCH_ABI_VERSION));
}

}  // namespace lion
