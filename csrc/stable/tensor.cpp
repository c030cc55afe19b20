#include "stable/tensor.h"

#include <algorithm>
#include <string>
#include <vector>

namespace lion {

std::ostream& operator<<(std::ostream& out, ScalarType dtype) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_float32(), "Float"},
      {aoti_torch_dtype_float64(), "Double"},
      {aoti_torch_dtype_float16(), "Half"},
      {aoti_torch_dtype_bfloat16(), "BFloat16"},
      {aoti_torch_dtype_int8(), "Char"},
      {aoti_torch_dtype_uint8(), "Byte"},
      {aoti_torch_dtype_int16(), "Short"},
      {aoti_torch_dtype_int32(), "Int"},
      {aoti_torch_dtype_int64(), "Long"},
      {aoti_torch_dtype_bool(), "Bool"},
      {aoti_torch_dtype_complex32(), "ComplexHalf"},
      {aoti_torch_dtype_complex64(), "ComplexFloat"},
      {aoti_torch_dtype_complex128(), "ComplexDouble"},
      {aoti_torch_dtype_float8_e5m2(), "Float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fn(), "Float8_e4m3fn"},
  };
  for (const auto& [number, name] : names)
    if (number == dtype.number) return out << name;
  return out << "dtype " << dtype.number;
}

std::ostream& operator<<(std::ostream& out, Device device) {
  if (device.is_cuda()) return out << "cuda:" << device.index;
  if (device.type == aoti_torch_device_type_cpu()) return out << "cpu";
  return out << (device.type == aoti_torch_device_type_meta() ? "meta" : "another device");
}

std::ostream& operator<<(std::ostream& out, const Extents& extents) {
  out << '[';
  for (size_t d = 0; d < extents.size(); ++d) out << (d == 0 ? "" : ", ") << extents[d];
  return out << ']';
}

bool Layout::is_non_overlapping_and_dense() const {
  bool is_contiguous = true;
  int64_t row = 1;
  for (size_t d = sizes.size(); d-- > 0; row *= sizes[d])
    is_contiguous = is_contiguous && (sizes[d] == 1 || strides[d] == row);
  if (is_contiguous || row == 0) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size; one element has no stride
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t wanted = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != wanted) return false;
    wanted *= size;
  }
  return true;
}

double Tensor::item() const {
  // What learning rates and counters are takes no call.
  const ScalarType dtype = scalar_type();
  if (dtype == dtypes::float64) return *const_data_ptr<double>();
  if (dtype == dtypes::float32) return *const_data_ptr<float>();
  if (dtype == dtypes::int64) return static_cast<double>(*const_data_ptr<int64_t>());
  double value = 0.0;
  check(aoti_torch_item_float64(handle_, &value), "value", " of a tensor");
  return value;
}

}  // namespace lion
