// tally and elect on CPU tensors: equal runs of words to the threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "coin.h"
#include "cpu/scalars.h"
#include "cpu/words.h"
#include "planes.h"
#include "simd/levels.h"

namespace lion {
namespace {

void tally(const at::Tensor& ballots, const at::Tensor& tally, int64_t scale) {
  const TallyRun task = check_tally(ballots, tally, scale);
  const auto kernel = simd_level().tally;
  at::parallel_for(0, tally.size(1), kGrainWords,
                   [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

void elect(const at::Tensor& ballots, const at::Tensor& verdict, int64_t scale, int64_t first_word,
           int64_t seed, const at::Tensor& step) {
  TallyRun task = check_elect(ballots, verdict, scale, first_word);
  task.coin_key = coin_key(seed, kTieStream, static_cast<int64_t>(scalar_value(step, "step")));
  const auto kernel = simd_level().elect;
  at::parallel_for(0, verdict.size(1), kGrainWords,
                   [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(lion_kernels, CPU, m) {
  m.impl("tally", tally);
  m.impl("elect", elect);
}

}  // namespace lion
