// Torch's tensors as the ops see them, through the C functions of its stable ABI: one library
// serves every torch since 2.11. torch::stable::Tensor does the same and costs an allocation a
// tensor.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ostream>
#include <utility>

#include "stable/errors.h"

namespace lion {

// A dtype by the number that torch has for it.
struct ScalarType {
  int32_t number;
  bool operator==(ScalarType other) const { return number == other.number; }
  bool operator!=(ScalarType other) const { return number != other.number; }
};
std::ostream& operator<<(std::ostream& out, ScalarType dtype);

namespace dtypes {
inline const ScalarType float64{aoti_torch_dtype_float64()}, float32{aoti_torch_dtype_float32()},
    bfloat16{aoti_torch_dtype_bfloat16()}, float16{aoti_torch_dtype_float16()},
    int64{aoti_torch_dtype_int64()}, int32{aoti_torch_dtype_int32()},
    int16{aoti_torch_dtype_int16()}, int8{aoti_torch_dtype_int8()};
}  // namespace dtypes

struct Device {
  int32_t type, index;
  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
  bool operator==(Device other) const { return type == other.type && index == other.index; }
};
std::ostream& operator<<(std::ostream& out, Device device);

// The sizes or the strides of a tensor, which owns them.
struct Extents {
  const int64_t* data;
  size_t n;
  size_t size() const { return n; }
  int64_t operator[](size_t d) const { return data[d]; }
  const int64_t* begin() const { return data; }
  const int64_t* end() const { return data + n; }
  bool operator==(const Extents& other) const {
    return n == other.n && std::memcmp(data, other.data, n * sizeof(int64_t)) == 0;
  }
  bool operator!=(const Extents& other) const { return !(*this == other); }
};
std::ostream& operator<<(std::ostream& out, const Extents& extents);

struct Layout {
  Extents sizes, strides;
  int64_t numel() const {
    int64_t n = 1;
    for (const int64_t size : sizes) n *= size;
    return n;
  }
  // Whether it covers one gapless run of storage, each element once.
  bool is_non_overlapping_and_dense() const;
  bool operator==(const Layout& other) const {
    return sizes == other.sizes && strides == other.strides;
  }
};

// A tensor of which this is one owner.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim, "rank"); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel, "numel"); }
  Extents sizes() const {
    return {get<int64_t*>(aoti_torch_get_sizes, "sizes"), static_cast<size_t>(dim())};
  }
  Extents strides() const {
    return {get<int64_t*>(aoti_torch_get_strides, "strides"), static_cast<size_t>(dim())};
  }
  Layout layout() const {
    const auto n = static_cast<size_t>(dim());
    return {{get<int64_t*>(aoti_torch_get_sizes, "sizes"), n},
            {get<int64_t*>(aoti_torch_get_strides, "strides"), n}};
  }
  // Of a dimension that exists.
  int64_t size(int64_t d) const { return get<int64_t*>(aoti_torch_get_sizes, "sizes")[d]; }
  int64_t stride(int64_t d) const { return get<int64_t*>(aoti_torch_get_strides, "strides")[d]; }
  bool is_contiguous() const { return get<bool>(aoti_torch_is_contiguous, "layout"); }
  ScalarType scalar_type() const { return {get<int32_t>(aoti_torch_get_dtype, "dtype")}; }
  int64_t element_size() const {
    return static_cast<int64_t>(aoti_torch_dtype_element_size(scalar_type().number));
  }
  Device device() const {
    return {get<int32_t>(aoti_torch_get_device_type, "device"),
            get<int32_t>(aoti_torch_get_device_index, "device")};
  }

  const void* const_data_ptr() const { return get<const void*>(torch_get_const_data_ptr, "data"); }
  void* data_ptr() const { return get<void*>(torch_get_mutable_data_ptr, "data"); }
  template <class T>
  const T* const_data_ptr() const {
    return static_cast<const T*>(const_data_ptr());
  }
  template <class T>
  T* data_ptr() const {
    return static_cast<T*>(data_ptr());
  }
  // Of the one element, whatever its dtype.
  double item() const;

 private:
  template <class T>
  T get(AOTITorchError (*function)(AtenTensorHandle, T*), const char* asked) const {
    T value{};
    check(function(handle_, &value), asked, " of a tensor");
    return value;
  }

  AtenTensorHandle handle_;
};

}  // namespace lion
