// The argument checks of bit planes (ballots, tallies, verdicts, flags), for every back end:
// tensors in, for tally and elect a plain task out.
#pragma once

#include <cstdint>

#include "stable/boxed.h"
#include "stable/tensor.h"
#include "tally_run.h"

namespace lion {

// Raises unless `planes` is int32 of so many dimensions with unit stride in the last one.
void check_planes(const Tensor& planes, const char* name, int64_t dims);

// Raises unless `blanks` is int32 (n, words), with a bit for each of `n_words`.
void check_blanks(const Tensor& blanks, const char* name, int64_t n, int64_t n_words);

// What tally and elect take beside ballots, out and scale.
struct CountOptions {
  int64_t first_word;
  const OptionalTensor &blanks, &out_blanks, &weights;
};

// Raise ValueError unless the arguments are those of the op. They read no tensor: the caller
// checks devices, and derives the coin key from the step.
TallyRun check_tally(const Tensor& ballots, const Tensor& tally, int64_t scale,
                     const CountOptions& options);
TallyRun check_elect(const Tensor& ballots, const Tensor& verdict, int64_t scale,
                     const CountOptions& options);

}  // namespace lion
