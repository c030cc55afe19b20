#include "cpu/checks.h"

#include <algorithm>

#include "bitplanes.h"
#include "cpu/words.h"
#include "stable/errors.h"

namespace lion {

DType dtype_of(ScalarType dtype, const char* list, int64_t index) {
  if (dtype == dtypes::float32) return kFloat32;
  if (dtype == dtypes::bfloat16) return kBFloat16;
  LION_CHECK(dtype == dtypes::float16, list, "[", index,
             "] must be float32, bfloat16 or float16, got ", dtype);
  return kFloat16;
}

DType momentum_dtype_of(ScalarType dtype, int64_t index) {
  return dtype == dtypes::int8 ? kInt8 : dtype_of(dtype, "exp_avgs", index);
}

void check_dense(const Tensor& tensor, const char* list, int64_t index, const Tensor* like) {
  LION_CHECK(tensor.layout().is_non_overlapping_and_dense(), list, "[", index,
             "] must be dense (no gaps, no overlaps), got shape ", tensor.sizes(), " with strides ",
             tensor.strides());
  if (like == nullptr) return;
  LION_CHECK(tensor.sizes() == like->sizes(), list, "[", index, "] must have shape ", like->sizes(),
             ", got ", tensor.sizes());
  const Extents sizes = tensor.sizes(), strides = tensor.strides(), wanted = like->strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    LION_CHECK(strides[d] == wanted[d] || sizes[d] <= 1 || tensor.numel() == 0, list, "[", index,
               "] must have strides ", wanted, ", got ", strides);
}

void check_flags(const Tensor& trailers, int64_t first_flag, size_t n_tensors) {
  const int64_t room = (trailers.size(1) - kSealWords) * kBitsPerWord;
  LION_CHECK(first_flag >= 0, "first_flag must be at least 0, got ", first_flag);
  LION_CHECK(first_flag + static_cast<int64_t>(n_tensors) <= room, "trailers have ",
             std::max<int64_t>(0, room), " flags, got ",
             first_flag + static_cast<int64_t>(n_tensors), " tensors");
}

void check_room(int64_t first_word, int64_t end_word, const Tensor& planes, const char* name) {
  const int64_t words_per_shard = planes.size(2), room = planes.size(0) * words_per_shard;
  LION_CHECK(words_per_shard % kOctet == 0, name, " must have a multiple of ", kOctet,
             " words a shard, got ", words_per_shard);
  LION_CHECK(first_word >= 0 && first_word % kOctet == 0, "first_word must be a multiple of ",
             kOctet, ", got ", first_word);
  LION_CHECK(end_word <= room, name, " has room for ", room, " words a plane, the tensors need ",
             end_word);
}

void check_agreeing(const Tensor& agreeing, size_t n_tensors) {
  LION_CHECK(agreeing.scalar_type() == dtypes::int64 && agreeing.dim() == 1 &&
                 agreeing.size(0) == static_cast<int64_t>(n_tensors) && agreeing.is_contiguous(),
             "agreeing must be contiguous int64 of shape [", n_tensors, "], got ",
             agreeing.scalar_type(), " of shape ", agreeing.sizes());
}

}  // namespace lion
