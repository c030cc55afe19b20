#include "cpu/scalars.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#include "coin.h"

namespace lion {
namespace {

// The optional scalar of a torch.amp.GradScaler, or what its absence means.
double amp_scalar(const std::optional<at::Tensor>& tensor, const char* name, double absent) {
  if (!tensor.has_value()) return absent;
  TORCH_CHECK_VALUE(tensor->scalar_type() == at::kFloat, name, " must be float32, got ",
                    tensor->scalar_type());
  return scalar_value(*tensor, name);
}

Rounding rounding_of(c10::string_view name) {
  if (name == "nearest") return kNearest;
  if (name == "stochastic") return kStochastic;
  TORCH_CHECK_VALUE(name == "compensated",
                    "rounding must be nearest, stochastic or compensated, got ", name);
  return kCompensated;
}

}  // namespace

double scalar_value(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.numel() == 1, name, " must have one element, got shape ",
                    tensor.sizes());
  return tensor.item().toDouble();
}

bool is_set(const std::optional<at::Tensor>& found_inf) {
  return amp_scalar(found_inf, "found_inf", 0.0) != 0.0;
}

LionScalars scalars_of(double beta1, double beta2, double lr, double weight_decay, bool maximize,
                       const std::optional<at::Tensor>& grad_scale) {
  const double sign = maximize ? -1.0 : 1.0;
  const auto scale = static_cast<float>(amp_scalar(grad_scale, "grad_scale", 1.0));
  LionScalars s{};
  s.beta1 = static_cast<float>(beta1);
  s.one_minus_beta1 = static_cast<float>(sign * (1.0 - beta1)) / scale;
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(sign * (1.0 - beta2)) / scale;
  s.lr = static_cast<float>(lr);
  s.decay = static_cast<float>(1.0 - lr * weight_decay);
  return s;
}

Rounding check_rounding(c10::string_view name, const OptionalTensors& lows, size_t n_params,
                        const std::optional<at::Tensor>& step) {
  const Rounding rounding = rounding_of(name);
  const size_t wanted = rounding == kCompensated ? n_params : 0;
  const size_t n_lows = lows.has_value() ? lows->size() : 0;
  TORCH_CHECK_VALUE(n_lows == wanted, "lows must have ", wanted, " tensors, got ", n_lows);
  TORCH_CHECK_VALUE(rounding != kStochastic || step.has_value(),
                    "stochastic rounding needs step, the counter of its random bits");
  return rounding;
}

uint64_t rounding_key(Rounding rounding, int64_t seed, const std::optional<at::Tensor>& step) {
  if (rounding != kStochastic) return 0;
  return coin_key(seed, kRoundingStream, static_cast<int64_t>(scalar_value(*step, "step")));
}

}  // namespace lion
