// tally and elect on CPU tensors: checks, then equal runs of words to the threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "coin.h"
#include "cpu.h"

namespace lion {
namespace {

int bit_length(int64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(static_cast<uint64_t>(x)); }

TallyRows check_rows(const at::Tensor& ballots, const at::Tensor& out, const char* name,
                     int64_t scale) {
  check_planes(ballots, "ballots", 3);
  check_planes(out, name, 2);
  TORCH_CHECK_VALUE(ballots.size(2) == out.size(1), name, " must have ", ballots.size(2),
                    " words a plane, got ", out.size(1));
  TORCH_CHECK_VALUE(ballots.size(0) >= 1 && ballots.size(1) >= 1,
                    "ballots must hold at least one plane, got shape ", ballots.sizes());
  TORCH_CHECK_VALUE(scale >= 1 && bit_length(scale) <= kMaxPlanes, "scale must be in [1, ",
                    (1 << kMaxPlanes) - 1, "], got ", scale);
  TORCH_CHECK_VALUE(ballots.size(1) <= bit_length(scale), "ballots of ", ballots.size(1),
                    " planes can exceed scale ", scale);
  TallyRows rows{};
  rows.ballots = reinterpret_cast<const uint32_t*>(ballots.const_data_ptr<int32_t>());
  rows.ballot_stride = ballots.stride(0);
  rows.plane_stride = ballots.stride(1);
  rows.n_ballots = ballots.size(0);
  rows.planes_in = static_cast<int>(ballots.size(1));
  rows.planes_out = bit_length(scale);
  rows.scale = static_cast<uint32_t>(scale);
  rows.out = reinterpret_cast<uint32_t*>(out.data_ptr<int32_t>());
  rows.out_stride = out.stride(0);
  return rows;
}

void tally(const at::Tensor& ballots, const at::Tensor& tally, int64_t scale) {
  const TallyRows task = check_rows(ballots, tally, "tally", scale);
  TORCH_CHECK_VALUE(tally.size(0) == task.planes_out, "tally must have ", task.planes_out,
                    " planes for scale ", scale, ", got ", tally.size(0));
  const TallyFn kernel = rows().tally;
  at::parallel_for(0, tally.size(1), kGrainWords,
                   [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

void elect(const at::Tensor& ballots, const at::Tensor& verdict, int64_t scale, int64_t first_word,
           int64_t seed, const at::Tensor& step) {
  TallyRows task = check_rows(ballots, verdict, "verdict", scale);
  TORCH_CHECK_VALUE(verdict.size(0) == 1 || (verdict.size(0) == 2 && scale % 2 == 0),
                    "verdict must have 1 plane, or 2 where scale is even; got ", verdict.size(0),
                    " for scale ", scale);
  task.toss_ties = verdict.size(0) == 1;
  task.coin_key = coin_key(seed, kTieStream, static_cast<int64_t>(scalar_value(step, "step")));
  task.first_word = static_cast<uint64_t>(first_word);
  const TallyFn kernel = rows().elect;
  at::parallel_for(0, verdict.size(1), kGrainWords,
                   [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

}  // namespace

TORCH_LIBRARY_IMPL(lion_kernels, CPU, m) {
  m.impl("tally", tally);
  m.impl("elect", elect);
}

}  // namespace lion
