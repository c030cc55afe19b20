// The scalars of a call: checked, and rounded to what the kernels take.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "simd/interface.h"
#include "stable/boxed.h"

namespace lion {

// Raises unless a 0-d or one-element tensor; reads it.
double scalar_value(const Tensor& tensor, const char* name);

// What a counter is at: raises unless it is one int64.
int64_t count_of(const Tensor& counter, const char* name);
void count_up(const Tensor& counter, int64_t by);

// Whether a torch.amp.GradScaler found an overflow.
bool is_set(const OptionalTensor& found_inf);

// The complements of the betas are what gradients are multiplied by: maximize and grad_scale go
// into them.
LionScalars scalars_of(double beta1, double beta2, double lr, double weight_decay, bool maximize,
                       const OptionalTensor& grad_scale);

// Raises unless the rounding has what it needs: `lows`, a tensor for each parameter; `step`.
Rounding check_rounding(const std::string& name, const OptionalTensors& lows, size_t n_params,
                        std::optional<int64_t> step);
uint64_t rounding_key(Rounding rounding, int64_t seed, std::optional<int64_t> step);

}  // namespace lion
