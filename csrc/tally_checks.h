// The argument checks of tally and elect, for every back end: tensors in, a plain task out.
#pragma once

#include <ATen/ATen.h>

#include "rows.h"

namespace lion {

// Raise ValueError unless the arguments are those of the op. They read no tensor: the caller
// checks devices, and derives the coin key from the step.
TallyRows check_tally(const at::Tensor& ballots, const at::Tensor& tally, int64_t scale);
TallyRows check_elect(const at::Tensor& ballots, const at::Tensor& verdict, int64_t scale,
                      int64_t first_word);

}  // namespace lion
