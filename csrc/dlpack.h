// What of DLPack (https://dmlc.github.io/dlpack, version 1) tells a tensor's data from its Python
// object: torch.Tensor offers it as __dlpack_c_exchange_api__, by a C ABI of its own.
#pragma once

#include <Python.h>

#include <cstdint>

namespace lion::dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dim;
  uint32_t dtype;  // code, bits and lanes
  const int64_t *sizes, *strides;
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48);

constexpr uint32_t kVersion = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

struct ExchangeApi {
  uint32_t major, minor;
  void* older;
  void *allocate, *export_tensor, *import_tensor;
  // Borrows: what the pointers of `out` lead to lives as long as the tensor. 0, or -1 with a Python
  // exception set.
  int (*describe)(PyObject* tensor, Tensor* out);
};

}  // namespace lion::dlpack
