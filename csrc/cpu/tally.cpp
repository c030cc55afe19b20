// tally and elect on CPU tensors: equal runs of words to the threads.
#include <algorithm>

#include "coin.h"
#include "cpu/ops.h"
#include "cpu/scalars.h"
#include "cpu/words.h"
#include "planes.h"
#include "simd/levels.h"
#include "stable/parallel.h"

namespace lion {
namespace {

// Whole octets to each thread: their blank bits are one byte.
void count(void (*kernel)(const TallyRun&, int64_t, int64_t), const TallyRun& task,
           int64_t n_words) {
  parallel_for(octets_of(n_words), kGrainWords / kOctet, [&](int64_t begin, int64_t end) {
    kernel(task, begin * kOctet, std::min(end * kOctet, n_words));
  });
  if (task.out_blanks != nullptr)
    std::fill(task.out_blanks + octets_of(n_words), task.out_blanks + task.out_blank_bytes, 0);
}

}  // namespace

void cpu::tally(const Tensor& ballots, const Tensor& tally, int64_t scale, int64_t first_word,
                int64_t seed, const Tensor& step, const OptionalTensor& blanks,
                const OptionalTensor& out_blanks, const OptionalTensor& weights) {
  TallyRun task = check_tally(ballots, tally, scale, {first_word, blanks, out_blanks, weights});
  task.coin_key = coin_key(seed, kTieStream, count_of(step, "step"));
  count(simd_level().tally, task, tally.size(1));
}

void cpu::elect(const Tensor& ballots, const Tensor& verdict, int64_t scale, int64_t first_word,
                int64_t seed, const Tensor& step, const OptionalTensor& blanks,
                const OptionalTensor& out_blanks, const OptionalTensor& weights) {
  TallyRun task = check_elect(ballots, verdict, scale, {first_word, blanks, out_blanks, weights});
  task.coin_key = coin_key(seed, kTieStream, count_of(step, "step"));
  count(simd_level().elect, task, verdict.size(1));
}

}  // namespace lion
