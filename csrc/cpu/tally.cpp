// tally and elect on CPU tensors: equal runs of words to the threads.
#include "coin.h"
#include "cpu/ops.h"
#include "cpu/scalars.h"
#include "cpu/words.h"
#include "planes.h"
#include "simd/levels.h"
#include "stable/parallel.h"

namespace lion {
void cpu::tally(const Tensor& ballots, const Tensor& tally, int64_t scale) {
  const TallyRun task = check_tally(ballots, tally, scale);
  const auto kernel = simd_level().tally;
  parallel_for(tally.size(1), kGrainWords,
               [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

void cpu::elect(const Tensor& ballots, const Tensor& verdict, int64_t scale, int64_t first_word,
                int64_t seed, const Tensor& step) {
  TallyRun task = check_elect(ballots, verdict, scale, first_word);
  task.coin_key = coin_key(seed, kTieStream, count_of(step, "step"));
  const auto kernel = simd_level().elect;
  parallel_for(verdict.size(1), kGrainWords,
               [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

}  // namespace lion
