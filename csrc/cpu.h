// What the CPU ops share: the SIMD level in use and the argument checks of a list of tensors.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "bitplanes.h"
#include "rows.h"

namespace lion {

// The row kernels in use: the best level of this machine, or what LION_KERNELS_SIMD names.
const RowKernels& rows();
std::vector<std::string> simd_levels();
void set_simd_level(const std::string& name);

// The kernel dtype of a tensor; raises where the storage type is not supported.
DType dtype_of(const at::Tensor& tensor, const char* list, int64_t index);

// Raises unless `tensor` occupies one gapless run of storage and, where `like` is given, has its
// shape and strides: then element i of the storage means the same element in both.
void check_dense(const at::Tensor& tensor, const char* list, int64_t index,
                 const at::Tensor* like = nullptr);

// Raises unless a 0-d or one-element tensor; reads it.
double scalar_value(const at::Tensor& tensor, const char* name);

// Raises unless `planes` is int32 of shape (..., P, words) with unit stride in its last dimension.
void check_planes(const at::Tensor& planes, const char* name, int64_t dims);

inline int64_t words_of(int64_t numel) { return (numel + kBitsPerWord - 1) / kBitsPerWord; }

// Words a parallel task takes at the least: 32,768 elements.
constexpr int64_t kGrainWords = 1024;

}  // namespace lion
