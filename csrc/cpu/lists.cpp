#include "cpu/lists.h"

#include "cpu/checks.h"
#include "stable/errors.h"

namespace lion {
namespace {

// Raises unless the tensor lies as `like` does, which is dense. What is common takes few calls: a
// list has 2,000 tensors. All are on the CPU, or the dispatcher had gone elsewhere.
void check_place(const Tensor& tensor, const char* list, int64_t i, const Tensor& like,
                 const Layout& layout) {
  if (&tensor != &like && !(tensor.layout() == layout)) check_dense(tensor, list, i, &like);
}

int64_t bytes_of(DType dtype) { return dtype == kFloat32 ? 4 : dtype == kInt8 ? 1 : 2; }

// What the storage type of parameter i drops is kept in lows[i].
void* low_of(const OptionalTensors* lows, int64_t i, const Tensor& p) {
  if (p.scalar_type() == dtypes::float32) return p.data_ptr();
  const Tensor& low = (**lows)[static_cast<size_t>(i)];
  const auto wanted = p.scalar_type() == dtypes::bfloat16 ? dtypes::int16 : dtypes::float16;
  LION_CHECK(low.scalar_type() == wanted, "lows[", i, "] must be ", wanted, " on ", p.device(),
             ", got ", low.scalar_type(), " on ", low.device());
  check_dense(low, "lows", i, &p);
  return low.data_ptr();
}

// The scales of an int8 momentum, one a block.
float* block_scales_of(const Tensor& exp_avg, int64_t i, size_t n_exp_avgs,
                       const OptionalTensors* block_scales) {
  const size_t n_scales = block_scales->has_value() ? (*block_scales)->size() : 0;
  LION_CHECK(n_scales == n_exp_avgs, "block_scales must have ", n_exp_avgs, " tensors, got ",
             n_scales);
  const Tensor& scale = (**block_scales)[static_cast<size_t>(i)];
  const int64_t blocks = (exp_avg.numel() + kBlock - 1) / kBlock;
  LION_CHECK(scale.scalar_type() == dtypes::float32 && scale.dim() == 1 &&
                 scale.numel() == blocks && scale.is_contiguous(),
             "block_scales[", i, "] must be contiguous float32 of shape [", blocks, "] on ",
             exp_avg.device(), ", got ", scale.scalar_type(), " of shape ", scale.sizes(),
             " with strides ", scale.strides(), " on ", scale.device());
  return scale.data_ptr<float>();
}

}  // namespace

const Tensor& present_in(const MaybeTensors& tensors, const char* name, size_t i) {
  LION_CHECK(tensors[i].has_value(), name, "[", i, "] must be a tensor, got None");
  return *tensors[i];
}

Lists::Lists(size_t n_items, const OptionalTensors* block_scales, Rounding rounding,
             const OptionalTensors* lows, int64_t first_word)
    : scales_(block_scales),
      lows_(lows),
      rounding_(rounding),
      n_items_(n_items),
      space_(first_word) {
  items_.reserve(n_items);
  space_.first.reserve(n_items + 1);
}

Item& Lists::append(const Entry& entry, const Tensor& like) {
  const auto i = static_cast<int64_t>(items_.size());
  const auto [p, g, m] = entry;
  const Layout layout = like.layout();
  if (!layout.is_non_overlapping_and_dense())
    check_dense(like, &like == p ? "params" : &like == g ? "grads" : "exp_avgs", i);
  Item& item = items_.emplace_back();
  item.numel = layout.numel();
  if (p != nullptr) {
    check_place(*p, "params", i, like, layout);
    item.dtype = dtype_of(p->scalar_type(), "params", i);
    item.data = p->data_ptr();
    item.low = rounding_ == kCompensated ? low_of(lows_, i, *p) : item.data;
  }
  if (g != nullptr) {
    check_place(*g, "grads", i, like, layout);
    const ScalarType dtype = g->scalar_type();
    LION_CHECK(p == nullptr || dtype == p->scalar_type(), "grads[", i, "] must be ",
               p->scalar_type(), " on ", p->device(), ", got ", dtype, " on ", g->device());
    if (p == nullptr) item.dtype = dtype_of(dtype, "grads", i);
    item.grad = g->const_data_ptr();
  }
  item.data_size = bytes_of(item.dtype);
  if (m != nullptr) {
    check_place(*m, "exp_avgs", i, like, layout);
    item.exp_avg_dtype = momentum_dtype_of(m->scalar_type(), i);
    item.exp_avg = m->data_ptr();
    item.exp_avg_size = bytes_of(item.exp_avg_dtype);
    if (item.exp_avg_dtype == kInt8) item.block_scales = block_scales_of(*m, i, n_items_, scales_);
  }
  space_.append(item.numel);
  return item;
}

}  // namespace lion
