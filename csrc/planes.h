// The argument checks of bit planes (ballots, tallies, verdicts, flags), for every back end:
// tensors in, for tally and elect a plain task out.
#pragma once

#include <cstdint>

#include "stable/tensor.h"
#include "tally_run.h"

namespace lion {

// Raises unless `planes` is int32 of so many dimensions with unit stride in the last one.
void check_planes(const Tensor& planes, const char* name, int64_t dims);

// Raise ValueError unless the arguments are those of the op. They read no tensor: the caller
// checks devices, and derives the coin key from the step.
TallyRun check_tally(const Tensor& ballots, const Tensor& tally, int64_t scale);
TallyRun check_elect(const Tensor& ballots, const Tensor& verdict, int64_t scale,
                     int64_t first_word);

}  // namespace lion
