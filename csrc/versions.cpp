// What writes a tensor raises its version counter, so that a backward pass over a graph that saved
// the old values raises, as after a step of torch.optim. One boxed function for every op: schemas
// say what each writes.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <vector>

namespace lion {
namespace {

void raise_version(const at::Tensor& tensor) {
  if (tensor.defined() && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

void raise_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                    torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  std::vector<c10::IValue> written;  // holds a list once: its tensors are many
  for (size_t i = 0; i < arguments.size(); ++i) {
    const c10::AliasInfo* alias = arguments[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) continue;
    written.push_back((*stack)[stack->size() - arguments.size() + i]);
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const c10::IValue& value : written) {
    if (value.isTensor()) raise_version(value.toTensor());
    if (value.isList())
      for (const c10::IValue& each : value.toListRef()) raise_version(each.toTensor());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(lion_kernels, ADInplaceOrView, m) {
  for (const char* name : {"lion_step", "count_agreeing", "encode", "tally", "elect", "apply"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&raise_versions>());
}

}  // namespace lion
