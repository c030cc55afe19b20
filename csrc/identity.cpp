// What tells two calls with the same tensors from two with others: one list of numbers a call, for
// the plans of the optimizers and the caches of the GPU launchers. In C++, because asking 148
// tensors from Python takes longer than the step of a small model.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

namespace lion {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Bytes of the largest access of a GPU's thread.
constexpr int64_t kAlignment = 16;

// Calls put with a tensor's rank, pointer, dtype, device, sizes and strides, one after the other.
template <class Put>
void numbers_of(const at::Tensor& tensor, Put put) {
  put(tensor.dim());
  put(reinterpret_cast<int64_t>(tensor.const_data_ptr()));
  put(static_cast<int64_t>(tensor.scalar_type()));
  put(tensor.device().index());
  for (const int64_t size : tensor.sizes()) put(size);
  for (const int64_t stride : tensor.strides()) put(stride);
}

// First the addresses of the gradients (0: none), which may be others in every step; then the
// numbers of every tensor of `fixed`, and those of the gradients but for their addresses, of which
// only the alignment counts. int64 on the CPU.
at::Tensor identity(const OptionalTensors& fixed, const OptionalTensors& grads) {
  std::vector<int64_t> numbers;
  numbers.reserve(grads.size() + 8 * (fixed.size() + grads.size()));
  const auto put = [&](int64_t number) { numbers.push_back(number); };
  for (const std::optional<at::Tensor>& g : grads)
    put(g.has_value() ? reinterpret_cast<int64_t>(g->const_data_ptr()) : 0);
  for (const std::optional<at::Tensor>& tensor : fixed)
    tensor.has_value() ? numbers_of(*tensor, put) : put(-1);
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::optional<at::Tensor> g = grads.get(i);
    const size_t at = numbers.size();
    g.has_value() ? numbers_of(*g, put) : put(-1);
    if (g.has_value()) numbers[at + 1] %= kAlignment;
  }
  at::Tensor out = at::empty({static_cast<int64_t>(numbers.size())}, at::kLong);
  std::memcpy(out.data_ptr<int64_t>(), numbers.data(), numbers.size() * sizeof(int64_t));
  return out;
}

// Which gradients are not in the memory layout of their parameters, which come first in `tensors`,
// before what is kept for them; {-1} where one of those is not what its numbers in `identity` say,
// or a gradient does not fit its parameter. All lists are of optional tensors: PyTorch converts
// parameters to such a list in half the time.
std::vector<int64_t> odd_gradients(const at::Tensor& identity, const OptionalTensors& tensors,
                                   const OptionalTensors& grads) {
  const int64_t* at = identity.const_data_ptr<int64_t>();
  const int64_t* end = at + identity.numel();
  std::vector<int64_t> odd;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::optional<at::Tensor> t = tensors.get(i);
    // The rank says how many numbers follow: read no further than they go.
    if (!t.has_value() || end - at < 4 + 2 * t->dim() || *at != t->dim()) return {-1};
    bool same = true;
    numbers_of(*t, [&](int64_t number) { same = same && *at++ == number; });
    if (!same) return {-1};
    const std::optional<at::Tensor> g = i < grads.size() ? grads.get(i) : std::nullopt;
    if (!g.has_value()) continue;
    if (g->layout() != at::kStrided || g->scalar_type() != t->scalar_type() ||
        g->device() != t->device() || g->sizes() != t->sizes() ||
        g->key_set().has(c10::DispatchKey::Python))
      return {-1};
    if (g->strides() != t->strides() || g->is_neg() || g->is_conj())
      odd.push_back(static_cast<int64_t>(i));
  }
  if (at != end) return {-1};
  return odd;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lion_kernels, m) {
  m.def("_odd_gradients(Tensor identity, Tensor?[] tensors, Tensor?[] grads) -> int[]");
  m.def("_identity(Tensor?[] fixed, Tensor?[] grads) -> Tensor");
}
TORCH_LIBRARY_IMPL(lion_kernels, CompositeExplicitAutograd, m) {
  m.impl("_identity", identity);
  m.impl("_odd_gradients", odd_gradients);
}

}  // namespace lion
