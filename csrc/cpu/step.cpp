// lion_step and count_agreeing over lists of CPU tensors: one parallel region a call.
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cpu/checks.h"
#include "cpu/lists.h"
#include "cpu/ops.h"
#include "cpu/scalars.h"
#include "simd/levels.h"
#include "stable/errors.h"

namespace lion {

void cpu::count_agreeing(const Tensors& grads, const Tensors& exp_avgs, const Tensor& agreeing,
                         double beta1, bool maximize, const OptionalTensor& grad_scale,
                         const OptionalTensors& block_scales) {
  LION_CHECK(grads.size() == exp_avgs.size(), "grads and exp_avgs must have equal lengths, got ",
             grads.size(), " and ", exp_avgs.size());
  Lists lists(grads.size(), &block_scales);
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor &g = grads[i], &m = exp_avgs[i];
    lists.append({nullptr, &g, &m}, g);
  }
  check_agreeing(agreeing, lists.size());
  const LionScalars scalars = scalars_of(beta1, 0.0, 0.0, 0.0, maximize, grad_scale);
  const SimdLevel& kernels = simd_level();
  std::vector<std::atomic<int64_t>> counts(lists.size());
  lists.for_each_run([&](size_t t, const Segment& run) {
    const Item& item = lists[t];
    for_each_chunk<false>(kernels, item, run, [&](const Segment& s, void* m, DType m_dtype) {
      counts[t] += kernels.agree[item.dtype][m_dtype](advance(item.grad, s.offset * item.data_size),
                                                      m, s.count, scalars);
    });
  });
  for (size_t t = 0; t < lists.size(); ++t) agreeing.data_ptr<int64_t>()[t] += counts[t];
}

namespace {

// What cautious updates are multiplied by: elements over those that agree (and one).
float rescale_of(const OptionalTensor& agreeing, size_t t, int64_t numel) {
  if (!agreeing.has_value()) return 1.0f;
  const int64_t count = agreeing->const_data_ptr<int64_t>()[t];
  return static_cast<float>(numel) / static_cast<float>(count + 1);
}

// Raises unless item i has the dtypes of the first.
void check_uniform(const Lists& lists, size_t i) {
  LION_CHECK(lists[i].dtype == lists[0].dtype, "params[", i, "] must be of the first one's dtype");
  LION_CHECK(lists[i].exp_avg_dtype == lists[0].exp_avg_dtype, "exp_avgs[", i,
             "] must be of the first one's dtype");
}

}  // namespace

void cpu::lion_step(const MaybeTensors& params, const Tensors& grads, const Tensors& exp_avgs,
                    const Tensor& lr, double beta1, double beta2, double weight_decay,
                    bool maximize, const OptionalTensor& nonfinite,
                    const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                    const std::string& rounding_name, const OptionalTensors& lows, int64_t seed,
                    const OptionalTensor& step, bool cautious, bool cautious_decay,
                    const OptionalTensors& block_scales, const OptionalTensor& agreeing,
                    bool uniform) {
  std::optional<int64_t> count;
  if (step.has_value()) count = count_of(*step, "step");
  if (nonfinite.has_value()) count_of(*nonfinite, "nonfinite");
  const Rounding rounding = check_rounding(rounding_name, lows, params.size(), count);
  LION_CHECK(params.size() == grads.size() && params.size() == exp_avgs.size(),
             "params, grads and exp_avgs must have equal lengths, got ", params.size(), ", ",
             grads.size(), " and ", exp_avgs.size());
  Lists lists(params.size(), &block_scales, rounding, &lows);
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& p = present_in(params, "params", i);
    const Tensor &g = grads[i], &m = exp_avgs[i];
    lists.append({&p, &g, &m}, p);
    if (uniform) check_uniform(lists, i);
  }
  if (agreeing.has_value()) {
    LION_CHECK(cautious, "agreeing rescales a cautious update, got cautious=False");
    check_agreeing(*agreeing, lists.size());
  }
  const uint64_t key = rounding_key(rounding, seed, count);
  LionScalars scalars =
      scalars_of(beta1, beta2, scalar_value(lr, "lr"), weight_decay, maximize, grad_scale);
  scalars.skip_nonfinite = nonfinite.has_value();
  scalars.cautious = cautious;
  scalars.cautious_decay = cautious_decay;
  if (is_set(found_inf)) return;
  const SimdLevel& kernels = simd_level();
  const auto& steps = kernels.step[!scalars.is_plain()][rounding];
  std::atomic<int64_t> skipped{0};
  lists.for_each_run([&](size_t t, const Segment& run) {
    const Item& item = lists[t];
    LionScalars own = scalars;
    own.lr *= rescale_of(agreeing, t, item.numel);
    for_each_chunk(kernels, item, run, [&](const Segment& s, void* m, DType m_dtype) {
      const int64_t n = steps[item.dtype][m_dtype](
          advance(item.data, s.offset * item.data_size),
          advance(item.grad, s.offset * item.data_size), m,
          advance(item.low, s.offset * item.data_size), s.count, own,
          RoundingRun{key, static_cast<uint64_t>(lists.word_of(t, s.offset))});
      if (n != 0) skipped += n;
    });
  });
  if (step.has_value()) count_up(*step, 1);
  if (nonfinite.has_value() && skipped != 0) count_up(*nonfinite, skipped);
}

}  // namespace lion
