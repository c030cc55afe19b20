// What tells two calls with the same tensors from two with others: one number row a call, for the
// plans of the optimizers and the caches of the GPU launchers. In C++, because asking 148 tensors
// from Python takes longer than the step of a small model.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

namespace lion {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

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

// The numbers of every tensor of every list: int64 on the CPU.
at::Tensor identity(const OptionalTensors& params, const OptionalTensors& grads,
                    const OptionalTensors& exp_avgs, const OptionalTensors& lows,
                    const OptionalTensors& scales) {
  std::vector<int64_t> numbers;
  numbers.reserve(8 * (params.size() + grads.size() + exp_avgs.size()));
  for (const OptionalTensors* list : {&params, &grads, &exp_avgs, &lows, &scales}) {
    numbers.push_back(static_cast<int64_t>(list->size()));
    for (const std::optional<at::Tensor>& tensor : *list) {
      if (!tensor.has_value()) {
        numbers.push_back(-1);
        continue;
      }
      numbers_of(*tensor, [&](int64_t number) { numbers.push_back(number); });
    }
  }
  at::Tensor out = at::empty({static_cast<int64_t>(numbers.size())}, at::kLong);
  std::memcpy(out.data_ptr<int64_t>(), numbers.data(), numbers.size() * sizeof(int64_t));
  return out;
}

// Whether `list` is what its numbers at `at` say, one by one.
bool is_same(at::TensorList list, const int64_t*& at, const int64_t* end) {
  bool same = end - at >= 1 && *at++ == static_cast<int64_t>(list.size());
  for (const at::Tensor& tensor : list) {
    // The rank says how many numbers follow: read no further than they go.
    if (!same || end - at < 4 + 2 * tensor.dim() || *at != tensor.dim()) return false;
    numbers_of(tensor, [&](int64_t number) { same = same && *at++ == number; });
  }
  return same;
}

// Which gradients are not in the memory layout of their parameters; {-1} where a parameter is not
// what its numbers in `identity` say, or a gradient does not fit its parameter.
std::vector<int64_t> odd_gradients(const at::Tensor& identity, at::TensorList params,
                                   const OptionalTensors& grads) {
  const int64_t* at = identity.const_data_ptr<int64_t>();
  const int64_t* end = at + identity.numel();
  if (!is_same(params, at, end)) return {-1};
  std::vector<int64_t> odd;
  for (size_t i = 0; i < params.size(); ++i) {
    const std::optional<at::Tensor> g = grads.get(i);
    if (!g.has_value()) continue;
    const at::Tensor& p = params[i];
    if (g->layout() != at::kStrided || g->scalar_type() != p.scalar_type() ||
        g->device() != p.device() || g->sizes() != p.sizes() ||
        g->key_set().has(c10::DispatchKey::Python))
      return {-1};
    if (g->strides() != p.strides() || g->is_neg() || g->is_conj())
      odd.push_back(static_cast<int64_t>(i));
  }
  return odd;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lion_kernels, m) {
  m.def("_odd_gradients(Tensor identity, Tensor[] params, Tensor?[] grads) -> int[]");
  m.def(
      "_identity(Tensor?[] params, Tensor?[] grads, Tensor?[] exp_avgs, Tensor?[] lows, "
      "Tensor?[] scales) -> Tensor");
}
TORCH_LIBRARY_IMPL(lion_kernels, CompositeExplicitAutograd, m) {
  m.impl("_identity", identity);
  m.impl("_odd_gradients", odd_gradients);
}

}  // namespace lion
