// csrc/cuda/tally.cu compiled for the host, with C entry points for on_host.py.
// clang-format off: the shim comes first.
#include "cuda_shim.h"
#include "cuda/tally.cu"
// clang-format on

extern "C" {

// Strides in words. `step` is null for tally. Returns the cudaError_t of the launch.
int lion_count(const uint32_t* ballots, int64_t ballot_stride, int64_t plane_stride,
               int64_t n_ballots, int planes_in, int planes_out, uint32_t scale, uint32_t* out,
               int64_t out_stride, int64_t n_words, int toss_ties, uint64_t first_word,
               int64_t seed, const int64_t* step) {
  lion::CudaTally task{};
  task.run = {ballots, ballot_stride, plane_stride, n_ballots,      planes_in, planes_out,
              scale,   out,           out_stride,   toss_ties != 0, 0,         first_word};
  task.run.coin_key = lion::mix64(lion::mix64(static_cast<uint64_t>(seed)) ^
                                  static_cast<uint64_t>(lion::kTieStream));
  task.n_words = n_words;
  task.step = step;
  return step == nullptr ? lion::launch_tally(task, nullptr) : lion::launch_elect(task, nullptr);
}

int lion_launches() { return shim_launches; }
}
