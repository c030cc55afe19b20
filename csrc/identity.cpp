#include "identity.h"

#include <cstddef>
#include <cstring>
#include <memory>

#include "dlpack.h"

namespace lion {
namespace {

// Bytes of the largest access of a GPU's thread.
constexpr int64_t kAlignment = 16;

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

Owned owned(PyObject* object) {
  if (object == nullptr) throw PythonError{};
  return Owned(object);
}

Owned attribute(PyObject* object, const char* name) {
  return owned(PyObject_GetAttrString(object, name));
}

// What this file knows of torch. Never released: it outlives the interpreter.
struct Torch {
  const dlpack::ExchangeApi* api;
  PyObject *tensor, *parameter, *dispatch;
};

Torch ask_torch() {
  const Owned torch = owned(PyImport_ImportModule("torch"));
  Owned tensor = attribute(torch.get(), "Tensor");
  Owned parameter = attribute(attribute(torch.get(), "nn").get(), "Parameter");
  Owned dispatch = attribute(tensor.get(), "__torch_dispatch__");
  const Owned capsule = attribute(tensor.get(), "__dlpack_c_exchange_api__");
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.get(), dlpack::kCapsule));
  if (api == nullptr) throw PythonError{};
  if (api->major != dlpack::kVersion) {
    PyErr_Format(PyExc_RuntimeError, "lion_kernels knows DLPack %u, got torch's %u",
                 dlpack::kVersion, api->major);
    throw PythonError{};
  }
  return {api, tensor.release(), parameter.release(), dispatch.release()};
}

// Under Python's lock, which is all that guards it: asking runs Python, where other threads may
// come in and ask as well, and one that waited for a guard of C++ would keep the lock.
const Torch& torch() {
  static const Torch* known = nullptr;
  if (known == nullptr) known = new Torch(ask_torch());
  return *known;
}

// The items of a list or tuple, in a list of our own that nobody changes.
class Items {
 public:
  explicit Items(PyObject* items) : items_(owned(PySequence_List(items))) {}
  size_t size() const { return static_cast<size_t>(PyList_Size(items_.get())); }
  // Null: None.
  PyObject* operator[](size_t i) const {
    PyObject* item = PyList_GetItem(items_.get(), static_cast<Py_ssize_t>(i));
    return item == Py_None ? nullptr : item;
  }

 private:
  Owned items_;
};

dlpack::Tensor describe(PyObject* tensor) {
  dlpack::Tensor out{};
  if (torch().api->describe(tensor, &out) != 0) throw PythonError{};
  return out;
}

int64_t address_of(const dlpack::Tensor& t) {
  return reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
}

bool is_same(const int64_t* a, const int64_t* b, int32_t n) {
  return std::memcmp(a, b, static_cast<size_t>(n) * sizeof(int64_t)) == 0;
}

// Whether all but addresses and strides are the same.
bool is_like(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.dtype == b.dtype && a.device_type == b.device_type && a.device_index == b.device_index &&
         a.dim == b.dim && is_same(a.sizes, b.sizes, a.dim);
}

// Whether operations on it are not torch's own: then its data is not all that it is.
bool is_foreign(PyObject* tensor) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type == torch().tensor || type == torch().parameter) return false;
  return attribute(type, "__torch_dispatch__").get() != torch().dispatch;
}

// Calls put with a tensor's rank, address, dtype, device, sizes and strides, one after the other.
template <class Put>
void numbers_of(const dlpack::Tensor& t, Put put) {
  put(t.dim);
  put(address_of(t));
  put(t.dtype);
  put(static_cast<int64_t>(t.device_type) << 32 | static_cast<uint32_t>(t.device_index));
  for (int32_t d = 0; d < t.dim; ++d) put(t.sizes[d]);
  for (int32_t d = 0; d < t.dim; ++d) put(t.strides[d]);
}

// The numbers of a call before, one after the other; they may be anything.
class Known {
 public:
  explicit Known(std::string_view bytes) : rest_(bytes) {}
  bool is_at_end() const { return rest_.empty(); }
  bool has(int64_t n) const { return rest_.size() >= static_cast<size_t>(n) * sizeof(int64_t); }
  int64_t next() {
    int64_t number;
    std::memcpy(&number, rest_.data(), sizeof number);
    rest_.remove_prefix(sizeof number);
    return number;
  }

 private:
  std::string_view rest_;
};

}  // namespace

Identity identity(PyObject* fixed, PyObject* grads) {
  const Items all_fixed(fixed), all_grads(grads);
  Identity out;
  out.addresses.reserve(all_grads.size());
  out.numbers.reserve(8 * (all_fixed.size() + all_grads.size()));
  const auto put = [&](int64_t number) { out.numbers.push_back(number); };
  for (size_t i = 0; i < all_fixed.size(); ++i)
    all_fixed[i] == nullptr ? put(-1) : numbers_of(describe(all_fixed[i]), put);
  for (size_t i = 0; i < all_grads.size(); ++i) {
    const size_t at = out.numbers.size();
    if (all_grads[i] == nullptr) {
      out.addresses.push_back(0);
      put(-1);
    } else {
      const dlpack::Tensor grad = describe(all_grads[i]);
      out.addresses.push_back(address_of(grad));
      numbers_of(grad, put);
      out.numbers[at + 1] %= kAlignment;
    }
  }
  return out;
}

std::vector<int64_t> odd_gradients(std::string_view known, PyObject* tensors, PyObject* grads) {
  const Items all_tensors(tensors), all_grads(grads);
  Known rest(known);
  std::vector<int64_t> odd;
  for (size_t i = 0; i < all_tensors.size(); ++i) {
    if (all_tensors[i] == nullptr) return {-1};
    const dlpack::Tensor t = describe(all_tensors[i]);
    if (!rest.has(4 + 2 * t.dim)) return {-1};
    bool same = true;
    // The rank comes first, and says how many numbers follow.
    numbers_of(t, [&](int64_t number) { same = same && rest.next() == number; });
    if (!same) return {-1};
    PyObject* grad = i < all_grads.size() ? all_grads[i] : nullptr;
    if (grad == nullptr) continue;
    if (is_foreign(grad)) return {-1};
    const dlpack::Tensor g = describe(grad);
    if (!is_like(g, t)) return {-1};
    if (!is_same(g.strides, t.strides, t.dim)) odd.push_back(static_cast<int64_t>(i));
  }
  if (!rest.is_at_end()) return {-1};
  return odd;
}

}  // namespace lion
