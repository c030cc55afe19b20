// The SIMD level in use, the shared argument checks, and nothing that computes.
#include "cpu.h"

#include <atomic>
#include <cstdlib>

namespace lion {

namespace {

std::vector<const RowKernels*> available() {
  std::vector<const RowKernels*> levels;
  for (const RowKernels* level : {portable_rows(), avx2_rows(), avx512_rows()})
    if (level != nullptr) levels.push_back(level);
  return levels;
}

const RowKernels* find(const std::string& name) {
  std::string known;
  for (const RowKernels* level : available()) {
    if (name == level->name) return level;
    known += (known.empty() ? "" : ", ") + std::string(level->name);
  }
  TORCH_CHECK_VALUE(false, "SIMD level must be one of ", known, " on this machine, got ", name);
}

std::atomic<const RowKernels*>& current() {
  static std::atomic<const RowKernels*> level = [] {
    const char* wanted = std::getenv("LION_KERNELS_SIMD");
    return wanted != nullptr ? find(wanted) : available().back();
  }();
  return level;
}

}  // namespace

const RowKernels& rows() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const RowKernels* level : available()) names.emplace_back(level->name);
  return names;
}

void set_simd_level(const std::string& name) { current().store(find(name)); }

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

void check_dense(const at::Tensor& tensor, const char* list, int64_t index,
                 const at::Tensor* like) {
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), list, "[", index,
                    "] must be dense (no gaps, no overlaps), got shape ", tensor.sizes(),
                    " with strides ", tensor.strides());
  if (like == nullptr) return;
  TORCH_CHECK_VALUE(tensor.sizes() == like->sizes(), list, "[", index, "] must have shape ",
                    like->sizes(), ", got ", tensor.sizes());
  for (int64_t d = 0; d < tensor.dim(); ++d)
    TORCH_CHECK_VALUE(
        tensor.size(d) <= 1 || tensor.numel() == 0 || tensor.stride(d) == like->stride(d), list,
        "[", index, "] must have strides ", like->strides(), ", got ", tensor.strides());
}

double scalar_value(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.numel() == 1, name, " must have one element, got shape ",
                    tensor.sizes());
  return tensor.item().toDouble();
}

void check_planes(const at::Tensor& planes, const char* name, int64_t dims) {
  TORCH_CHECK_VALUE(planes.scalar_type() == at::kInt, name, " must be int32, got ",
                    planes.scalar_type());
  TORCH_CHECK_VALUE(planes.dim() == dims, name, " must have ", dims, " dimensions, got shape ",
                    planes.sizes());
  TORCH_CHECK_VALUE(planes.size(-1) <= 1 || planes.stride(-1) == 1, name,
                    " must have unit stride in its last dimension, got strides ", planes.strides());
}

}  // namespace lion
