// The argument checks that the CPU ops over lists share. All of them raise ValueError.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd/interface.h"
#include "stable/tensor.h"

namespace lion {

// The kernel dtype of a tensor; raises where the storage type is not supported.
DType dtype_of(ScalarType dtype, const char* list, int64_t index);
// The same of a momentum, which may be int8.
DType momentum_dtype_of(ScalarType dtype, int64_t index);

// Raises unless `tensor` occupies one gapless run of storage and, where `like` is given, has its
// shape and strides: then element i of the storage means the same element in both.
void check_dense(const Tensor& tensor, const char* list, int64_t index,
                 const Tensor* like = nullptr);

// Raises unless the trailers have a flag for each tensor, from first_flag on.
void check_flags(const Tensor& trailers, int64_t first_flag, size_t n_tensors);
// Raises unless the shards of a ballot or verdict are whole octets, and hold the words from
// first_word to end_word.
void check_room(int64_t first_word, int64_t end_word, const Tensor& planes, const char* name);
// Raises unless there is an int64 for each tensor.
void check_agreeing(const Tensor& agreeing, size_t n_tensors);

}  // namespace lion
