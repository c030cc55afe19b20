#include "cpu/scalars.h"

#include "coin.h"
#include "stable/errors.h"

namespace lion {
namespace {

// The optional scalar of a torch.amp.GradScaler, or what its absence means.
double amp_scalar(const OptionalTensor& tensor, const char* name, double absent) {
  if (!tensor.has_value()) return absent;
  LION_CHECK(tensor->scalar_type() == dtypes::float32, name, " must be float32, got ",
             tensor->scalar_type());
  return scalar_value(*tensor, name);
}

Rounding rounding_of(const std::string& name) {
  if (name == "nearest") return kNearest;
  if (name == "stochastic") return kStochastic;
  LION_CHECK(name == "compensated", "rounding must be nearest, stochastic or compensated, got ",
             name);
  return kCompensated;
}

}  // namespace

double scalar_value(const Tensor& tensor, const char* name) {
  LION_CHECK(tensor.numel() == 1, name, " must have one element, got shape ", tensor.sizes());
  return tensor.item();
}

int64_t count_of(const Tensor& counter, const char* name) {
  LION_CHECK(counter.numel() == 1, name, " must have one element, got shape ", counter.sizes());
  LION_CHECK(counter.scalar_type() == dtypes::int64, name, " must be int64, got ",
             counter.scalar_type());
  return *counter.const_data_ptr<int64_t>();
}

void count_up(const Tensor& counter, int64_t by) { *counter.data_ptr<int64_t>() += by; }

bool is_set(const OptionalTensor& found_inf) {
  return amp_scalar(found_inf, "found_inf", 0.0) != 0.0;
}

LionScalars scalars_of(double beta1, double beta2, double lr, double weight_decay, bool maximize,
                       const OptionalTensor& grad_scale) {
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

Rounding check_rounding(const std::string& name, const OptionalTensors& lows, size_t n_params,
                        std::optional<int64_t> step) {
  const Rounding rounding = rounding_of(name);
  const size_t wanted = rounding == kCompensated ? n_params : 0;
  const size_t n_lows = lows.has_value() ? lows->size() : 0;
  LION_CHECK(n_lows == wanted, "lows must have ", wanted, " tensors, got ", n_lows);
  LION_CHECK(rounding != kStochastic || step.has_value(),
             "stochastic rounding needs step, the counter of its random bits");
  return rounding;
}

uint64_t rounding_key(Rounding rounding, int64_t seed, std::optional<int64_t> step) {
  if (rounding != kStochastic) return 0;
  return coin_key(seed, kRoundingStream, *step);
}

}  // namespace lion
