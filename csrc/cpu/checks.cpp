#include "cpu/checks.h"

#include <c10/util/Exception.h>

#include "bitplanes.h"
#include "cpu/words.h"

namespace lion {

DType dtype_of(const at::Tensor& tensor, const char* list, int64_t index) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK_VALUE(false, list, "[", index, "] must be float32, bfloat16 or float16, got ",
                        tensor.scalar_type());
  }
}

DType momentum_dtype_of(const at::Tensor& exp_avg, int64_t index) {
  return exp_avg.scalar_type() == at::kChar ? kInt8 : dtype_of(exp_avg, "exp_avgs", index);
}

void check_dense(const at::Tensor& tensor, const char* list, int64_t index,
                 const at::Tensor* like) {
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), list, "[", index,
                    "] must be dense (no gaps, no overlaps), got shape ", tensor.sizes(),
                    " with strides ", tensor.strides());
  if (like == nullptr) return;
  TORCH_CHECK_VALUE(tensor.sizes() == like->sizes(), list, "[", index, "] must have shape ",
                    like->sizes(), ", got ", tensor.sizes());
  const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides(),
                        wanted = like->strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    TORCH_CHECK_VALUE(strides[d] == wanted[d] || sizes[d] <= 1 || tensor.numel() == 0, list, "[",
                      index, "] must have strides ", wanted, ", got ", strides);
}

void check_flags(const at::Tensor& flags, const char* name, size_t n_tensors) {
  TORCH_CHECK_VALUE(words_of(static_cast<int64_t>(n_tensors)) <= flags.size(1), name, " has ",
                    flags.size(1) * kBitsPerWord, " flags, got ", n_tensors, " tensors");
}

void check_room(int64_t n_words, const at::Tensor& planes, const char* name) {
  TORCH_CHECK_VALUE(n_words <= planes.size(0) * planes.size(2), name, " of shape ", planes.sizes(),
                    " has room for ", planes.size(0) * planes.size(2),
                    " words a plane, the tensors need ", n_words);
}

void check_agreeing(const at::Tensor& agreeing, size_t n_tensors) {
  TORCH_CHECK_VALUE(agreeing.scalar_type() == at::kLong && agreeing.dim() == 1 &&
                        agreeing.size(0) == static_cast<int64_t>(n_tensors) &&
                        agreeing.is_contiguous(),
                    "agreeing must be contiguous int64 of shape [", n_tensors, "], got ",
                    agreeing.scalar_type(), " of shape ", agreeing.sizes());
}

}  // namespace lion
