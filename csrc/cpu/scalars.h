// The scalars of a call: checked, and rounded to what the kernels take.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <cstddef>
#include <cstdint>
#include <optional>

#include "simd/interface.h"

namespace lion {

// Lists as the dispatcher has them: at::TensorList would be a copy of each, and of its tensors.
using Tensors = c10::List<at::Tensor>;
using MaybeTensors = c10::List<std::optional<at::Tensor>>;
using OptionalTensors = std::optional<Tensors>;

// Raises unless a 0-d or one-element tensor; reads it.
double scalar_value(const at::Tensor& tensor, const char* name);

// Whether a torch.amp.GradScaler found an overflow.
bool is_set(const std::optional<at::Tensor>& found_inf);

// The complements of the betas are what gradients are multiplied by: maximize and grad_scale go
// into them.
LionScalars scalars_of(double beta1, double beta2, double lr, double weight_decay, bool maximize,
                       const std::optional<at::Tensor>& grad_scale);

// Raises unless the rounding has what it needs: `lows`, a tensor for each parameter; `step`.
Rounding check_rounding(c10::string_view name, const OptionalTensors& lows, size_t n_params,
                        const std::optional<at::Tensor>& step);
uint64_t rounding_key(Rounding rounding, int64_t seed, const std::optional<at::Tensor>& step);

}  // namespace lion
