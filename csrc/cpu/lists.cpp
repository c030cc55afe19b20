#include "cpu/lists.h"

#include <c10/util/Exception.h>

#include "cpu/checks.h"

namespace lion {
namespace {

// Raises unless the tensor lies as `like` does, which is dense. What is common takes no call: a
// list has 2,000 tensors.
inline void check_place(const at::Tensor& tensor, const char* list, int64_t i,
                        const at::Tensor& like) {
  if (&tensor == &like) return;
  TORCH_CHECK_VALUE(tensor.device() == like.device(), list, "[", i, "] must be on ", like.device(),
                    ", got ", tensor.device());
  if (tensor.strides() != like.strides() || tensor.sizes() != like.sizes())
    check_dense(tensor, list, i, &like);
}

// What the storage type of parameter i drops is kept in lows[i].
void* low_of(Rounding rounding, const OptionalTensors* lows, int64_t i, const at::Tensor& p) {
  if (rounding != kCompensated || p.scalar_type() == at::kFloat) return p.data_ptr();
  const at::Tensor low = (*lows)->get(static_cast<size_t>(i));
  const auto wanted = p.scalar_type() == at::kBFloat16 ? at::kShort : at::kHalf;
  TORCH_CHECK_VALUE(low.scalar_type() == wanted && low.device() == p.device(), "lows[", i,
                    "] must be ", wanted, " on ", p.device(), ", got ", low.scalar_type(), " on ",
                    low.device());
  check_dense(low, "lows", i, &p);
  return low.data_ptr();
}

// The scales of an int8 momentum, one a block.
float* block_scales_of(const at::Tensor& exp_avg, int64_t i, size_t n_exp_avgs,
                       const OptionalTensors* block_scales) {
  if (exp_avg.scalar_type() != at::kChar) return nullptr;
  const size_t n_scales = block_scales->has_value() ? (*block_scales)->size() : 0;
  TORCH_CHECK_VALUE(n_scales == n_exp_avgs, "block_scales must have ", n_exp_avgs, " tensors, got ",
                    n_scales);
  const at::Tensor scale = (*block_scales)->get(static_cast<size_t>(i));
  const int64_t blocks = (exp_avg.numel() + kBlock - 1) / kBlock;
  TORCH_CHECK_VALUE(scale.scalar_type() == at::kFloat && scale.device() == exp_avg.device() &&
                        scale.dim() == 1 && scale.numel() == blocks && scale.is_contiguous(),
                    "block_scales[", i, "] must be contiguous float32 of shape [", blocks, "] on ",
                    exp_avg.device(), ", got ", scale.scalar_type(), " of shape ", scale.sizes(),
                    " with strides ", scale.strides(), " on ", scale.device());
  return scale.data_ptr<float>();
}

}  // namespace

at::Tensor present_in(const MaybeTensors& tensors, const char* name, size_t i) {
  const std::optional<at::Tensor> tensor = tensors.get(i);
  TORCH_CHECK_VALUE(tensor.has_value(), name, "[", i, "] must be a tensor, got None");
  TORCH_CHECK_VALUE(!tensor->is_neg(), name, "[", i, "] must not be a negative view");
  return *tensor;
}

Lists::Lists(size_t n_items, const OptionalTensors* block_scales, Rounding rounding,
             const OptionalTensors* lows)
    : scales_(block_scales), lows_(lows), rounding_(rounding), n_items_(n_items) {
  items_.reserve(n_items);
  space_.first.reserve(n_items + 1);
}

Item& Lists::append(const Entry& entry, const at::Tensor& like) {
  const auto i = static_cast<int64_t>(items_.size());
  const auto [p, g, m] = entry;
  if (!like.is_non_overlapping_and_dense())
    check_dense(like, &like == p ? "params" : &like == g ? "grads" : "exp_avgs", i);
  Item& item = items_.emplace_back();
  item.numel = like.numel();
  if (p != nullptr) {
    check_place(*p, "params", i, like);
    item.dtype = dtype_of(*p, "params", i);
    item.data = p->data_ptr();
    item.data_size = static_cast<int64_t>(p->element_size());
    item.low = low_of(rounding_, lows_, i, *p);
  }
  if (g != nullptr) {
    if (p != nullptr)
      TORCH_CHECK_VALUE(g->device() == p->device() && g->scalar_type() == p->scalar_type(),
                        "grads[", i, "] must be ", p->scalar_type(), " on ", p->device(), ", got ",
                        g->scalar_type(), " on ", g->device());
    check_place(*g, "grads", i, like);
    if (p == nullptr) item.dtype = dtype_of(*g, "grads", i);
    item.grad = g->const_data_ptr();
    item.data_size = static_cast<int64_t>(g->element_size());
  }
  if (m != nullptr) {
    check_place(*m, "exp_avgs", i, like);
    item.exp_avg_dtype = momentum_dtype_of(*m, i);
    item.exp_avg = m->data_ptr();
    item.exp_avg_size = static_cast<int64_t>(m->element_size());
    item.block_scales = block_scales_of(*m, i, n_items_, scales_);
  }
  space_.append(item.numel);
  return item;
}

}  // namespace lion
